"""What the page shows beside an answer: the chart of layers and tokens, the picture's patches, the costs of dense and ShortV.

Charts and pictures are those of `pictures/`; tables are HTML in which everything that a model or a user wrote is escaped.
"""

import copy
from collections.abc import Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from ..configuration_shortv import frozen_text
from ..data.images import load_image
from ..flops.equations import flops_ratio, visual_tokens_of
from ..pictures.patches import draw_reduction
from ..pictures.plots import draw_frozen_layers
from ..reduction import ModelSizes, parse_visual_reduction
from .session import Reply
from .shared import Settings, SharedModel
from .uploads import Upload


TEXT_TOKENS = 20  # of a question, before one has been asked


def frozen_layers(shared: SharedModel, settings: Settings, whole: Reply | None) -> tuple[Image.Image, str]:
    """The chart of layers and tokens, and what it says in a sentence, for the numbers of tokens of the prompt that `whole`
    replied to or, without one, of a short question about one picture.

    Raises:
        ValueError: the reduction leaves to the picture how many tokens stay, and none has been looked at with it.
    """
    config = copy.copy(shared.model.config)
    config.shortv_layers, config.visual_reduction = list(settings.layers), settings.reduction
    t, v, kept = TEXT_TOKENS, visual_tokens_of(config), None
    if whole is not None and whole.answer.visual_tokens:
        t, v = whole.answer.prompt_tokens - whole.answer.visual_tokens, whole.answer.visual_tokens
        reduction = parse_visual_reduction(settings.reduction, ModelSizes.of(config))
        if reduction is not None and reduction.cuts_images and whole.settings.reduction == settings.reduction:
            kept = whole.kept
    ratio = flops_ratio(
        t, v, config, shortv_layers=config.shortv_layers, visual_reduction=config.visual_reduction, kept=kept
    )
    n_layers = config.get_text_config().num_hidden_layers
    said = (
        f"{v} visual tokens (orange) are frozen (grey) in "
        f"{frozen_text(settings.layers, n_layers)}{'' if settings.reduction is None else ', or taken out (white)'}; {t} text "
        f"tokens (blue) are always computed: {ratio:.0%} of the dense decoder's FLOPs."
    )
    with TemporaryDirectory() as folder:
        file = draw_frozen_layers(config, Path(folder) / "layers.png", t, v, f"ShortV on {shared.name}", kept)
        return load_image(file), said


def patches(
    model: Any, processor: ProcessorMixin, upload: Upload, prompt: str, reduction: dict | None
) -> Image.Image | None:
    """What the reduction does with the patches of the first picture, or of the video if there is no picture; `None` if there
    is nothing to draw.

    Raises:
        ValueError: it cannot be drawn, for example a method that is drawn on pictures only on a video.
    """
    seen: Sequence | Any = upload.pictures or (upload.videos[0] if upload.videos else [])
    if reduction is None or not seen:
        return None
    with TemporaryDirectory() as folder:
        file = Path(folder) / "patches.png"
        return load_image(draw_reduction(model, processor, seen, prompt, reduction, file, other_layers=False))


def summary(reply: Reply) -> str:
    """What an answer took, in a line."""
    answer = reply.answer
    parts = [
        f"{answer.time_to_first_token:.2f} s to the first token",
        f"{answer.prompt_tokens} prompt tokens, {answer.visual_tokens} of them visual",
        f"{len(answer.token_ids)} output tokens",
        f"KV cache {reply.cache_bytes / 1e6:.2f} MB",
    ]
    if reply.from_cache:
        parts.append("went on from the cache: only the new tokens were computed")
    return " · ".join(parts)


def streaming(answers: dict[str, str]) -> str:
    """The answers of a comparison while they come, as HTML."""
    return _table([("answer", [answers.get("dense", ""), answers.get("shortv", "")])], "ShortV")


def comparison(result: dict) -> str:
    """The result of `chat.comparison.compare` as an HTML table, and what it comes to in a sentence."""
    dense, ours = result["dense"], result["shortv"]
    method = ours["visual_reduction"]
    name = "ShortV" if method is None else f"ShortV + {method['method']}"
    both = (dense, ours)
    rows = [
        ("answer", [each["answer"] for each in both]),
        ("frozen layers and halves", [str(len(each["shortv_layers"])) for each in both]),
        ("visual tokens, first → last layer", [_first_to_last(each["visual_tokens_by_layer"]) for each in both]),
        ("time to first token", [f"{1000 * each['time_to_first_token_s']:.1f} ms" for each in both]),
        ("GFLOPs before the first token", [f"{each['prefill_flops'] / 1e9:.3f}" for each in both]),
        ("KV cache, tokens a layer", [f"{each['kv_tokens']:.0f}" for each in both]),
        ("peak memory above the weights", [f"{each['peak_memory_bytes'] / 1e6:.2f} MB" for each in both]),
    ]
    return _table(rows, name) + f"<p>{escape(_sentence(result))}</p>"


def _sentence(result: dict) -> str:
    dense, ours = result["dense"], result["shortv"]
    share = ours["language_model_flops"] / dense["language_model_flops"]
    agree = "the same answer" if result["answers_agree"] else "another answer"
    low, high = result["speed_up_quartiles"]
    time = (
        f"{result['speed_up']:.2f}× as fast to the first token"
        if result["settled"]
        else "the times scatter too much to compare (the model is small or the machine is busy)"
    )
    spread = f"quartiles {low:.2f}× to {high:.2f}× of {result['rounds']} rounds"
    return f"{agree.capitalize()} for {share:.0%} of the language model's FLOPs; {time} ({spread})."


def _first_to_last(tokens: list[int]) -> str:
    return f"{tokens[0]} → {tokens[-1]}"


def _table(rows: list[tuple[str, list[str]]], name: str) -> str:
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in ("", "dense", name))
    body = "".join(
        f'<tr><th scope="row">{escape(title)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for title, cells in rows
    )
    return f'<table class="costs"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
