"""Where calibration samples come from: benchmarks on the Hub, a folder of pictures, or the generator of shapes.

    for sample in load_samples("gqa,flickr30k", processor):           # 20 of each, as in Appendix B of the paper
        model(**sample)

A source is one of
    gqa, flickr30k      streamed from the Hub with the `datasets` library (the `calibrate` extra)
    shapes              pictures of coloured shapes with questions; needs nothing
    a folder            pictures and a JSONL file with a line `{"image": "cat.jpg", "prompt": "What is this?"}` per sample
    task:NAME           a task of lmms-eval's (the `eval` extra), as it asks: task:gqa,task:flickr30k_test

Several are a list, or one string with commas; a folder whose name holds a comma is taken whole where it exists.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from . import shapes
from .images import load_image, to_rgb
from .inputs import encode_messages
from .jsonl import numbered_lines, parse_object
from .prompts import check_utf8, user_message
from .video import Video, load_video


# What the Hub calls them now, and what it called them before
GQA = ("lmms-lab-encoder/GQA", "lmms-lab/GQA")
FLICKR30K = ("lmms-lab-encoder/flickr30k", "lmms-lab/flickr30k")
GQA_PROMPT = "{}\nAnswer the question using a single word or phrase."
FLICKR30K_PROMPT = "Provide a one-sentence caption for the provided image."
TASK = "task:"


@dataclass(frozen=True)
class Case:
    """A prompt about pictures, or videos. `answer` is the right one, `type` the kind of question, where the source knows
    them."""

    images: tuple[Image.Image, ...]
    prompt: str
    answer: str | None = None
    type: str | None = None
    videos: tuple[Video, ...] = ()


def load_samples(
    data: str | Sequence[str],
    processor: ProcessorMixin,
    n: int = 20,
    seed: int = 0,
    include_path: str | Path | None = None,
) -> Iterator[dict]:
    """Model inputs, one sample at a time, of every source in `data`; arguments and errors as [`load_cases`]."""
    return (encode(case, processor) for case in load_cases(data, n, seed, include_path))


class Samples:
    """[`load_samples`] that can be gone through several times, without keeping what it yields."""

    def __init__(
        self,
        data: str | Sequence[str],
        processor: ProcessorMixin,
        n: int = 20,
        seed: int = 0,
        include_path: str | Path | None = None,
    ):
        self.cases, self.processor = list(load_cases(data, n, seed, include_path)), processor

    def __len__(self):
        return len(self.cases)

    def __iter__(self) -> Iterator[dict]:
        return (encode(case, self.processor) for case in self.cases)


def load_cases(
    data: str | Sequence[str], n: int = 20, seed: int = 0, include_path: str | Path | None = None
) -> Iterator[Case]:
    """`n` samples, chosen by `seed`, of every source in `data`.

    Args:
        data: names or folders: a list, or one string that separates them by commas. An entry that is a folder is taken
            whole, commas and all.
        include_path: a folder with tasks that lmms-eval does not have.

    Raises:
        ValueError: if a source is unknown, cannot be read or reached, or has fewer than `n` samples.
    """
    if n < 1:
        raise ValueError(f"cannot take {n} samples; the least is 1")

    def source(name: str) -> Callable:
        if name.startswith(TASK):
            return _from_task(name.removeprefix(TASK), include_path)
        return SOURCES.get(name) or _from_folder(name)

    return (case for name in split_sources(data) for case in source(name)(n, seed))


def split_sources(data: str | Sequence[str]) -> list[str]:
    """The names and folders in `data`, as [`load_cases`] takes it. Raises `ValueError` if one is unknown or none there."""
    names = []
    for entry in map(str, [data] if isinstance(data, (str, PathLike)) else data):
        whole = entry.strip() and Path(entry).is_dir()
        names += [entry] if whole else [name.strip() for name in entry.split(",") if name.strip()]
    if not names:
        raise ValueError(f"no data in {data!r}; use {', '.join(SOURCES)}, {TASK}NAME or a folder")
    for name in names:
        if name not in SOURCES and not name.startswith(TASK) and not Path(name).is_dir():
            raise ValueError(
                f"unknown data {name!r}; use {', '.join(SOURCES)}, {TASK}NAME for a task of lmms-eval's, or a folder with "
                "pictures and a JSONL file"
            )
    return names


def encode(case: Case, processor: ProcessorMixin) -> dict:
    """Model inputs of one case, by the processor's chat template."""
    images = [to_rgb(image) for image in case.images]
    message = user_message(case.prompt, images, processor, case.videos)
    # A list for the prompt: LLaVA-OneVision's processor cuts a picture into tiles only where it is the prompt's only one.
    return encode_messages([message], processor, [images] if images else [], case.videos)


