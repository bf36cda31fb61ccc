"""Calibration samples: the real `datasets` library on local data sets, folders, the generator."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processor_files import write_processor
from transformers import AutoProcessor

from shortv_hf.data import sources as calibration_data
from shortv_hf.data.sources import Case, Samples, load_cases, load_samples


pytestmark = pytest.mark.once


@pytest.fixture
def folder(tmp_path):
    lines = []
    for number in range(6):
        Image.new("L", (20, 10), 40 * number).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "prompt": f"w{number}"}))
    lines.append(json.dumps({"image": ["0.png", "1.png"], "prompt": "w7", "answer": "w8"}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path


def test_folder(folder):
    cases = list(load_cases(str(folder), n=7, seed=1))
    assert sorted(case.prompt for case in cases) == ["w0", "w1", "w2", "w3", "w4", "w5", "w7"]
    two = next(case for case in cases if case.prompt == "w7")
    assert len(two.images) == 2 and two.answer == "w8"
    assert all(image.mode == "RGB" for case in cases for image in case.images)
    assert [c.prompt for c in load_cases(str(folder), 3, 1)] == [c.prompt for c in load_cases(str(folder), 3, 1)]
    assert len({tuple(c.prompt for c in load_cases(str(folder), 3, seed)) for seed in range(8)}) > 3


FAULTS = {
    "{": "it is no JSON: Expecting property name",
    "[]": "it is no object such as",
    "3": "it is no object such as",
    '"0.png"': "it is no object such as",
    '{"image": "0.png"}': 'it lacks "prompt"',
    '{"prompt": ""}': 'it lacks "image"',
    '{"image": 3, "prompt": ""}': '"image" is 3, not the name of a file or a list of names',
    '{"image": null, "prompt": ""}': '"image" is null',
    '{"image": ["0.png", 1], "prompt": ""}': '"image" is ["0.png", 1]',
    '{"image": "0.png", "prompt": null}': '"prompt" is null, not a text',
    '{"image": "0.png", "prompt": "\\ud800"}': "the prompt is not valid UTF-8 at character 1",
    '{"image": "missing.png", "prompt": ""}': "missing.png: no such file",
    '{"image": "../missing.png", "prompt": ""}': "../missing.png: no such file",
    '{"image": "http://127.0.0.1:9/a.png", "prompt": ""}': "a.png: no such file",
    '{"image": "", "prompt": ""}': "it is a directory",
    '{"image": "prompts.jsonl", "prompt": ""}': "prompts.jsonl: it is no picture",
    '{"image": "0.png", "prompt": "\udcff"}': "it is not valid UTF-8 at byte 31",
}


@pytest.mark.parametrize("line", FAULTS, ids=ascii)
@pytest.mark.parametrize("first", ["", "\ufeff", "\n \n\r\n"], ids=["", "BOM", "blank lines"])
def test_folder_with_faults(folder, first, line):
    """The error is one line with the file, the line in the file and what is wrong."""
    good = '{"image": "0.png", "prompt": "w1\u2028\u0085w2"}\r\n'
    file = folder / "prompts.jsonl"
    file.write_bytes((first + good + line).encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as caught:
        list(load_cases(str(folder), n=2))
    assert str(caught.value).startswith(f"{file}, line {2 + first.count(chr(10))}: ")
    assert FAULTS[line] in str(caught.value) and "\n" not in str(caught.value)


def test_only_line_feeds_end_lines(folder):
    prompts = [f"w1{end}w2" for end in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"]
    lines = [json.dumps({"image": "0.png", "prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (folder / "prompts.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert sorted(case.prompt for case in load_cases(str(folder), n=len(prompts))) == sorted(prompts)


def test_bad_requests(folder):
    with pytest.raises(ValueError, match="only 7 samples, 8 were asked for; --samples 7 .* takes all"):
        list(load_cases(str(folder), n=8))
    (folder / "prompts.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="only 0 samples, 8 were asked for$"):
        list(load_cases(str(folder), n=8))
    (folder / "more.jsonl").write_text("")
    with pytest.raises(ValueError, match="2 .jsonl files"):
        list(load_cases(str(folder), n=1))
    with pytest.raises(ValueError, match="unknown data 'vqav2'; use gqa, flickr30k, shapes"):
        load_cases("shapes,vqav2")
    for nothing in (" , ", "", [], ["", " ,"]):
        with pytest.raises(ValueError, match="no data"):
            load_cases(nothing)
    with pytest.raises(ValueError, match="0 samples"):
        load_cases("shapes", n=0)


@pytest.fixture
def two_folders(folder):
    """Folders with a comma and without, and what their only prompts are."""
    for name, prompt in (("red, green", "comma"), ("red", "red"), ("green", "green")):
        (folder / name).mkdir()
        Image.new("L", (4, 4)).save(folder / name / "a.png")
        (folder / name / "a.jsonl").write_text(json.dumps({"image": "a.png", "prompt": prompt}))
    return folder


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("red, green", ["comma"]),
        ("green ,red", ["green", "red"]),
        (["red, green"], ["comma"]),
        (("red", "red, green"), ["red", "comma"]),
        (["green,red", Path("red, green")], ["green", "red", "comma"]),
        (Path("red, green"), ["comma"]),
    ],
    ids=str,
)
def test_lists_and_commas(two_folders, monkeypatch, data, expected):
    monkeypatch.chdir(two_folders)
    assert [case.prompt for case in load_cases(data, n=1)] == expected
    processor = AutoProcessor.from_pretrained(write_processor(two_folders / "processor"))
    assert len(list(load_samples(data, processor, n=1))) == len(Samples(data, processor, n=1)) == len(expected)


def test_lists_of_sources_are_checked_before_one_is_read(two_folders, monkeypatch):
    monkeypatch.chdir(two_folders)
    for data in (["red", "blue"], "red,blue", ["red, green, blue"]):
        with pytest.raises(ValueError, match="unknown data 'blue'"):
            load_cases(data, n=1)


def test_shapes():
    cases = list(load_cases("shapes", n=5, seed=2))
    assert cases == list(load_cases("shapes", n=5, seed=2)) != list(load_cases("shapes", n=5, seed=3))
    assert all(isinstance(case, Case) and case.answer for case in cases)


def test_samples_are_model_inputs(folder, tmp_path):
    write_processor(tmp_path / "processor")
    processor = AutoProcessor.from_pretrained(tmp_path / "processor")
    samples = list(load_samples(f"{folder},shapes", processor, n=2))
    assert len(samples) == 4
    for sample in samples:
        assert sample["input_ids"].shape == sample["attention_mask"].shape and len(sample["input_ids"]) == 1
        assert sample["pixel_values"].ndim == 4


# ----------------------------------------------------------------------------------- benchmarks, by `datasets` itself


def write_dataset(folder, configs):
    """A data set folder as on the Hub: `configs` is {config: (split, rows)}."""
    import datasets

    entries = []
    for name, (split, rows) in configs.items():
        (folder / name).mkdir(parents=True)
        for part in range(2):
            datasets.Dataset.from_list(rows[part::2]).to_parquet(folder / name / f"{split}-{part}.parquet")
        entries.append({"config_name": name, "data_files": [{"split": split, "path": f"{name}/{split}-*.parquet"}]})
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(entries)}\n---\n")
    return str(folder)


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(params=[0, 1], ids=["new names", "old names"])
def benchmarks(request, tmp_path, monkeypatch):
    """The Hub, on which the data sets have only one of their names."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # 5 s per stream
    questions = [{"imageId": f"i{n % 10}", "question": f"q{n}?", "answer": f"a{n}"} for n in range(40)]
    pictures = [{"id": f"i{n}", "image": png(20 * n)} for n in range(10)]
    gqa = {
        "testdev_balanced_instructions": ("testdev", questions),
        "testdev_balanced_images": ("testdev", pictures),
    }
    flickr = {"default": ("test", [{"image": png(10 * n), "caption": ["c"]} for n in range(20)])}
    hub = {
        ("lmms-lab-encoder/GQA", "lmms-lab/GQA")[request.param]: write_dataset(tmp_path / "gqa", gqa),
        ("lmms-lab-encoder/flickr30k", "lmms-lab/flickr30k")[request.param]: write_dataset(tmp_path / "f", flickr),
    }
    # images are stored as {bytes, path}; the Hub's data sets carry the type in their metadata
    load = datasets.load_dataset

    def typed(name, *args, **kwargs):
        if name not in hub:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.\nTry another.")
        rows = load(hub[name], *args, **kwargs)
        return rows.cast_column("image", datasets.Image()) if "image" in rows.features else rows

    monkeypatch.setattr(datasets, "load_dataset", typed)
    return hub


