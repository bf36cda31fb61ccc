"""What is shown where after a click; without a browser."""

import pytest
from PIL import Image

from shortv_hf.chat import comparison
from shortv_hf.web.actions import Actions, failure, said_by
from shortv_hf.web.session import Sessions


OPTIONS = {"vtw": ["k"], "random": ["token_num", "seed"]}
FROZEN = (2, "none", "2", 6, 0)


@pytest.fixture
def actions(shared, monkeypatch):
    monkeypatch.setattr(comparison, "MAX_ROUNDS", 1)
    return Actions(Sessions(shared, 3), OPTIONS)


@pytest.fixture
def file(picture, tmp_path):
    picture.save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def ask(actions, text="what ?", files=(), history=(), compare=False, controls=FROZEN):
    """All that was shown in the end."""
    shown = {}
    for found in actions.ask("me", {"text": text, "files": list(files)}, list(history), compare, controls):
        shown |= found
    return shown


def test_controls_are_those_of_the_chosen_method(actions):
    assert actions.chosen(1, "random", "2", 6, 3).reduction == {"method": "random", "token_num": 6, "seed": 3}
    assert actions.chosen(1, "vtw", "2", 6, 3).reduction == {"method": "vtw", "k": 2}


def test_an_answer_its_chart_and_the_comparison(actions, file):
    shown = ask(actions, files=[file], compare=True)
    assert [each["role"] for each in shown["chat"]] == ["user", "user", "assistant"]
    assert "16 of them visual" in shown["status"] and "2 of 4 layers" in shown["layers_text"]
    assert shown["box"] is None and shown["patches"] is None and "<table" in shown["costs"]
    shown = ask(actions, files=[], history=shown["chat"], controls=(2, "vtw", "2", 6, 0))
    assert len(shown["chat"]) == 5 and isinstance(shown["patches"], Image.Image)


@pytest.mark.parametrize("controls", [(9, "none", "2", 6, 0), (1, "vtw", "99", 6, 0)])
def test_bad_settings_keep_the_question(actions, file, controls):
    shown = ask(actions, "why ?", [file], controls=controls)
    assert 'role="alert"' in shown["status"] and shown["box"] == {"text": "why ?", "files": [file]}
    assert set(actions.changed("me", controls)) == {"status", "layers_text"}
    assert 'role="alert"' in list(actions.compare("me", controls))[-1]["status"]


def test_refused_files_are_left_out_of_the_next_try(actions, tmp_path):
    (tmp_path / "no.png").write_text("no picture")
    shown = ask(actions, "why ?", [tmp_path / "no.png"])
    assert shown["box"] == {"text": "why ?", "files": []} and shown["chat"] == []


def test_a_conversation_that_was_lost(actions, file):
    shown = ask(actions, files=[file])
    actions.sessions.close("me")
    shown = ask(actions, history=shown["chat"])
    assert "was lost" in shown["status"] and len(shown["chat"]) == 2


def test_comparing_again_and_starting_anew(actions, file):
    assert "ask something first" in list(actions.compare("me", FROZEN))[-1]["status"]
    ask(actions, files=[file])
    assert "Compared" in list(actions.compare("me", FROZEN))[-1]["status"]
    assert actions.start_anew("me")["chat"] == []
    assert "ask something first" in list(actions.compare("me", FROZEN))[-1]["status"]


def test_what_is_said_is_text():
    assert said_by("user", "<b>\n&")["content"] == "&lt;b&gt;<br>&amp;"
    assert "<b>" not in failure(ValueError("<b>"))
