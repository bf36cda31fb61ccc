"""lmms-eval with this package's model: in process, on several processes, on the real task `gqa`."""

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from lmms_tasks import launch, write_gqa, write_tasks
from test_family_tools import checkpoint
from video_files import write_video

import shortv_hf
from shortv_hf.data import scoring
from shortv_hf.data.sources import Case, encode
from shortv_hf.data.video import load_video
from shortv_hf.hub import load
from shortv_hf.hub.loading import demo_model


pytest.importorskip("lmms_eval")
from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.evaluator import simple_evaluate  # noqa: E402

from shortv_hf.evaluate.lmms_eval import ShortV, _cut, _keys  # noqa: E402
from shortv_hf.evaluate.tasks import task_manager  # noqa: E402


ROOT = Path(shortv_hf.__file__).parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def demo():
    return ShortV(demo_model(), dtype="float32", device="cpu", batch_size=10, profiled_batches=1)


def evaluate(model, tasks, include_path=None, **options):
    manager = task_manager(tasks, include_path)
    return simple_evaluate(model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)


def answers(found, task):
    return [sample["filtered_resps"][0] for sample in found["samples"][task]]


def test_batches_give_the_answers_of_single_questions(demo):
    demo.batch_size = 10
    together = evaluate(demo, ["shapes"], limit=21)
    demo.batch_size = 1
    alone = evaluate(demo, ["shapes"], limit=21)
    cases = scoring.held_out_cases(21)
    expected = scoring.answer(demo.model, demo.processor, cases, batch_size=7)
    assert answers(together, "shapes") == answers(alone, "shapes") == expected
    right = scoring.accuracy(expected, cases)["overall"]
    assert together["results"]["shapes"]["exact_match,none"] == pytest.approx(right)
    figures = together["throughput"]
    assert figures["avg_kv_ratio"] == 1 and 0.5 < figures["avg_flops_ratio"] < 0.6
    assert figures["avg_first_token_s"] > 0 and figures["total_gen_tokens"] >= 42
    assert together["efficiency"]["by_task"]["shapes"]["docs_with_token_counts"] == 21


def test_a_batch_of_several_tasks(demo, tmp_path):
    """Each question by its own task; options, of which `until`, by task; nothing of them is changed."""
    tasks = write_tasks(
        tmp_path,
        {
            "one": {},
            "pair": {"visual": "two", "generation": "{max_new_tokens: 8, until: [r, '\\n\\n'], temperature: 0.5}"},
            "short": {"generation": "{max_new_tokens: 1, num_beams: 2}"},
            "blind": {"visual": "none"},
        },
    )
    demo.batch_size = 16
    found = evaluate(demo, ["one", "pair", "short", "blind"], tasks)
    cases = scoring.held_out_cases(4)
    white = Case((scoring.to_rgb(tasks_picture("white")),), "")
    of = {
        "one": scoring.answer(demo.model, demo.processor, cases),
        "pair": [
            text.split("r")[0].strip()
            for text in scoring.answer(
                demo.model, demo.processor, [Case((*case.images, *white.images), case.prompt) for case in cases]
            )
        ],
        "blind": scoring.answer(demo.model, demo.processor, [Case((), case.prompt) for case in cases]),
    }
    for task, expected in of.items():
        assert answers(found, task) == expected, task
    assert all(len(sample["filtered_resps"][0].split()) <= 1 for sample in found["samples"]["short"])
    assert found["configs"]["pair"]["generation_kwargs"]["until"][0] == "r"
    assert len(demo.model.config.shortv_layers) == 8  # lmms.clean() has not taken the model away


def tasks_picture(color):
    from PIL import Image

    return Image.new("RGB", (64, 64), color)


@pytest.mark.once
@pytest.mark.parametrize(
    ("text", "until", "answer"),
    [
        ("\n\nA", ["\n\n"], "A"),  # which lmms-eval puts where a task names nothing
        ("Let me think.\n\nIt is B", None, "Let me think.\n\nIt is B"),
        (" no ASSISTANT: yes", ["ASSISTANT:"], "no"),
        ("a b c", ["c", "b"], "a"),
        ("a", "", "a"),
    ],
)
def test_where_an_answer_ends(text, until, answer):
    assert _cut(text, until) == answer


@pytest.mark.once
def test_what_is_asked_several_times_is_told_apart():
    about = ({"task": "t", "doc_id": number, "repeats": 3} for number in (1, 2))
    one, other = (Instance("generate_until", (), 0, metadata=each) for each in about)
    assert _keys([one, one, other, one]) == ["t 1 0 0", "t 1 0 1", "t 2 0 0", "t 1 0 2"]


MODEL_ARGS = [
    ({}, 8, None),
    ({"layers": "31-2"}, "layer", None),
    ({"layers": ""}, 0, None),
    ({"layers": "[11,10]", "reduction": '{"method":"fastv","k":2,"ratio":0.5}'}, 2, "fastv"),
    ({"layers": 11, "reduction": '"fastv:k=2,ratio=0.5"'}, 1, "fastv"),
]


