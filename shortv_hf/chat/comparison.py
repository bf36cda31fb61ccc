"""The same question to the dense model and to ShortV: answers, time to the first token, FLOPs."""

import statistics
import time
from typing import Any

from transformers import ProcessorMixin

from ..data.inputs import to_device
from ..data.sources import Case, encode
from ..flops.meters import language_model_flops
from .conversation import Answer, Conversation


MIN_ROUNDS, MAX_ROUNDS, MAX_SECONDS, SETTLED = 5, 40, 20.0, 0.1


def compare(model: Any, processor: ProcessorMixin, prompt: str, images: list, max_new_tokens: int) -> dict:
    """The same question to the dense model and to the model as it is set (ShortV layers, token reduction): answers,
    time to first token, counted FLOPs.

    The answers come first and warm up. Then the two are timed in turn, in rounds, until the quartiles of the speed-up
    (dense over ours within a round) are within a tenth of its median, for at most 40 rounds or 20 seconds.

    Returns:
        By "dense" and "shortv": `answer`, median `time_to_first_token_s`, `prefill_flops`, settings. Beside them
        `speed_up` (median), `speed_up_quartiles`, `rounds`, and whether they `settled`: a small model on a busy machine
        does not, and its speed-up says nothing.
    """
    variants: dict[str, tuple[list[int], dict | None]] = {"dense": ([], None), "shortv": model.settings}
    inputs = to_device(model, encode(Case(tuple(images), prompt), processor))
    result: dict[str, Any] = {}
    answers: dict[str, Answer] = {}
    times: dict[str, list[float]] = {name: [] for name in variants}

    def ask(name, n_tokens):
        layers, reduction = variants[name]
        with model.using(shortv_layers=layers, visual_reduction=reduction):
            return Conversation(model, processor, n_tokens).ask(prompt, images)

    for name, (layers, reduction) in variants.items():
        answers[name] = ask(name, max_new_tokens)
        with model.using(shortv_layers=layers, visual_reduction=reduction):
            flops = language_model_flops(model, inputs)
        settings = {"shortv_layers": list(layers), "visual_reduction": reduction}
        result[name] = {"answer": answers[name].text, "prefill_flops": flops, **settings}
    start, settled = time.perf_counter(), False
    while not settled and len(times["dense"]) < MAX_ROUNDS and time.perf_counter() - start < MAX_SECONDS:
        for name in variants:
            times[name].append(ask(name, 1).time_to_first_token)
        ratios = [dense / ours for dense, ours in zip(times["dense"], times["shortv"], strict=True)]
        if len(ratios) >= MIN_ROUNDS:
            low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
            settled = high - low <= SETTLED * median
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    for name in variants:
        result[name]["time_to_first_token_s"] = statistics.median(times[name])
    result |= {"speed_up": median, "speed_up_quartiles": [low, high], "rounds": len(ratios), "settled": settled}
    last = answers["shortv"]
    result["prompt_tokens"], result["visual_tokens"] = last.prompt_tokens, last.visual_tokens
    result["answers_agree"] = answers["dense"].token_ids == last.token_ids
    return result
