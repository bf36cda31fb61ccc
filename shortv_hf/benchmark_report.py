"""The benchmark's report: speed-ups of its rows, JSON, Markdown table, chart."""

import json
import statistics
from pathlib import Path

from . import plots


STAGES = ("time_to_first_token", "prefill", "output_token")
BOUNDED = {"time_to_first_token": "flops", "prefill": "language_model_flops"}


def summary(seconds: list[float]) -> dict:
    """`{"median_s", "quartiles_s": [first, third]}` of measurements; of a single one, itself thrice."""
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds
    return {"median_s": quartiles[1], "quartiles_s": quartiles[::2]}


def add_speed_ups(rows: list[dict]) -> list[dict]:
    """The rows of one prompt, `seconds` and `roofline_s` replaced by stages: median, quartiles, `speed_up` over the
    faster mode of the stock class, the bounds of the speed-up, and its share of the FLOPs bound.

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
            baseline = min(statistics.median(each["seconds"][stage]) for each in stock if stage in each["seconds"])
            entry = summary(values)
            entry["speed_up"] = baseline / entry["median_s"]
            entry["speed_up_quartiles"] = [baseline / quartile for quartile in reversed(entry["quartiles_s"])]
            if stage in BOUNDED:
                counted = BOUNDED[stage]
                entry["bound"] = stock[0][counted] / row[counted]
                entry["roofline_bound"] = stock[0]["roofline_s"][stage] / roofline[stage]
                entry["share_of_bound"] = entry["speed_up"] / entry["bound"]
                entry["share_of_roofline_bound"] = entry["speed_up"] / entry["roofline_bound"]
            row[stage] = entry
        if "prefill" in row:
            row["achieved_flops_per_s"] = row["language_model_flops"] / row["prefill"]["median_s"]
        finished.append(row)
    return finished


def markdown(report: dict) -> str:
    """The report as Markdown: conditions, a table with a row per measurement, what was skipped, loading times."""
    lines = [f"`{report['conditions']['command']}`", ""]
    lines += [f"- {name}: {value}" for name, value in report["conditions"].items() if name != "command"]
    header = (
        "model", "v", "batch", "method", "mode", "time to first token, ms (quartiles)", "speed-up",
        "bound (roofline)", "share of bound", "without vision tower, ms (quartiles)", "speed-up", "bound (roofline)",
        "share of bound", "per output token, ms", "stock / this", "TFLOPs", "TFLOP/s", "peak memory, MB",
    )  # fmt: skip
    lines += ["", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in report["results"]]
    lines += [
        "",
        "Speed-ups are over the faster mode of the stock class. Bounds: what the counted FLOPs allow and, in brackets, "
        "the roofline. TFLOPs are the language model's; peak memory is above weights and inputs, in eager mode.",
    ]
    for each in report["skipped"]:
        where = f"{each['model']}, images {each['images']}, batch {each['batch']}"
        lines.append(f"- skipped: {each['method']}, {each['mode']} ({where}): {each['reason']}")
    for each in report["loading"]:
        stock, shortv = (summary(each[name])["median_s"] for name in ("stock", "shortv"))
        lines.append(
            f"- loading {each['model']}: stock {stock:.3f} s, ShortV {shortv:.3f} s, ratio {shortv / stock:.3f}"
        )
    return "\n".join(lines)


def _cells(row: dict) -> list[str]:
    cells = [row["model"], str(row["visual_tokens"]), str(row["batch"]), row["method"], row["mode"]]
    for stage in BOUNDED:
        if stage not in row:
            cells += ["–"] * 4
            continue
        entry = row[stage]
        low, high = (f"{1000 * quartile:.1f}" for quartile in entry["quartiles_s"])
        cells += [
            f"{1000 * entry['median_s']:.1f} ({low}–{high})",
            f"{entry['speed_up']:.2f}×",
            f"{entry['bound']:.2f}× ({entry['roofline_bound']:.2f}×)",
            f"{entry['share_of_bound']:.0%}",
        ]
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
    panels = {}
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


def write(report: dict, output: Path, chart: bool):
    """Write `output` (JSON), and beside it the table (.md) and, if `chart`, the speed-up against N (.png)."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(markdown(report) + "\n", encoding="utf-8")
    panels = sweeps(report) if chart else {}
    if panels:
        plots.plot_curves(panels, "frozen layers N", output.with_suffix(".png"))