@pytest.mark.parametrize(("given", "n", "method"), MODEL_ARGS)
def test_model_arguments(given, n, method):
    """As lmms-eval's own parser hands them on."""
    text = ",".join([f"pretrained={demo_model()}", "dtype=float32", *(f"{k}={v}" for k, v in given.items())])
    if n == "layer":
        with pytest.raises(ValueError, match="31"):
            ShortV.create_from_arg_string(text, {"device": "cpu", "batch_size": 1, "max_batch_size": None})
        return
    made = ShortV.create_from_arg_string(text, {"device": "cpu", "batch_size": 1, "max_batch_size": None})
    assert len(made.model.config.shortv_layers) == n
    assert (made.model.config.visual_reduction or {}).get("method") == method
    assert made.model.dtype == torch.float32 and repr(made) == f"ShortV({demo_model()!r})"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    """Pictures, several of them, and videos of families that see them: batched answers are those of the model alone."""
    base = checkpoint(tmp_path / family, family)
    names = {"one": {}, "pair": {"visual": "two"}, "clip": {"visual": "clip"}, "blind": {"visual": "none"}}
    tasks = write_tasks(
        tmp_path / "tasks", {name: {**each, "generation": "{max_new_tokens: 3}"} for name, each in names.items()}, n=2
    )
    write_video(tmp_path / "tasks" / "clip.mp4", 6)
    plugin = ShortV(
        str(base), layers="[2,1]", dtype="float32", device="cpu", batch_size=3, max_frames=2, profiled_batches=1
    )
    sees = "video" in shortv_hf.upstream.visual_token_ids(plugin.config)
    asked = [name for name in names if sees or name != "clip"]
    found = evaluate(plugin, asked, tasks)
    cases = scoring.held_out_cases(2)
    clip = load_video(tmp_path / "tasks" / "clip.mp4", 2)
    for name in asked:
        for number, case in enumerate(cases):
            images = {"one": case.images, "pair": (*case.images, tasks_picture("white"))}.get(name, ())
            inputs = encode(Case(images, case.prompt, videos=(clip,) if name == "clip" else ()), plugin.processor)
            new = plugin.model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            assert answers(found, name)[number] == plugin.processor.decode(new[0], skip_special_tokens=True).strip()
    assert found["throughput"]["avg_flops_ratio"] < 1


@pytest.mark.once
def test_what_is_not_answered_is_an_error(demo, tmp_path):
    tasks = write_tasks(tmp_path, {"heard": {"visual": "sound"}})
    with pytest.raises(ValueError, match="heard, document 0: a question holds "):
        evaluate(demo, ["heard"], tasks)
    for answer in (demo.loglikelihood, demo.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="shortv answers tasks of the output type generate_until"):
            answer([])
    with pytest.raises(ValueError, match="no such directory"):
        ShortV("/nonexistent")


@pytest.mark.once
def test_two_processes_by_the_command(tmp_path):
    """The entry point, two processes that share the questions, figures of both in lmms-eval's own table and file."""
    include = str(ROOT / "shortv_hf" / "evaluate" / "tasks")
    model_args = f"pretrained={demo_model()},dtype=float32,profiled_batches=1"
    options = ["--tasks", "shapes", "--include_path", include, "--batch_size", "4", "--limit", "9", "--log_samples"]
    command = ["-m", "lmms_eval", "--model", "shortv", "--model_args", model_args, *options, "--output_path", "out"]
    done = launch(command, 2, tmp_path)
    assert "avg_first_token_s" in done.stdout, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("*_results.json")
    results = json.loads(file.read_text())
    (samples,) = (tmp_path / "out").rglob("*_samples_shapes.jsonl")
    documents = [json.loads(line)["doc_id"] for line in samples.read_text().splitlines()]
    assert sorted(documents) == list(range(9))
    cases = scoring.held_out_cases(9)
    model, processor = load(demo_model(), dtype="float32", device="cpu")
    right = scoring.accuracy(scoring.answer(model, processor, cases), cases)["overall"]
    assert results["results"]["shapes"]["exact_match,none"] == pytest.approx(right)
    assert 0.5 < results["throughput"]["avg_flops_ratio"] < 0.6
    assert 18 <= results["throughput"]["total_gen_tokens"] <= 40  # two or more each, none counted twice


@pytest.mark.once
@pytest.mark.parametrize("name", ["lmms-lab-encoder/GQA", "lmms-lab/GQA"])
def test_the_real_gqa_on_a_small_copy(demo, tmp_path, monkeypatch, name):
    """Its own prompt, filters and figure; under the name that the data set has now, or had."""
    from shortv_hf.evaluate.tasks import load_tasks

    monkeypatch.chdir(tmp_path)
    cases = write_gqa(tmp_path, 6, name)
    manager, tasks = load_tasks(["gqa"])
    demo.batch_size = 4
    found = simple_evaluate(demo, tasks=list(tasks.values()), task_manager=manager, bootstrap_iters=0)
    prompt = "{}\nAnswer the question using a single word or phrase."
    asked = [Case(case.images, prompt.format(case.prompt), case.answer) for case in reversed(cases)]
    expected = scoring.answer(demo.model, demo.processor, asked, max_new_tokens=16)
    assert answers(found, "gqa") == expected
    right = sum(text.lower() == case.answer for text, case in zip(expected, asked, strict=True)) / 6
    assert found["results"]["gqa"]["exact_match,none"] == pytest.approx(right)