def _from_hub(name: str, repos: Sequence[str], stream: Callable) -> Callable:
    """Streams cases of the first of the `repos` that gives any, and says what to do where all fail."""

    def cases(n: int, seed: int) -> Iterator[Case]:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"--data {name} needs the extra: pip install '.[calibrate]' ({error})") from None
        reasons = []
        for repo in repos:
            try:
                found = list(islice(stream(datasets.load_dataset, repo, n, seed), n))
                break
            except Exception as error:  # as many kinds as there are ways not to reach a server
                reasons.append(f"{repo}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        else:
            raise ValueError(
                f"cannot read {name} from the Hub ({'; '.join(reasons)}). Pass a folder with pictures and a JSONL file "
                "of prompts, or --data shapes, instead"
            )
        _require(len(found), n, name)
        yield from found

    return cases


def _stream_gqa(load_dataset: Callable, repo: str, n: int, seed: int) -> Iterator[Case]:
    """Questions and pictures are two configurations: the questions are drawn, then their pictures looked for."""
    questions = load_dataset(repo, "testdev_balanced_instructions", split="testdev", streaming=True)
    chosen = list(questions.shuffle(seed=seed, buffer_size=10_000).take(n))
    pictures, missing = {}, {row["imageId"] for row in chosen}
    for row in load_dataset(repo, "testdev_balanced_images", split="testdev", streaming=True):
        if row["id"] in missing:
            pictures[row["id"]] = to_rgb(row["image"])
            missing.remove(row["id"])
        if not missing:
            break
    for row in chosen:
        yield Case((pictures[row["imageId"]],), GQA_PROMPT.format(row["question"]), row["answer"])


def _stream_flickr30k(load_dataset: Callable, repo: str, n: int, seed: int) -> Iterator[Case]:
    rows = load_dataset(repo, split="test", streaming=True)
    for row in rows.shuffle(seed=seed, buffer_size=10 * n).take(n):
        yield Case((to_rgb(row["image"]),), FLICKR30K_PROMPT)


def _shapes(n: int, seed: int) -> Iterator[Case]:
    """Questions about scenes, from seeds that neither the demonstration model's training nor its test uses."""
    if not 0 <= seed < 500:
        raise ValueError(f"seed is {seed}; for shapes, 0 to 499 are valid: the others are of other data")
    first = shapes.HELD_OUT_SEED // 2 + seed * 1_000_000
    for index in range(first, first + n):
        rng = random.Random(index)
        scene = shapes.make_scene(rng)
        question = shapes.questions(scene, rng, 1)[0]
        yield Case((shapes.draw(scene),), question.text, question.answer, question.type)


def _from_task(name: str, include_path: str | Path | None) -> Callable:
    """Questions of a task of lmms-eval's, drawn over all of a group's tasks. What a question holds beside text comes before
    its text, as in LLaVA's prompts."""

    def cases(n: int, seed: int) -> Iterator[Case]:
        from ..evaluate.tasks import documents, load_tasks  # not everybody has lmms-eval

        _, tasks = load_tasks([name], include_path)
        numbered = [(task, i) for task in tasks.values() for i in range(len(documents(task)))]
        _require(len(numbered), n, f"{TASK}{name}")
        for task, i in random.Random(seed).sample(numbered, n):
            yield _of_task(task, documents(task)[i])

    return cases


def _of_task(task: Any, doc: dict) -> Case:
    from ..evaluate.dialogue import PLACEHOLDER

    parts = [part for message in task.doc_to_messages(doc) for part in message["content"]]
    of = {kind: [part for part in parts if part["type"] == kind] for kind in ("image", "video", "text")}
    if len(parts) != sum(map(len, of.values())):
        raise ValueError(f"task {task.config.task} asks about more than text, pictures and videos")
    prompt = "\n".join(PLACEHOLDER.sub("", part["text"]) for part in of["text"])
    answer = task.doc_to_target(doc)
    return Case(
        tuple(to_rgb(part["url"]) for part in of["image"]),
        prompt,
        answer if isinstance(answer, str) else None,
        str(task.config.task),
        tuple(load_video(part["url"]) for part in of["video"]),
    )


def _from_folder(folder: str) -> Callable:
    def cases(n: int, seed: int) -> Iterator[Case]:
        files = sorted(Path(folder).glob("*.jsonl"))
        if len(files) != 1:
            raise ValueError(f"{folder} holds {len(files)} .jsonl files; it needs exactly one, with the prompts")
        numbered = numbered_lines(files[0].read_bytes())
        _require(len(numbered), n, folder)
        yield from [_read_line(files[0], *chosen) for chosen in random.Random(seed).sample(numbered, n)]

    return cases


def _read_line(file: Path, number: int, line: bytes) -> Case:
    """The case in a line of a JSONL file. Raises `ValueError` that names the file and the line, counted from 1."""
    try:
        return _read_case(file.parent, line)
    except ValueError as error:
        raise ValueError(f"{file}, line {number}: {error}") from None


def _read_case(folder: Path, line: bytes) -> Case:
    row = parse_object(line, '{"image": "cat.jpg", "prompt": "What is this?"}')
    for key in ("image", "prompt"):
        if key not in row:
            raise ValueError(f'it lacks "{key}"')
    names = [row["image"]] if isinstance(row["image"], str) else row["image"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'"image" is {json.dumps(row["image"])}, not the name of a file or a list of names')
    prompt, answer = row["prompt"], row.get("answer")
    if not isinstance(prompt, str):
        raise ValueError(f'"prompt" is {json.dumps(prompt)}, not a text')
    check_utf8(prompt)
    images = tuple(load_image(folder / name) for name in names)
    return Case(images, prompt, None if answer is None else str(answer))


def _require(available: int, n: int, name: str):
    if available < n:
        advice = f"; --samples {available} (n={available} in Python) takes all" if available else ""
        raise ValueError(f"{name} has only {available} samples, {n} were asked for{advice}")


SOURCES = {
    "gqa": _from_hub("gqa", GQA, _stream_gqa),
    "flickr30k": _from_hub("flickr30k", FLICKR30K, _stream_flickr30k),
    "shapes": _shapes,
}
