"""One model, several threads: each gets what it would get alone."""

import contextvars
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread

import pytest
import torch
from helpers import FAMILIES, IMAGE_TOKEN, make_inputs, make_model


THREADS = 4
REDUCTIONS = {
    "llava": [
        None,
        {"method": "fastv", "k": 2},
        {"method": "vtw", "k": 2},
        {"method": "vtc_cls", "layer": 1, "token_num": 6},
        {"method": "prumerge"},
        {"method": "prumerge_plus"},
        {"method": "random", "token_num": 6},
        {"method": "downsample", "factor": 2},
    ],
    "llava_next": [None, {"method": "fastv", "k": 2}, {"method": "vtc_cls", "layer": 1, "token_num": 6}],
}
CASES = [(family, reduction) for family in FAMILIES for reduction in REDUCTIONS[family]]


def together(function, jobs):
    """`function(job)` of all jobs, `THREADS` at a time and starting at the same time."""
    barrier = Barrier(THREADS)

    def start(chunk):
        barrier.wait()
        return [function(job) for job in chunk]

    with ThreadPoolExecutor(THREADS) as pool:
        chunks = list(pool.map(start, [jobs[i::THREADS] for i in range(THREADS)]))
    return [chunks[i % THREADS][i // THREADS] for i in range(len(jobs))]


def generate(model, inputs):
    options = {"do_sample": False, "suppress_tokens": [IMAGE_TOKEN], "eos_token_id": -1}
    return model.generate(**inputs, max_new_tokens=3, **options)


@pytest.mark.parametrize(("family", "reduction"), CASES, ids=str)
def test_forward_and_generate(family, reduction):
    model = make_model(family, visual_reduction=reduction, shortv_layers=[1])
    jobs = [make_inputs(model, ["tIt"], seed=seed) for seed in range(4)] * 6
    with torch.no_grad():
        right = [model(**job).logits for job in jobs[:4]]
        right_ids = [generate(model, job) for job in jobs[:4]]

    def both(job):
        with torch.no_grad():  # a setting of the thread
            return model(**job).logits, generate(model, job)

    for i, (logits, ids) in enumerate(together(both, jobs)):
        torch.testing.assert_close(logits, right[i % 4], atol=1e-5, rtol=1e-5)
        assert torch.equal(ids, right_ids[i % 4])


def test_using_is_seen_by_its_own_thread_only():
    model = make_model(shortv_layers=[1])
    inputs = make_inputs(model, ["ttItt"])
    settings = [{}] + [
        {"shortv_layers": layers, "visual_reduction": reduction}
        for layers in ([], [0, 3])
        for reduction in REDUCTIONS["llava"][:4]
    ]

    def run(setting):
        with torch.no_grad(), model.using(**setting):
            return model(**inputs).logits

    right = [run(setting) for setting in settings]
    assert all(not torch.equal(right[0], other) for other in right[1:])
    jobs = list(range(len(settings))) * 8
    for job, logits in zip(jobs, together(lambda job: run(settings[job]), jobs), strict=True):
        torch.testing.assert_close(logits, right[job], atol=1e-5, rtol=1e-5)


class TestUsing:
    def test_for_a_while(self):
        model = make_model(shortv_layers=[1], visual_reduction={"method": "vtw", "k": 2})
        before = model.settings
        with model.using(shortv_layers=[2]) as same:
            assert same is model and model.model.settings == ([2], {"method": "vtw", "k": 2})
            with model.using(visual_reduction=None):
                assert model.settings == ([2], None)
            assert model.settings == ([2], {"method": "vtw", "k": 2})
        assert model.settings == before == (model.config.shortv_layers, model.config.visual_reduction)

    def test_equals_setting(self):
        model = make_model(shortv_layers=[1])
        inputs = make_inputs(model, ["ttItt", "tIt"])
        for layers, reduction in (([], None), ([0, 2], {"method": "fastv", "k": 2})):
            with torch.no_grad(), model.using(shortv_layers=layers, visual_reduction=reduction):
                actual = model(**inputs).logits
            set_model = make_model(shortv_layers=layers, visual_reduction=reduction)
            with torch.no_grad():
                assert torch.equal(actual, set_model(**inputs).logits)

    def test_restored_after_an_error(self):
        model = make_model(shortv_layers=[1])
        with pytest.raises(RuntimeError), model.using(shortv_layers=[]):
            raise RuntimeError
        assert model.settings == ([1], None)

    @pytest.mark.parametrize("setting", [{"shortv_layers": [9]}, {"visual_reduction": {"method": "best"}}], ids=str)
    def test_validates(self, setting):
        model = make_model(shortv_layers=[1])
        with pytest.raises(ValueError), model.using(**setting):
            pass
        assert model.settings == ([1], None)

    def test_other_models_and_new_threads_are_not_concerned(self):
        model, other, seen = make_model(shortv_layers=[1]), make_model(shortv_layers=[3]), []
        with model.using(shortv_layers=[]):
            thread = Thread(target=lambda: seen.append(model.settings))
            thread.start()
            thread.join()
            assert other.settings == ([3], None)
        assert seen == [([1], None)]

    def test_a_block_that_has_ended_does_not_count(self):
        """A task inherits the context in which it is made, and can outlive the block."""
        model, other = make_model(shortv_layers=[1]), make_model()
        with model.using(shortv_layers=[0, 3]):
            context = contextvars.copy_context()
            assert context.run(lambda: model.settings) == ([0, 3], None)
        with other.using(shortv_layers=[]):
            assert context.run(lambda: model.settings) == ([1], None)

    def test_saved_config_is_the_set_one(self, tmp_path):
        model = make_model(shortv_layers=[1])
        with model.using(shortv_layers=[]):
            model.save_pretrained(tmp_path)
        assert type(model.config).from_pretrained(tmp_path).shortv_layers == [1]
