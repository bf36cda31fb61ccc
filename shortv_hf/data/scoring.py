"""Answers of a model to many questions about pictures, and how many are right."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import ProcessorMixin

from . import shapes
from .images import to_rgb
from .inputs import to_device
from .prompts import system_message, user_message
from .sources import Case


def held_out_cases(n: int) -> list[Case]:
    """`n` questions on scenes that the demonstration model was not trained on, all types in turn."""
    return [
        Case((shapes.draw(scene),), question.text, question.answer, question.type)
        for scene, question in shapes.held_out_questions(n)
    ]


def encode_batches(
    processor: ProcessorMixin, cases: Sequence[Case], batch_size: int, system_prompt: str | None = None
) -> Iterator[dict]:
    """Model inputs of the cases, padded on the left, `batch_size` at a time; `system_prompt` comes before each."""
    before = [] if system_prompt is None else [system_message(system_prompt)]
    for start in range(0, len(cases), batch_size):
        chunk = cases[start : start + batch_size]
        prompts = [
            processor.apply_chat_template(
                [*before, user_message(case.prompt, case.images, processor)], add_generation_prompt=True
            )
            for case in chunk
        ]
        images = [[to_rgb(image) for image in case.images] for case in chunk]
        options = {"images": images} if any(images) else {}
        yield dict(processor(text=prompts, **options, return_tensors="pt", padding=True, padding_side="left"))


@torch.inference_mode()
def answer(
    model: Any,
    processor: ProcessorMixin,
    cases: Sequence[Case],
    batch_size: int = 50,
    max_new_tokens: int = 8,
    make_kwargs=None,
    system_prompt: str | None = None,
    **generate_kwargs,
) -> list[str]:
    """Greedy answers to the cases. `make_kwargs(inputs)` gives arguments of `generate` that depend on the batch."""
    answers = []
    for inputs in encode_batches(processor, cases, batch_size, system_prompt):
        inputs = to_device(model, inputs)
        extra = make_kwargs(inputs) if make_kwargs else {}
        output = model.generate(**inputs, **extra, max_new_tokens=max_new_tokens, do_sample=False, **generate_kwargs)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


def is_right(given: str, expected: str) -> bool:
    """Exact match, but for case and a full stop at the end."""
    return given.strip().rstrip(".").lower() == expected.strip().rstrip(".").lower()


def accuracy(answers: Sequence[str], cases: Sequence[Case]) -> dict[str, float]:
    """Share of right answers: "overall" and, where cases have a type, by type."""
    right: dict[str, list[bool]] = {"overall": []}
    for text, case in zip(answers, cases, strict=True):
        if case.answer is None:
            raise ValueError(f"the case {case.prompt!r} has no answer to compare with")
        for name in ("overall", *([case.type] if case.type else [])):
            right.setdefault(name, []).append(is_right(text, case.answer))
    return {name: sum(values) / len(values) for name, values in right.items()}