def test_gqa_and_flickr30k(benchmarks):
    cases = list(load_cases("gqa,flickr30k", n=5, seed=3))
    assert len(cases) == 10
    for case in cases[:5]:
        question, instruction = case.prompt.split("\n")
        number = int(question[1:-1])
        assert instruction.startswith("Answer the question") and case.answer == f"a{number}"
        assert case.images[0].getpixel((0, 0)) == (20 * (number % 10),) * 3
    assert {case.prompt for case in cases[5:]} == {calibration_data.FLICKR30K_PROMPT}
    again = list(load_cases("gqa,flickr30k", n=5, seed=3))
    assert [c.prompt for c in again] == [c.prompt for c in cases]
    assert [c.prompt for c in load_cases("gqa", n=5, seed=4)] != [c.prompt for c in cases[:5]]


@pytest.mark.parametrize("name", ["gqa", "flickr30k"])
def test_both_names_are_in_the_error(benchmarks, name):
    benchmarks.clear()
    with pytest.raises(ValueError) as caught:
        list(load_cases(name, n=1))
    repo = name if name == "flickr30k" else "GQA"
    for owner in ("lmms-lab-encoder", "lmms-lab"):
        assert f"{owner}/{repo}: DatasetNotFoundError: Dataset '{owner}/{repo}' doesn't exist" in str(caught.value)
    assert "\n" not in str(caught.value) and "--data shapes" in str(caught.value)


def test_pictures_of_the_hub_are_read_by_the_rules(benchmarks, monkeypatch):
    """16 bits are scaled, and what has no known values is an error."""
    import datasets

    wide = Image.fromarray(np.full((2, 2), 0x8080, "<u2"))
    rows = datasets.IterableDataset.from_generator(lambda: iter([{"image": wide}]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    assert next(load_cases("flickr30k", n=1)).images[0].getpixel((0, 0)) == (128, 128, 128)
    floats = datasets.IterableDataset.from_generator(lambda: iter([{"image": wide.convert("F")}]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: floats)
    with pytest.raises(ValueError, match="cannot read flickr30k.*floating-point numbers"):
        list(load_cases("flickr30k", n=1))


def test_unreachable_hub_says_what_to_do():
    code = "from shortv_hf.data import load_cases; list(load_cases('gqa'))"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_DATASETS_OFFLINE": "1",
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: cannot read gqa from the Hub"), result.stderr
    assert "folder" in last and "shapes" in last
