"""Pictures for READMEs and model cards, drawn with Pillow alone."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from transformers import PretrainedConfig

from .flops import flops_ratio


TEXT, VISUAL, FROZEN, INK, BACKGROUND = "#2f6db5", "#e8862e", "#e4e4e4", "#333333", "white"


def draw_frozen_layers(config: PretrainedConfig, output: str | Path, t: int, v: int) -> Path:
    """Draw which tokens every decoder layer computes: one column per layer, text below, visual tokens above.

    The areas are to scale in the number of tokens (`t` text, `v` visual); frozen visual tokens are grey. The title gives
    the FLOPs ratio of Eq. 5. Returns `output`, a PNG file.
    """
    n_layers, frozen = config.text_config.num_hidden_layers, set(config.shortv_layers)
    scale = 2  # pixels per unit; drawn large so that it stays sharp
    column, gap, height, left, top = 22 * scale, 4 * scale, 200 * scale, 20 * scale, 64 * scale
    width = 2 * left + n_layers * (column + gap) - gap
    image = Image.new("RGB", (width, top + height + 78 * scale), BACKGROUND)
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(15 * scale), ImageFont.load_default(11 * scale)
    ratio = flops_ratio(t, v, config, shortv_layers=config.shortv_layers)
    name = (config.base_model_name_or_path or "this model").split("/")[-1]
    draw.text((left, 10 * scale), f"ShortV on {name}", INK, font)
    title = f"visual tokens frozen in {len(frozen)} of {n_layers} layers: {ratio:.0%} of the prefill's FLOPs"
    draw.text((left, 34 * scale), f"{title} ({t} text, {v} visual tokens)", INK, small)
    text_height = max(round(height * t / (t + v)), 8 * scale)
    bottom = top + height
    for layer in range(n_layers):
        x = left + layer * (column + gap)
        visual = FROZEN if layer in frozen else VISUAL
        draw.rectangle((x, top, x + column - 1, bottom - text_height - 2 * scale), visual)
        draw.rectangle((x, bottom - text_height, x + column - 1, bottom - 1), TEXT)
        draw.text((x + column / 2, bottom + 6 * scale), str(layer), INK, small, anchor="ma")
    x, y = left, bottom + 30 * scale
    for colour, label in (
        (VISUAL, "visual, computed"),
        (FROZEN, "visual, frozen (K and V only)"),
        (TEXT, "text, always computed"),
    ):
        draw.rectangle((x, y, x + 12 * scale, y + 12 * scale), colour)
        draw.text((x + 18 * scale, y), label, INK, small)
        x += 200 * scale
    draw.text((width - left, y), "decoder layer", INK, small, anchor="ra")
    image.save(output, optimize=True)
    return Path(output)
