"""The same question to the dense model and to ShortV: answers, visual tokens, time to the first token, FLOPs, memory."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from ..data.images import to_rgb
from ..data.inputs import encode_messages, to_device
from ..data.prompts import user_message
from ..data.video import Video
from ..flops.meters import profile_prefill
from ..upstream import text_model
from .conversation import Answer, Conversation


MIN_ROUNDS, MAX_ROUNDS, MAX_SECONDS, SETTLED = 5, 40, 20.0, 0.1


def compare(
    model: Any,
    processor: ProcessorMixin,
    prompt: str,
    images: Sequence[Image.Image],
    max_new_tokens: int,
    videos: Sequence[Video] = (),
    on_text: Callable[[str, str], None] | None = None,
    max_seconds: float = MAX_SECONDS,
) -> dict:
    """The same question to the dense model and to the model as it is set (ShortV layers, token reduction): answers,
    time to first token, and what the prefill takes.

    The answers come first and warm up. Then the two are timed in turn, in rounds, until the quartiles of the speed-up
    (dense over ours within a round) are within a tenth of its median, for at most 40 rounds or `max_seconds`.

    Args:
        on_text: gets the variant's name and what is new of its answer, and "" while the two are timed; what it raises
            ends the comparison.

    Returns:
        By "dense" and "shortv": `answer`, median `time_to_first_token_s`, settings; of the prefill `visual_tokens_left`
        in the last layer and `visual_tokens_by_layer`, counted `prefill_flops` with the vision tower and
        `language_model_flops` without, `kv_tokens` a layer (mean), and `peak_memory_bytes` above the weights. Beside them
        `speed_up` (median), `speed_up_quartiles`, `rounds`, and whether they `settled`: a small model on a busy machine
        does not, and its speed-up says nothing.
    """
    variants: dict[str, tuple[list[int], dict | None]] = {"dense": ([], None), "shortv": model.settings}
    images = [to_rgb(image) for image in images]
    message = user_message(prompt, images, processor, videos)
    inputs = to_device(model, encode_messages([message], processor, images, videos))
    result: dict[str, Any] = {}
    answers: dict[str, Answer] = {}
    times: dict[str, list[float]] = {name: [] for name in variants}

    def ask(name, n_tokens, told=None):
        layers, reduction = variants[name]
        with model.using(shortv_layers=layers, visual_reduction=reduction):
            return Conversation(model, processor, n_tokens).ask(prompt, images, told, videos)

    for name, (layers, reduction) in variants.items():
        answers[name] = ask(name, max_new_tokens, None if on_text is None else partial(on_text, name))
        with model.using(shortv_layers=layers, visual_reduction=reduction):
            profile = _profile(model, inputs, answers[name].visual_tokens)
        settings = {"shortv_layers": list(layers), "visual_reduction": reduction}
        result[name] = {"answer": answers[name].text, **profile, **settings}
    start, settled = time.perf_counter(), False
    while not settled and len(times["dense"]) < MAX_ROUNDS and time.perf_counter() - start < max_seconds:
        for name in variants:
            if on_text is not None:
                on_text(name, "")
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


def _profile(model: Any, inputs: dict, visual_tokens: int) -> dict:
    """What one prefill takes, and how many of its visual tokens each layer has: only they can leave."""
    with layer_lengths(model) as lengths:
        profile = profile_prefill(model, inputs)
    by_layer = [visual_tokens - (inputs["input_ids"].shape[1] - length) for length in lengths]
    return {
        "visual_tokens_left": by_layer[-1],
        "visual_tokens_by_layer": by_layer,
        "prefill_flops": profile["flops"],
        "language_model_flops": profile["language_model_flops"],
        "kv_tokens": profile["kv_tokens"],
        "peak_memory_bytes": profile["peak_memory_bytes"],
    }


@contextmanager
def layer_lengths(model: Any) -> Iterator[list[int]]:
    """The list gets how many tokens each decoder layer has in the first pass that runs inside."""
    lengths: list[int] = []
    layers = text_model(model.model).layers

    def measure(layer: Any, args: tuple, output: Any):  # tokens can leave in the last layer itself
        if len(lengths) < len(layers):
            lengths.append((output[0] if isinstance(output, tuple) else output).shape[1])

    hooks = [layer.register_forward_hook(measure) for layer in layers]
    try:
        yield lengths
    finally:
        for hook in hooks:
            hook.remove()
