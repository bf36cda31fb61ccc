"""Pictures for READMEs and model cards. Charts of measurements need matplotlib (the `calibrate` extra)."""

import math
import os
from bisect import bisect_right
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from transformers import PretrainedConfig

from ..configuration_shortv import frozen_text
from ..flops.equations import flops_ratio, frozen_updates_in, visual_tokens_by_layer


TEXT, VISUAL, FROZEN, INK, BACKGROUND = "#2f6db5", "#e8862e", "#e4e4e4", "#333333", "white"


def short_name(model: str) -> str:
    """The last part of a Hub id or of the path of a directory."""
    return os.path.basename(os.path.abspath(model))


def wrap_text(text: str, measure: Callable[[str], float], width: float) -> list[str]:
    """Lines of `text` that are at most `width` wide, by `measure`, which returns the width of a string.

    Breaks at spaces; within a word that is too long for a line, after a mark such as "-" or "/" if there is one in the
    second half of the line, else anywhere. A line holds at least one character, however narrow it has to be.
    """
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if measure(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            while measure(word) > width and len(word) > 1:
                fits = max(bisect_right(range(1, len(word)), width, key=lambda n: measure(word[:n])), 1)
                marks = [n for n in range(fits // 2 + 1, fits + 1) if word[n - 1] in "-_/,.:"]
                cut = max(marks, default=fits)
                lines.append(word[:cut])
                word = word[cut:]
            line = word
        lines.append(line)
    return lines


def label_step(n: int, label_width: float, pitch: float) -> int:
    """Of `n` labels, one every `pitch` units, which to draw so that none touches the next: every 1st, 2nd, 5th, ..."""
    steps = (1, 2, 5, 10, 20, 50, 100)
    return next((step for step in steps if label_width <= step * pitch), n)


def draw_frozen_layers(
    config: PretrainedConfig, output: str | Path, t: int, v: int, title: str | None = None, kept: int | None = None
) -> Path:
    """Draw which tokens every decoder layer computes: one column per layer, text below, visual tokens above, to the left
    those of its attention, to the right of its FFN.

    The areas are to scale in the number of tokens (`t` text, `v` visual); frozen visual tokens are grey, and where the
    config's token reduction has taken some out their place is empty. The subtitle gives the FLOPs ratio of Eq. 5. The picture is as wide as its columns, subtitle and legend need, at most 2160 pixels;
    too long a title goes on in the next line. Returns `output`, a PNG file.

    Args:
        title: default "ShortV on" the base model or, for a model that holds its own weights, "this model".
        kept: how many visual tokens reach the decoder, of a reduction that leaves that to the image.

    Raises:
        ValueError: `kept` is needed and missing (`flops.visual_tokens_by_layer`).
    """
    n_layers, reduction = config.get_text_config().num_hidden_layers, config.visual_reduction
    stream = visual_tokens_by_layer(v, n_layers, reduction, config, kept=kept)
    frozen = frozen_updates_in(config.shortv_layers, reduction, v, config, n_layers)
    scale = 2  # pixels per unit; drawn large so that it stays sharp
    font, small = ImageFont.load_default(15 * scale), ImageFont.load_default(11 * scale)
    height, margin, square, space = 200 * scale, 20 * scale, 12 * scale, 6 * scale
    if title is None:
        title = f"ShortV on {short_name(config.base_model_name_or_path or 'this model')}"
    ratio = flops_ratio(t, v, config, shortv_layers=config.shortv_layers, visual_reduction=reduction, kept=kept)
    method = "" if reduction is None else f" and {reduction['method']}"
    subtitle = (
        f"visual tokens frozen in {frozen_text(config.shortv_layers, n_layers)}{method}: {ratio:.0%} of the prefill's "
        f"FLOPs ({t} text, {v} visual tokens)"
    )
    entries = [
        (VISUAL, "visual, computed"),
        (FROZEN, "visual, frozen (K and V only)"),
        (TEXT, "text, always computed"),
    ]
    if reduction is not None:
        entries.append((BACKGROUND, "visual, taken out"))
    legend, legend_width = [], 0  # (x, colour, label)
    for colour, label in entries:
        legend.append((margin + legend_width, colour, label))
        legend_width += square + space + math.ceil(small.getlength(label)) + margin
    wanted = max(26 * scale * n_layers, legend_width, math.ceil(small.getlength(subtitle)))
    width = min(wanted, 1040 * scale)  # of the columns: a wider picture is shown scaled down, too small to read
    lines = wrap_text(title, font.getlength, width)

    top = (10 + 22 * len(lines) + 28) * scale
    bottom = top + height
    image = Image.new("RGB", (width + 2 * margin, bottom + 74 * scale), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((margin, (10 + 22 * number) * scale), line, INK, font)
    draw.text((margin, top - 26 * scale), subtitle, INK, small)
    text_height = min(max(round(height * t / (t + v)), 8 * scale), height - 8 * scale)
    pitch = width / n_layers
    gap = min(max(round(0.15 * pitch), scale), 4 * scale)
    step = label_step(n_layers, small.getlength(str(n_layers - 1)) + space, pitch)
    for layer in range(n_layers):
        left, right = margin + round(layer * pitch), margin + round((layer + 1) * pitch) - gap
        asks, feeds = (FROZEN if layer in updates else VISUAL for updates in frozen)
        foot = bottom - text_height - 2 * scale
        head = foot - round((foot - top) * stream[layer] / v) if v else foot
        if head < foot:
            draw.rectangle((left, head, right - 1, foot), asks)
        if head < foot and feeds != asks:
            draw.rectangle(((left + right) // 2, head, right - 1, foot), feeds)
        draw.rectangle((left, bottom - text_height, right - 1, bottom - 1), TEXT)
        if layer % step == 0:
            draw.text(((left + right) / 2, bottom + 6 * scale), str(layer), INK, small, anchor="ma")
    draw.text((margin + width / 2, bottom + 22 * scale), "decoder layer", INK, small, anchor="ma")
    y = bottom + 46 * scale
    for x, colour, label in legend:
        draw.rectangle((x, y, x + square, y + square), colour, outline=FROZEN if colour == BACKGROUND else None)
        draw.text((x + square + space, y), label, INK, small)
    image.save(output, optimize=True)
    return Path(output)


SCORES_WITHOUT_BAR = {"0": "exactly 0", "−": "below 0", "!": "not finite"}


SCORES = {
    "lc": "Layer Contribution (nats)",
    "greedy": "joint KL when chosen (nats)",
    "cosine": "cosine similarity",
    "random": "random number",
}


def plot_ranking(ranking, output: str | Path, text_scores: list[float] | None = None) -> Path:
    """[`plot_layer_scores`] of a `LayerRanking`, beside those for text tokens if there are any."""
    scores = {"visual tokens": ranking.scores, **({} if text_scores is None else {"text tokens": text_scores})}
    label = SCORES[ranking.metric]
    log = ranking.metric in ("lc", "greedy")  # a KL divergence is 0 or more
    return plot_layer_scores(scores, label, output, log, ranking_title(ranking, label))


def ranking_title(ranking, label: str) -> str:
    """Title of a chart of a `LayerRanking`'s scores: the model, `label` of the scores, what they were measured on."""
    samples = f"{ranking.data['samples']} samples ({ranking.data['name']})" if ranking.data else f"seed {ranking.seed}"
    direction = f", {ranking.kl} KL" if ranking.kl else ""
    return f"{ranking.model.get('name') or 'unnamed model'}: {label}\n{samples}{direction}"


def plot_layer_scores(
    scores: dict[str, list[float]], label: str, output: str | Path, log: bool = False, title: str = ""
) -> Path:
    """Bars of one score per layer and kind of token, as in Figure 3 of the paper.

    A score that has no bar is marked where the bar would stand: "0" if it is exactly 0, "−" if it is negative on a
    logarithmic axis, "!" if it is not finite.

    Args:
        scores: values per layer by name, such as `{"visual tokens": [...], "text tokens": [...]}`; at most three names.
        label: of the vertical axis.
        output: the PNG file; returned.
        log: whether the axis may be logarithmic, as is right for KL divergences. It is if positive scores differ by a
            factor of 10 or more: on a linear axis the small ones could not be seen.
        title: above the chart; too long a line goes on in the next one.
    """
    n_layers = max(map(len, scores.values()))
    positive = [value for values in scores.values() for value in values if 0 < value < math.inf]
    log = log and bool(positive) and max(positive) >= 10 * min(positive)
    foot = 10 ** math.floor(math.log10(min(positive) / 2)) if log else 0
    figure, axes = _figure(min(max(9, 0.15 * n_layers), 12), 3.9)
    bar, marks = 0.8 / len(scores), []
    for number, (name, values) in enumerate(scores.items()):
        places = [layer + (number - (len(scores) - 1) / 2) * bar for layer in range(len(values))]
        kinds = [_without_bar(value, log) for value in values]
        heights = [0 if kind else value for kind, value in zip(kinds, values, strict=True)]
        colour = (VISUAL, TEXT, INK)[number]
        axes.bar(places, heights, bar, label=name, color=colour)
        marks += [(place, kind, colour) for place, kind in zip(places, kinds, strict=True) if kind]
    axes.set(xlabel="decoder layer", ylabel=label, xlim=(-0.6, n_layers - 0.4))
    axes.grid(axis="y", color=FROZEN)
    axes.set_axisbelow(True)
    if log:
        axes.set_yscale("log")
        axes.set_ylim(bottom=foot)
    elif not any(bar.get_height() for bar in axes.patches):
        axes.set_ylim(0, 1)
    extra = {mark: text for mark, text in SCORES_WITHOUT_BAR.items() if any(mark == kind for _, kind, _ in marks)}
    _finish(figure, [axes], title, extra)
    pitch = axes.bbox.width / n_layers * 72 / figure.dpi  # points
    for place, kind, colour in marks:
        axes.annotate(
            kind, (place, foot), (0, 1), textcoords="offset points", ha="center", va="bottom", color=colour,
            weight="bold", fontsize=min(9, 1.2 * bar * pitch), annotation_clip=False,
        )  # fmt: skip
    axes.set_xticks(range(0, n_layers, label_step(n_layers, 7 * len(str(n_layers - 1)) + 4, pitch)))
    figure.savefig(output, dpi=150)
    return Path(output)


def _without_bar(value: float, log: bool) -> str:
    """The key of `SCORES_WITHOUT_BAR` for this score, or "" if it has a bar."""
    return "!" if not math.isfinite(value) else "0" if value == 0 else "−" if log and value < 0 else ""


DASHES = ("-", (0, (5, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)), (0, (1, 2)))


def plot_curves(panels: dict[str, dict[str, dict]], x_label: str, output: str | Path) -> Path:
    """Panels of curves, three in a row. Of curves that coincide all can be seen: those on top are dashed and narrower.

    Args:
        panels: by the label of the vertical axis, curves by name: `{"x": [...], "y": [...]}` with optional "low" and
            "high", which are drawn as a band. A name has one colour in all panels.
        x_label: of the horizontal axes; x are whole numbers.
        output: the PNG file; returned.
    """
    from matplotlib.ticker import MaxNLocator

    columns, rows = min(len(panels), 3), math.ceil(len(panels) / 3)
    figure, all_axes = _figure(5 * columns, 3.6 * rows + 0.4, len(panels))
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    for axes, (label, curves) in zip(all_axes, panels.items(), strict=True):
        for name, curve in curves.items():
            number, colour = names.index(name), f"C{names.index(name)}"
            left = 1 - number / len(names)
            style: dict[str, Any] = {"linewidth": 1 + 1.5 * left, "markersize": 3 + 4 * left}
            style |= {"linestyle": DASHES[number % len(DASHES)], "marker": "os^Dv"[number % 5]}
            axes.plot(curve["x"], curve["y"], label=name, color=colour, **style)
            if "low" in curve:
                axes.fill_between(curve["x"], curve["low"], curve["high"], alpha=0.15, color=colour)
        axes.set(xlabel=x_label, ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(figure, all_axes)
    figure.savefig(output, dpi=150)
    return Path(output)


def plot_trade_offs(panels: dict[str, dict[str, tuple[float, float]]], output: str | Path, title: str = "") -> Path:
    """Panels of points, a point for each name: what it costs, to the right, and what it scores.

    Args:
        panels: by the label of the horizontal axis, points (x, y) by name. A name has one colour and one mark in all panels.
        output: the PNG file; returned.
        title: above the chart.
    """
    figure, all_axes = _figure(5 * len(panels), 4, len(panels))
    names = list(dict.fromkeys(name for points in panels.values() for name in points))
    for axes, (x_label, points) in zip(all_axes, panels.items(), strict=True):
        for name, (x, y) in points.items():
            number = names.index(name)
            axes.plot(
                x, y, linestyle="", marker="os^Dv*PX"[number % 8], color=f"C{number % 10}", markersize=9, label=name
            )
        axes.set(xlabel=x_label, ylabel="score")
        axes.grid(color=FROZEN)
        axes.set_axisbelow(True)
        axes.margins(0.12)
    _finish(figure, all_axes, title)
    figure.savefig(output, dpi=150)
    return Path(output)


def plot_costs(
    curves: dict[str, list[tuple[float, float, float]]],
    x_label: str,
    y_label: str,
    output: str | Path,
    title: str = "",
) -> Path:
    """What things cost, on a logarithmic axis, by what they save: curves with error bars.

    Args:
        curves: by name, points (x, y, standard error of y) by ascending x. The first is drawn boldest. Points with y = 0 are
            left out, as such an axis has no place for them.
        output: the PNG file; returned.
    """
    figure, axes = _figure(8, 5)
    for number, (name, points) in enumerate(curves.items()):
        shown = [point for point in points if point[1] > 0]
        if not shown:
            continue
        x, y, errors = zip(*shown, strict=True)
        # Down to a tenth of the value: an error as large as it would reach to minus infinity.
        below = [min(error, 0.9 * value) for value, error in zip(y, errors, strict=True)]
        style: dict[str, Any] = {"linewidth": 1.2, "markersize": 5} if number else {"linewidth": 2.5, "markersize": 7}
        style |= {"linestyle": DASHES[number % len(DASHES)], "marker": "os^Dv*PX"[number % 8], "capsize": 2}
        axes.errorbar(x, y, (below, errors), label=name, color=f"C{number % 10}", **style)
    axes.set_yscale("log")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(color=FROZEN)
    axes.set_axisbelow(True)
    _finish(figure, [axes], title)
    figure.savefig(output, dpi=150)
    return Path(output)


def _finish(figure, all_axes, title: str = "", marks: dict[str, str] | None = None):
    """Wraps title and vertical labels to the figure, puts the legend below the axes, and lays them out.

    Args:
        marks: further entries of the legend, by the character that stands before the text.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.lines import Line2D

    renderer = figure.canvas.get_renderer()

    def wrapped(text, size, width):
        font = FontProperties(size=size)
        return "\n".join(
            wrap_text(text, lambda line: renderer.get_text_width_height_descent(line, font, False)[0], width)
        )

    if title:
        text = wrapped(title, "medium", 0.96 * figure.bbox.width)
        figure.suptitle(text, x=0.01, ha="left", fontsize="medium", color=INK, parse_math=False)
    for axes in all_axes:
        rows = axes.get_subplotspec().get_gridspec().nrows
        label = wrapped(axes.get_ylabel(), axes.yaxis.label.get_fontsize(), 0.6 * figure.bbox.height / rows)
        axes.set_ylabel(label, parse_math=False)
    entries: dict[str, Any] = {}
    for axes in all_axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    for mark, text in (marks or {}).items():
        entries[text] = Line2D([], [], linestyle="", marker=f"${mark}$", color=INK, markeredgewidth=0)
    for columns in range(len(entries), 0, -1):
        legend = figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, frameon=False)
        if columns == 1 or legend.get_window_extent(renderer).width <= 0.98 * figure.bbox.width:
            break
        legend.remove()
    figure.draw_without_rendering()


def can_draw() -> bool:
    """Whether `matplotlib` is installed."""
    return find_spec("matplotlib") is not None


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
    grid = (math.ceil((panels or 1) / 3), min(panels or 1, 3))
    axes = [figure.add_subplot(*grid, number + 1) for number in range(panels or 1)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes if panels else axes[0]
