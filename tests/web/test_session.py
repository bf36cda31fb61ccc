"""Users beside each other: their conversations, caches and settings, stopped answers, memory that returns."""

import gc
import threading
import time
import weakref

import pytest
import torch

from shortv_hf.chat import comparison
from shortv_hf.chat import conversation as chat
from shortv_hf.hub.loading import demo_model
from shortv_hf.layer_contribution import LayerRanking
from shortv_hf.web import views
from shortv_hf.web.session import WORKER, Reply, Session, Sessions, Stopped
from shortv_hf.web.shared import Settings, load_shared
from shortv_hf.web.uploads import Upload


def answer(session, prompt, pictures=(), settings=None) -> Reply:
    *texts, reply = session.ask(prompt, Upload(list(pictures)), settings or session.shared.start)
    assert "".join(texts).strip() == reply.answer.text
    return reply


class TestOrder:
    def test_of_the_config(self, shared):
        assert shared.order == [3, 1] and shared.start == Settings((3, 1)) and "config" in shared.order_from

    @pytest.mark.parametrize(("order", "expected"), [([3, 1, 0, 2], [3, 1, 0, 2]), ([0, 1, 2, 3], [3, 1])])
    def test_of_a_ranking_that_fits_the_config(self, repo, order, expected):
        LayerRanking([0.1 * (1 + order.index(i)) for i in range(4)], order, "lc", "visual", "forward", 0).save(
            repo / "ranking.json"
        )
        assert load_shared(str(repo), "tiny").order == expected

    def test_of_a_ranking_of_another_model(self, repo):
        LayerRanking([0.1, 0.2], [0, 1], "lc", "visual", "forward", 0).save(repo / "ranking.json")
        assert load_shared(str(repo), "tiny").order == [3, 1]

    def test_of_layers(self, repo):
        shared = load_shared(str(repo), "tiny", [2, "0.mlp"])
        assert shared.order == [2, "0.mlp"] and shared.settings(1, None) == Settings((2,))

    def test_of_the_demonstration_model(self):
        shared = load_shared(demo_model(), "demo", dtype="float32")
        assert len(shared.order) == 12 and len(shared.start.layers) == 8 and not shared.takes_video

    def test_what_cannot_be_set(self, shared):
        with pytest.raises(ValueError, match="cannot freeze 3 layers; the valid range is 0 to 2"):
            shared.settings(3, None)
        with pytest.raises(ValueError, match="vtw: k is 9"):
            shared.settings(1, {"method": "vtw", "k": 9})


class TestAnswers:
    def test_are_those_of_a_conversation(self, shared, picture):
        session = Session(shared, 5)
        talk = chat.Conversation(shared.model, shared.processor, 5)
        for prompt, pictures in (("what is this ?", [picture]), ("is it red ?", [])):
            reply = answer(session, prompt, pictures)
            assert reply.answer.token_ids == talk.ask(prompt, pictures).token_ids
            assert reply.cache_bytes == talk.cache_bytes() > 0 and reply.from_cache == (not pictures)

    def test_with_other_settings_are_computed_anew(self, shared, picture):
        session, dense = Session(shared, 5), Settings(())
        answer(session, "what is this ?", [picture])
        reply = answer(session, "is it red ?", settings=dense)
        assert not reply.from_cache and answer(session, "and ?", settings=dense).from_cache
        fresh = chat.Conversation(shared.model, shared.processor, 5)
        fresh.messages, fresh._images = session._conversation.messages[:2], [picture]
        with shared.model.using(shortv_layers=[]):
            assert fresh.ask("is it red ?").token_ids == reply.answer.token_ids
        assert shared.model.config.shortv_layers == [3, 1]

    def test_say_how_many_tokens_reach_the_decoder(self, shared, picture):
        reply = answer(
            Session(shared, 2), "what ?", [picture], shared.settings(2, {"method": "random", "token_num": 6})
        )
        assert reply.kept == 6 and answer(Session(shared, 2), "what ?", [picture]).kept == 16

    @pytest.mark.parametrize(
        ("prompt", "said"), [("  ", "is empty"), ("x" * 4001, "4001 characters"), ("\udce9", "UTF-8")]
    )
    def test_bad_questions_leave_the_conversation(self, shared, picture, prompt, said):
        session = Session(shared, 3)
        answer(session, "what is this ?", [picture])
        with pytest.raises(ValueError, match=said):
            list(session.ask(prompt, Upload(), shared.start))
        assert answer(session, "is it red ?").from_cache and len(session.upload.pictures) == 1


class TestComparison:
    def test_repeats_the_last_question(self, shared, picture, monkeypatch):
        monkeypatch.setattr(comparison, "MAX_ROUNDS", 1)
        session = Session(shared, 3)
        with pytest.raises(ValueError, match="ask something first"):
            list(session.compare(shared.start))
        first = answer(session, "what is this ?", [picture])
        settings = shared.settings(1, {"method": "vtw", "k": 2})
        *texts, result = session.compare(settings)
        assert result["shortv"]["shortv_layers"] == [3] and result["shortv"]["visual_tokens_by_layer"] == [
            16,
            16,
            0,
            0,
        ]
        assert result["dense"]["kv_tokens"] == first.answer.prompt_tokens > result["shortv"]["kv_tokens"]
        for name in ("dense", "shortv"):
            assert "".join(text for each, text in texts if each == name).strip() == result[name]["answer"]
        assert answer(session, "is it red ?").from_cache  # the conversation went on

    def test_as_a_table_escapes_what_was_said(self, shared, picture, monkeypatch):
        monkeypatch.setattr(comparison, "MAX_ROUNDS", 1)
        session = Session(shared, 2)
        answer(session, "what ?", [picture])
        *_, result = session.compare(shared.start)
        result["dense"]["answer"] = "<script>alert('x')</script>"
        table = views.comparison(result)
        assert "<script" not in table and "&lt;script&gt;" in table and "16 → 16" in table
        assert "<script" not in views.streaming({"dense": "<script>"})


