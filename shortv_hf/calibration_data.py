"""Where calibration samples come from: benchmarks on the Hub, a folder of pictures, or the generator of shapes.

    for sample in load_samples("gqa,flickr30k", processor):           # 20 of each, as in Appendix B of the paper
        model(**sample)

A source is one of
    gqa, flickr30k      streamed from the Hub with the `datasets` library (the `calibrate` extra)
    shapes              pictures of coloured shapes with questions; needs nothing
    a folder            pictures and a JSONL file with a line `{"image": "cat.jpg", "prompt": "What is this?"}` per sample
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image, ImageOps
from transformers import ProcessorMixin

from . import shapes


GQA, FLICKR30K = "lmms-lab/GQA", "lmms-lab/flickr30k"
GQA_PROMPT = "{}\nAnswer the question using a single word or phrase."
FLICKR30K_PROMPT = "Provide a one-sentence caption for the provided image."


@dataclass(frozen=True)
class Case:
    """A prompt about pictures. `answer` is the right one, `type` the kind of question, where the source knows them."""

    images: tuple[Image.Image, ...]
    prompt: str
    answer: str | None = None
    type: str | None = None

    def content(self) -> list[dict]:
        """The user's message for a chat template."""
        return [{"type": "image"} for _ in self.images] + [{"type": "text", "text": self.prompt}]


def load_samples(data: str, processor: ProcessorMixin, n: int = 20, seed: int = 0) -> Iterator[dict]:
    """Model inputs, one sample at a time, of every source in `data`; arguments and errors as [`load_cases`]."""
    return (encode(case, processor) for case in load_cases(data, n, seed))


class Samples:
    """[`load_samples`] that can be gone through several times, without keeping what it yields."""

    def __init__(self, data: str, processor: ProcessorMixin, n: int = 20, seed: int = 0):
        self.cases, self.processor = list(load_cases(data, n, seed)), processor

    def __len__(self):
        return len(self.cases)

    def __iter__(self) -> Iterator[dict]:
        return (encode(case, self.processor) for case in self.cases)


def load_cases(data: str, n: int = 20, seed: int = 0) -> Iterator[Case]:
    """`n` samples, chosen by `seed`, of every source in `data`, a list of names or folders separated by commas.

    Raises:
        ValueError: if a source is unknown, cannot be read or reached, or has fewer than `n` samples.
    """
    if n < 1:
        raise ValueError(f"cannot take {n} samples; the least is 1")
    names = [name.strip() for name in data.split(",") if name.strip()]
    if not names:
        raise ValueError(f"no data in {data!r}; use {', '.join(SOURCES)} or a folder")
    for name in names:
        if name not in SOURCES and not Path(name).is_dir():
            raise ValueError(
                f"unknown data {name!r}; use {', '.join(SOURCES)} or a folder with pictures and a JSONL file"
            )
    return (case for name in names for case in SOURCES.get(name, _from_folder(name))(n, seed))


def encode(case: Case, processor: ProcessorMixin) -> dict:
    """Model inputs of one case, by the processor's chat template."""
    text = processor.apply_chat_template([{"role": "user", "content": case.content()}], add_generation_prompt=True)
    return dict(processor(images=list(case.images) or None, text=text, return_tensors="pt"))


def _from_hub(name: str, stream: Callable) -> Callable:
    """Streams cases, and says what to do where that fails."""

    def cases(n: int, seed: int) -> Iterator[Case]:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"--data {name} needs the extra: pip install '.[calibrate]' ({error})") from None
        try:
            found = list(islice(stream(datasets.load_dataset, n, seed), n))
        except Exception as error:  # as many kinds as there are ways not to reach a server
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            raise ValueError(
                f"cannot read {name} from the Hub ({reason}). Pass a folder with pictures and a JSONL file of prompts, "
                "or --data shapes, instead"
            ) from None
        yield from _require(found, n, name)

    return cases


def _stream_gqa(load_dataset: Callable, n: int, seed: int) -> Iterator[Case]:
    """Questions and pictures are two configurations: the questions are drawn, then their pictures looked for."""
    questions = load_dataset(GQA, "testdev_balanced_instructions", split="testdev", streaming=True)
    chosen = list(questions.shuffle(seed=seed, buffer_size=10_000).take(n))
    pictures, missing = {}, {row["imageId"] for row in chosen}
    for row in load_dataset(GQA, "testdev_balanced_images", split="testdev", streaming=True):
        if row["id"] in missing:
            pictures[row["id"]] = row["image"].convert("RGB")
            missing.remove(row["id"])
        if not missing:
            break
    for row in chosen:
        yield Case((pictures[row["imageId"]],), GQA_PROMPT.format(row["question"]), row["answer"])


def _stream_flickr30k(load_dataset: Callable, n: int, seed: int) -> Iterator[Case]:
    rows = load_dataset(FLICKR30K, split="test", streaming=True)
    for row in rows.shuffle(seed=seed, buffer_size=10 * n).take(n):
        yield Case((row["image"].convert("RGB"),), FLICKR30K_PROMPT)


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


def _from_folder(folder: str) -> Callable:
    def cases(n: int, seed: int) -> Iterator[Case]:
        files = sorted(Path(folder).glob("*.jsonl"))
        if len(files) != 1:
            raise ValueError(f"{folder} holds {len(files)} .jsonl files; it needs exactly one, with the prompts")
        lines = [line for line in files[0].read_text(encoding="utf-8").splitlines() if line.strip()]
        numbers = random.Random(seed).sample(range(len(lines)), min(n, len(lines)))
        yield from _require([_read_line(files[0], number, lines[number]) for number in numbers], n, folder)

    return cases


def _read_line(file: Path, number: int, line: str) -> Case:
    try:
        row = json.loads(line)
        names = [row["image"]] if isinstance(row["image"], str) else row["image"]
        prompt, answer = str(row["prompt"]), row.get("answer")
        images = tuple(ImageOps.exif_transpose(Image.open(file.parent / name)).convert("RGB") for name in names)
    except Exception as error:  # as many kinds as there are broken files
        raise ValueError(f"{file}, line {number + 1}: {type(error).__name__}: {error}") from None
    return Case(images, prompt, None if answer is None else str(answer))


def _require(cases: list[Case], n: int, name: str) -> list[Case]:
    if len(cases) < n:
        raise ValueError(f"{name} has only {len(cases)} samples, {n} were asked for")
    return cases


SOURCES = {
    "gqa": _from_hub("gqa", _stream_gqa),
    "flickr30k": _from_hub("flickr30k", _stream_flickr30k),
    "shapes": _shapes,
}
