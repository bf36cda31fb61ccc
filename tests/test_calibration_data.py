"""Calibration samples: the real `datasets` library on local data sets, folders, the generator."""

import io
import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from processor_files import write_processor
from transformers import AutoProcessor

from shortv_hf import calibration_data
from shortv_hf.calibration_data import Case, load_cases, load_samples


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ('{"image": "0.png"}', "prompt"),
        ('{"image": "missing.png", "prompt": ""}', "missing.png"),
        ('{"image": "prompts.jsonl", "prompt": ""}', "line 2"),
    ],
)
def test_folder_with_faults(folder, line, message):
    (folder / "prompts.jsonl").write_text('{"image": "0.png", "prompt": "w1"}\n' + line)
    with pytest.raises(ValueError, match=message):
        list(load_cases(str(folder), n=2))


def test_bad_requests(folder):
    with pytest.raises(ValueError, match="only 7 samples, 8"):
        list(load_cases(str(folder), n=8))
    (folder / "more.jsonl").write_text("")
    with pytest.raises(ValueError, match="2 .jsonl files"):
        list(load_cases(str(folder), n=1))
    with pytest.raises(ValueError, match="unknown data 'vqav2'; use gqa, flickr30k, shapes"):
        load_cases("shapes,vqav2")
    with pytest.raises(ValueError, match="no data"):
        load_cases(" , ")
    with pytest.raises(ValueError, match="0 samples"):
        load_cases("shapes", n=0)


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


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
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
    monkeypatch.setattr(calibration_data, "GQA", write_dataset(tmp_path / "gqa", gqa))
    monkeypatch.setattr(calibration_data, "FLICKR30K", write_dataset(tmp_path / "flickr30k", flickr))
    # images are stored as {bytes, path}; the Hub's data sets carry the type in their metadata
    load = datasets.load_dataset

    def typed(*args, **kwargs):
        rows = load(*args, **kwargs)
        return rows.cast_column("image", datasets.Image()) if "image" in rows.features else rows

    monkeypatch.setattr(datasets, "load_dataset", typed)


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


def test_unreachable_hub_says_what_to_do():
    code = "from shortv_hf.calibration_data import load_cases; list(load_cases('gqa'))"
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
