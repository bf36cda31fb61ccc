"""Pictures for READMEs and model cards. Charts of measurements need matplotlib (the `calibrate` extra)."""

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


def plot_layer_scores(scores: dict[str, list[float]], label: str, output: str | Path, log: bool = False) -> Path:
    """Bars of one score per layer and kind of token, as in Figure 3 of the paper.

    Args:
        scores: values per layer by name, such as `{"visual tokens": [...], "text tokens": [...]}`.
        label: of the vertical axis.
        output: the PNG file; returned.
        log: logarithmic axis; a score of 0 then has no bar.
    """
    figure, axes = _figure(9, 3.2)
    width = 0.8 / len(scores)
    for number, (name, values) in enumerate(scores.items()):
        places = [layer + (number - (len(scores) - 1) / 2) * width for layer in range(len(values))]
        axes.bar(places, values, width, label=name, color=(VISUAL, TEXT, INK)[number])
    axes.set(xlabel="decoder layer", ylabel=label)
    axes.set_xticks(range(len(values)))
    if log:
        axes.set_yscale("log")
    axes.legend(frameon=False)
    figure.savefig(output, dpi=150)
    return Path(output)


def plot_curves(panels: dict[str, dict[str, dict]], x_label: str, output: str | Path) -> Path:
    """Panels of curves side by side.

    Args:
        panels: by the label of the vertical axis, curves by name: `{"x": [...], "y": [...]}` with optional "low" and
            "high", which are drawn as a band.
        x_label: of the horizontal axes.
        output: the PNG file; returned.
    """
    figure, all_axes = _figure(5 * len(panels), 3.6, len(panels))
    for axes, (label, curves) in zip(all_axes, panels.items(), strict=True):
        for name, curve in curves.items():
            (line,) = axes.plot(curve["x"], curve["y"], marker="o", markersize=3, label=name)
            if "low" in curve:
                axes.fill_between(curve["x"], curve["low"], curve["high"], alpha=0.15, color=line.get_color())
        axes.set(xlabel=x_label, ylabel=label)
    all_axes[0].legend(frameon=False)
    figure.savefig(output, dpi=150)
    return Path(output)


def check_matplotlib():
    """Raises `ValueError` if charts cannot be drawn; called before long measurements, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"charts need the extra: pip install '.[calibrate]' ({error})") from None


def _figure(width: float, height: float, panels: int | None = None):
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window system
    axes = [figure.add_subplot(1, panels or 1, number + 1) for number in range(panels or 1)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes if panels else axes[0]