class TestViews:
    @pytest.mark.parametrize(
        "reduction", [None, {"method": "vtw", "k": 2}, {"method": "fastv", "k": 2, "ratio": 0.5}, {"method": "prumerge"}], ids=str
    )  # fmt: skip
    def test_are_drawn_for_every_kind_of_method(self, shared, picture, reduction):
        session, settings = Session(shared, 2), shared.settings(2, reduction)
        reply = answer(session, "what ?", [picture, picture], settings)
        chart, said = views.frozen_layers(shared, settings, session.whole)
        assert chart.size > (500, 400) and "32 visual tokens (orange) are frozen (grey) in 2 of 4 layers" in said
        assert ("taken out (white)" in said) == (reduction is not None)
        drawn = session.draw(
            settings, lambda model, own: views.patches(model, shared.processor, own.upload, own.prompt, reduction)
        )
        assert (drawn is None) == (reduction is None)
        assert f"{reply.answer.prompt_tokens} prompt tokens, 32 of them visual" in views.summary(reply)

    def test_how_many_stay_has_to_be_known(self, shared):
        with pytest.raises(ValueError, match="depends on the image"):
            views.frozen_layers(shared, shared.settings(1, {"method": "prumerge"}), None)


class TestUsers:
    def test_keep_their_own(self, shared, picture):
        sessions = Sessions(shared, 4)
        one, other = sessions.get("one"), sessions.get("other")
        assert sessions.get("one") is one is not other and len(sessions) == 2
        alone = [answer(Session(shared, 4), "what ?", [each]).answer for each in (picture, picture.rotate(90))]
        got = {}

        def ask(session, name, picture):
            got[name] = [answer(session, "what ?", [picture]), answer(session, "and ?")]

        threads = [
            threading.Thread(target=ask, args=arguments)
            for arguments in ((one, 0, picture), (other, 1, picture.rotate(90)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, replies in got.items():
            assert replies[0].answer.token_ids == alone[number].token_ids and replies[1].from_cache

    def test_who_asked_long_ago_give_up_their_caches(self, shared, picture):
        shared.max_caches = 2
        sessions = [Session(shared, 2) for _ in range(3)]
        for session in sessions:
            answer(session, "what ?", [picture])
        assert [session._conversation.cache_bytes() > 0 for session in sessions] == [False, True, True]
        assert not answer(sessions[0], "and ?").from_cache and answer(sessions[2], "and ?").from_cache

    def test_who_leave_leave_nothing(self, shared, picture):
        sessions = Sessions(shared, 2)
        session = sessions.get("one")
        answer(session, "what ?", [picture])
        cache = weakref.ref(session._conversation._cache)
        gone = weakref.ref(session)
        sessions.close("one")
        sessions.close("nobody")
        del session
        gc.collect()
        assert gone() is None and cache() is None and len(sessions) == 0


class TestStopping:
    @pytest.fixture
    def slow(self, monkeypatch):
        """Every token waits for `slow.set()` once, up to a second."""
        step, put = threading.Event(), chat._Stream.put

        def wait(self, value):
            step.wait(1)
            put(self, value)

        monkeypatch.setattr(chat._Stream, "put", wait)
        return step

    @pytest.mark.parametrize("how", ["stop", "close", "clear"])
    def test_ends_the_answer(self, shared, picture, how):
        session = Session(shared, 200)
        parts = session.ask("what ?", Upload([picture]), shared.start)
        next(parts)
        getattr(session, how)()
        with pytest.raises(Stopped):
            list(parts)
        if how == "close":
            with pytest.raises(Stopped):
                list(session.ask("what ?", Upload([picture]), shared.start))
        else:
            session.max_new_tokens = 3
            session._conversation = None if how == "clear" else session._conversation
            assert not answer(session, "what ?", [picture]).from_cache

    def test_closing_the_iterator_frees_the_model(self, shared, picture):
        session = Session(shared, 200)
        parts = session.ask("what ?", Upload([picture]), shared.start)
        next(parts)
        parts.close()
        assert not shared._lock.locked() and threading.active_count() < 20
        assert answer(Session(shared, 2), "what ?", [picture]).answer.token_ids

    def test_while_others_have_the_model(self, shared, picture, slow):
        first, second = Session(shared, 3), Session(shared, 3)
        running = first.ask("what ?", Upload([picture]), shared.start)
        waiting = second.ask("what ?", Upload([picture]), shared.start)
        failed = []

        def wait():
            try:
                list(waiting)
            except Stopped as error:
                failed.append(error)

        slow.set()
        next(running)
        slow.clear()
        thread = threading.Thread(target=wait)
        thread.start()
        while sum(each.name == WORKER for each in threading.enumerate()) < 2:
            time.sleep(0.01)
        second.stop()
        slow.set()
        assert isinstance([*running][-1], Reply)
        thread.join()
        assert len(failed) == 1 and second.prompt == ""


def test_torch_is_left_as_it_was(shared, picture):
    answer(Session(shared, 2), "what ?", [picture])
    assert not torch.is_inference_mode_enabled() and shared.model.settings == ([3, 1], None)
