"""The benchmark's report: speed-ups of its rows, JSON, Markdown table, chart."""

import json
import statistics
from pathlib import Path

from ..data import outputs
from ..pictures import plots


STAGES = ("time_to_first_token", "prefill", "language_model", "output_token")
BOUNDED = {"time_to_first_token": "flops", "language_model": "language_model_flops"}


def summary(values: list[float]) -> tuple[float, list[float]]:
    """The median, and the first and third quartile; of a single value, itself thrice."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return median, [low, high]


def add_speed_ups(rows: list[dict]) -> list[dict]:
    """The rows of one prompt, `seconds` and `roofline_s` replaced by stages: seconds, median, quartiles, `speed_up` over
    the faster mode of the stock class, the bounds of the speed-up, and its share of the FLOPs bound.

    A speed-up is the median of the ratios within each repetition, in which all methods take turns: a machine that is
    slower for some seconds is so for both sides of a ratio. Where `roofline_s` is `None`, there is no roofline bound.

    Raises:
        ValueError: if the stock class, the baseline, is not among the rows.
    """
    stock = [row for row in rows if row["method"] == "stock"]
    if rows and not stock:
        raise ValueError("the stock class could not be measured, so there is no baseline")
    finished = []
    for row in rows:
        row = dict(row)
        seconds, roofline = row.pop("seconds"), row.pop("roofline_s")
        for stage, values in seconds.items():
            baselines = [each["seconds"][stage] for each in stock if stage in each["seconds"]]
            if not baselines:  # the stock class failed in the only mode that has this stage
                continue
            baseline = min(baselines, key=statistics.median)
            entry = {"seconds": values}
            entry["median_s"], entry["quartiles_s"] = summary(values)
            ratios = [theirs / ours for theirs, ours in zip(baseline, values, strict=True)]
            entry["speed_up"], entry["speed_up_quartiles"] = summary(ratios)
            if stage in BOUNDED:
                counted = BOUNDED[stage]
                entry["bound"] = stock[0][counted] / row[counted]
                entry["share_of_bound"] = entry["speed_up"] / entry["bound"]
                if roofline is not None:
                    entry["roofline_bound"] = stock[0]["roofline_s"][stage] / roofline[stage]
                    entry["share_of_roofline_bound"] = entry["speed_up"] / entry["roofline_bound"]
            row[stage] = entry
        if "language_model" in row:
            row["achieved_flops_per_s"] = row["language_model_flops"] / row["language_model"]["median_s"]
        finished.append(row)
    return finished


def markdown(report: dict) -> str:
    """The report as Markdown: conditions, a table with a row per measurement, what was skipped, loading times."""
    lines = [f"`{report['conditions']['command']}`", ""]
    lines += [f"- {name}: {value}" for name, value in report["conditions"].items() if name != "command"]
    header = (
        "model", "v", "batch", "method", "mode", "time to first token, ms (quartiles)", "speed-up",
        "bound (roofline)", "share of bound", "without vision tower, ms (quartiles)", "speed-up",
        "language model alone, ms (quartiles)", "speed-up", "bound (roofline)", "share of bound",
        "per output token, ms", "stock / this", "TFLOPs", "TFLOP/s", "peak memory, MB",
    )  # fmt: skip
    lines += ["", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in report["results"]]
    lines += [
        "",
        "Speed-ups are over the faster mode of the stock class: medians, and quartiles in brackets, of the ratios "
        "within a repetition. Bounds: what the counted FLOPs allow and, in brackets, the roofline. TFLOPs and TFLOP/s "
        "are the language model's; peak memory is above weights and inputs, in eager mode.",
    ]
    for each in report["skipped"]:
        where = f"{each['model']}, images {each['images']}, batch {each['batch']}"
        lines.append(f"- skipped: {each['method']}, {each['mode']} ({where}): {each['reason']}")
    for each in report["loading"]:
        (stock, _), (shortv, _) = (summary(each[name]) for name in ("stock", "shortv"))
        ratio, (low, high) = summary([b / a for a, b in zip(each["stock"], each["shortv"], strict=True)])
        lines.append(
            f"- loading {each['model']}: stock {stock:.3f} s, ShortV {shortv:.3f} s, ratio {ratio:.3f} "
            f"({low:.3f}–{high:.3f})"
        )
    return "\n".join(lines)


def _cells(row: dict) -> list[str]:
    cells = [row["model"], str(row["visual_tokens"]), str(row["batch"]), row["method"], row["mode"]]
    for stage in ("time_to_first_token", "prefill", "language_model"):
        if stage not in row:
            cells += ["–"] * (4 if stage in BOUNDED else 2)
            continue
        entry = row[stage]
        low, high = (f"{1000 * quartile:.1f}" for quartile in entry["quartiles_s"])
        slowest, fastest = entry["speed_up_quartiles"]
        cells.append(f"{1000 * entry['median_s']:.1f} ({low}–{high})")
        cells.append(f"{entry['speed_up']:.2f}× ({slowest:.2f}–{fastest:.2f})")
        if stage in BOUNDED:
            roofline = f"{entry['roofline_bound']:.2f}×" if "roofline_bound" in entry else "–"
            cells.append(f"{entry['bound']:.2f}× ({roofline})")
            cells.append(f"{entry['share_of_bound']:.0%}")
    if "output_token" in row:
        cells += [f"{1000 * row['output_token']['median_s']:.2f}", f"{row['output_token']['speed_up']:.3f}"]
    else:
        cells += ["–"] * 2
    achieved = row.get("achieved_flops_per_s")
    cells += [f"{row['language_model_flops'] / 1e12:.3f}", "–" if achieved is None else f"{achieved / 1e12:.3f}"]
    return [*cells, f"{row['peak_memory_bytes'] / 1e6:.0f}"]


def sweeps(report: dict) -> dict[str, dict]:
    """Panels for the chart: per prompt, the speed-up of the time to first token against the number of frozen layers in
    each mode, and its two bounds. Prompts with fewer than two numbers of frozen layers are left out."""
    panels: dict[str, dict] = {}
    for row in report["results"]:
        if row["visual_reduction"] is not None or "time_to_first_token" not in row:
            continue
        label = f"speed-up, {row['model']}\nv = {row['visual_tokens']}, batch {row['batch']}"
        n, entry = len(row["shortv_layers"] or ()), row["time_to_first_token"]
        low, high = entry["speed_up_quartiles"]
        points = panels.setdefault(label, {})
        points.setdefault(f"measured, {row['mode']}", []).append((n, entry["speed_up"], low, high))
        if row["mode"] == "eager":
            points.setdefault("FLOPs bound", []).append((n, entry["bound"]))
            points.setdefault("roofline bound", []).append((n, entry["roofline_bound"]))
    return {
        label: {
            name: dict(zip(("x", "y", "low", "high"), map(list, zip(*points, strict=True)), strict=False))
            for name, points in curves.items()
        }
        for label, curves in panels.items()
        if max(len(points) for points in curves.values()) > 2  # the stock class is N = 0
    }


def write(report: dict, output: Path):
    """Write `output` (JSON), and beside it the table (.md)."""
    outputs.write_text(output, json.dumps(report, indent=1) + "\n")
    outputs.write_text(output.with_suffix(".md"), markdown(report) + "\n")


def draw(report: dict, output: Path):
    """Draw the speed-up against the number of frozen layers beside `output` (.png), where several were measured."""
    panels = sweeps(report)
    if panels:
        with outputs.whole_file(output.with_suffix(".png")) as chart:
            plots.plot_curves(panels, "frozen layers N", chart)
