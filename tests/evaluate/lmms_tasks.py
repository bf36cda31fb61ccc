"""Tasks for lmms-eval, written by a test, and a local copy of a data set in the format of the real one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import shortv_hf
from shortv_hf.data import scoring, sources


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.json
test_split: test
output_type: generate_until
doc_to_visual: !function utils.{visual}
doc_to_text: !function utils.text
doc_to_target: "answer"
generation_kwargs: {generation}
process_results: !function utils.score
metric_list:
  - metric: right
    aggregation: !function utils.{aggregation}
    higher_is_better: true
metadata:
  - version: 1.0
"""
UTILS = """\
from PIL import Image
from pathlib import Path

def picture(doc):
    return [Image.open(Path(__file__).parent / f"{doc['id']}.png")]

def two(doc):
    return picture(doc) + [Image.new("RGB", (64, 64), "white")]

def none(doc):
    return []

def clip(doc):
    return [str(Path(__file__).parent / "clip.mp4")]

def sound(doc):
    return [{"array": [0.0], "sampling_rate": 8000}]

def text(doc):
    return "<image>\\n" + doc["question"]

def score(doc, results):
    return {"right": {"pred": results[0], "answer": doc["answer"], "score": float(results[0] == doc["answer"])}}

def mean(results):
    return sum(each["score"] for each in results) / len(results)

before = []

def remembering(results):
    before.extend(each["score"] for each in results)
    return sum(before)

def fail(results):
    raise RuntimeError("this task cannot be scored")

def uploaded(results, args):
    Path(args.output_path).mkdir(parents=True, exist_ok=True)
    (Path(args.output_path) / "upload.txt").write_text("\\n".join(each["pred"] for each in results))
    return mean(results)
"""


def launch(arguments: list[str], processes: int, folder: Path) -> subprocess.CompletedProcess:
    """Python with these arguments on several processes of the CPU, in the folder."""
    path = os.pathsep.join([str(Path(shortv_hf.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": path}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def write_tasks(folder: Path, tasks: dict, n: int = 4) -> Path:
    """Tasks by name, each a dict with "visual" (a function of the utils), "generation" and "aggregation"."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "utils.py").write_text(UTILS)
    cases = scoring.held_out_cases(n)
    for number, case in enumerate(cases):
        case.images[0].save(folder / f"{number}.png")
    rows = [{"id": i, "question": case.prompt, "answer": case.answer} for i, case in enumerate(cases)]
    for name, options in tasks.items():
        fields = {"visual": "picture", "aggregation": "mean", "generation": "{max_new_tokens: 8}", **options}
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, **fields))
    return folder


def write_gqa(folder: Path, n: int, name: str = "lmms-lab-encoder/GQA"):
    """A small GQA in `folder`, which `datasets` finds where that is the current directory."""
    import datasets

    repo = folder / name
    repo.mkdir(parents=True)
    cases = list(sources.load_cases("shapes", n))
    pictures = [{"id": str(i), "image": case.images[0]} for i, case in enumerate(cases)]
    questions = [
        {"id": str(i), "imageId": str(n - 1 - i), "question": case.prompt, "answer": case.answer}
        for i, case in enumerate(reversed(cases))
    ]
    features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
    datasets.Dataset.from_list(pictures, features=features).to_parquet(repo / "images.parquet")
    datasets.Dataset.from_list(questions).to_parquet(repo / "instructions.parquet")
    (repo / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: testdev_balanced_images\n  data_files:\n  - split: testdev\n    path: images.parquet\n"
        "- config_name: testdev_balanced_instructions\n  data_files:\n  - split: testdev\n    path: instructions.parquet\n"
        "---\n"
    )
    return cases
