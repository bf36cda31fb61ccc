"""The report of an evaluation: scores beside what they cost, paired differences, table, chart.

A difference is paired: each question's score under a method less its score under the dense model, in points of 100; its
standard error is that of a mean, the differences' deviation by the root of their number.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..benchmark.subjects import Method
from ..data import outputs
from ..hub.card import markdown_table
from ..pictures import plots
from .suites import KNOWN, Benchmark


if TYPE_CHECKING:
    from .run import Part


def make(
    conditions: dict,
    methods: Sequence[Method],
    benchmarks: Sequence[Benchmark],
    parts: Sequence["Part"],
    failed: Sequence[dict],
    left_out: Sequence[str],
) -> dict:
    """The report.

    Returns:
        `conditions`; in `results` a row for each task and method with `score`, `figures`, and against the dense model's
        answers `difference`, `error`, `questions` and `same_answers` (share); in `methods` the means of each method over
        the tasks that all methods have; what `failed`, and what was `left_out`.
    """
    by_name = {(part.task, part.method): part for part in parts}
    dense = methods[0].name
    rows = []
    for benchmark in benchmarks:
        for method in methods:
            part = by_name.get((benchmark.task, method.name))
            if part is not None:
                row: dict = {"task": part.task, "title": benchmark.title, "method": part.method, "metric": part.metric}
                row |= {"data_set": part.data_set, "score": part.score}
                row["answered"] = len(part.questions or part.answers)  # some tasks score a part of what they ask
                base = by_name.get((benchmark.task, dense))
                rows.append({**row, **({} if base is None else compare(part, base)), "figures": part.figures})
    whole = [each for each in benchmarks if all((each.task, method.name) in by_name for method in methods)]
    means = [_means(method.name, whole, by_name, dense) for method in methods] if whole else []
    return {
        "conditions": conditions,
        "results": rows,
        "methods": means,
        "failed": list(failed),
        "left_out": list(left_out),
    }


def compare(part: "Part", dense: "Part") -> dict:
    """A method against the dense model, question by question."""
    common = [name for name in part.questions if name in dense.questions]
    found: dict = {"questions": len(common)}
    if common:
        found["difference"], found["error"] = paired_difference(
            [part.questions[name] for name in common], [dense.questions[name] for name in common]
        )
    answered = [name for name in part.answers if name in dense.answers]
    if answered:
        found["same_answers"] = sum(part.answers[name] == dense.answers[name] for name in answered) / len(answered)
    return found


def paired_difference(scores: Sequence[float], baseline: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the differences, and its standard error; of a single one there is none."""
    differences = [ours - theirs for ours, theirs in zip(scores, baseline, strict=True)]
    mean = sum(differences) / len(differences)
    if len(differences) < 2:
        return mean, None
    return mean, statistics.stdev(differences) / math.sqrt(len(differences))


def _means(method: str, benchmarks: Sequence[Benchmark], by_name: dict, dense: str) -> dict:
    """A method over several tasks: its scores by what they can be at most (MME's by 2000, as in Table 2 of the ShortV
    paper), how much of the dense model's mean they are, and its figures by the dense model's."""
    ours = [by_name[each.task, method] for each in benchmarks]
    theirs = [by_name[each.task, dense] for each in benchmarks]
    found: dict = {"method": method}
    if all(each.task in KNOWN for each in benchmarks):
        average, base = (
            sum(100 * part.score / each.of for part, each in zip(parts, benchmarks, strict=True)) / len(parts)
            for parts in (ours, theirs)
        )
        found |= {"average": average, "retained": average / base if base else None}
    for name in ("flops_ratio", "model_flops_ratio", "kv_ratio", "memory_ratio"):
        values = [part.figures[name] for part in ours if name in part.figures]
        if values:
            found[name] = sum(values) / len(values)
    pairs = [
        (part.figures["first_token_s"], base.figures["first_token_s"])
        for part, base in zip(ours, theirs, strict=True)
        if "first_token_s" in part.figures and "first_token_s" in base.figures
    ]
    if pairs:
        for name in ("first_token_s", "first_token_low_s", "first_token_high_s"):
            values = [part.figures[name] for part in ours if name in part.figures]
            if values:
                found[name] = sum(values) / len(values)
        found["speed_up"] = math.exp(sum(math.log(base / own) for own, base in pairs) / len(pairs))
    return found


def markdown(report: dict) -> str:
    """The report as Markdown: the methods over all tasks, their differences to the dense model, the conditions."""
    titles = _titles(report)
    methods = list(dict.fromkeys(row["method"] for row in report["results"]))
    rows = {(row["method"], row["title"]): row for row in report["results"]}
    means = {each["method"]: each for each in report["methods"]}
    with_average = len(titles) > 1 and any("average" in each for each in means.values())
    head = ["method", "FLOPs", "with tower", "KV cache", "time to first token", "speed-up", *titles]
    head += ["average", "retained"] if with_average else []
    table = []
    for method in methods:
        mean = means.get(method, {})
        cells = [method, *(_percent(mean.get(name)) for name in ("flops_ratio", "model_flops_ratio", "kv_ratio"))]
        cells += [_milliseconds(mean), _times(mean.get("speed_up"))]
        cells += [f"{rows[method, title]['score']:.1f}" if (method, title) in rows else "–" for title in titles]
        if with_average:
            average = mean.get("average")
            cells += ["–" if average is None else f"{average:.1f}", _percent(mean.get("retained"))]
        table.append(cells)
    lines = []
    if table:
        figures = [f"{title}: {_first(report, title)}" for title in titles]
        lines += [markdown_table(head, table), "", f"Scores: {'; '.join(figures)}."]
        lines.append(
            "FLOPs: counted, of the language model's prefill, and with the vision tower; KV cache: tokens held after it; both by "
            "the dense model's. Time: of a batch, medians (quartiles) over the batches, the methods one after the other; on a busy "
            "machine it says little, and `shortv bench` measures speed."
        )
        if with_average:
            lines.append(
                "Average: of the scores by the most that they can be; retained: by the dense model's average."
            )
    compared = [
        [row["title"], row["method"], str(row["questions"]), _difference(row), _percent(row.get("same_answers"))]
        for row in report["results"]
        if row["method"] != methods[0] and "questions" in row
    ]
    if compared:
        columns = ["task", "method", "questions", "difference to dense", "same answer as dense"]
        lines += ["", markdown_table(columns, compared), ""]
        lines.append(
            "Difference: paired, of single questions, in points of 100, ± its standard error, which is 0 where no answer changed "
            "from right to wrong or back."
        )
    lines += [f"- failed: {each['task']}, {each['method']}: {each['reason']}" for each in report["failed"]]
    lines += [f"- left out: {reason}" for reason in report["left_out"]]
    return "\n".join([*lines, "", *(f"- {name}: {value}" for name, value in report["conditions"].items())])


def _first(report: dict, title: str) -> str:
    """What the scores of a benchmark are."""
    row = next(row for row in report["results"] if row["title"] == title)
    return f"{row['metric']} of {row['task']}, {row['answered']} questions"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _milliseconds(mean: dict) -> str:
    if "first_token_s" not in mean:
        return "–"
    spread = [mean[f"first_token_{end}_s"] for end in ("low", "high") if f"first_token_{end}_s" in mean]
    quartiles = f" ({'–'.join(f'{1000 * each:.1f}' for each in spread)})" if spread else ""
    return f"{1000 * mean['first_token_s']:.1f} ms{quartiles}"


def _times(factor: float | None) -> str:
    return "–" if factor is None else f"{factor:.2f}×"


def _difference(row: dict) -> str:
    if "difference" not in row:
        return "–"
    error = "" if row["error"] is None else f" ± {row['error']:.1f}"
    return f"{row['difference']:+.1f}{error}"


def write(report: dict, folder: Path):
    """Write report.json, report.md and, where matplotlib is installed and there is something to draw, report.png."""
    outputs.write_text(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    outputs.write_text(folder / "report.md", markdown(report) + "\n")
    points = trade_offs(report)
    if points and plots.can_draw():
        with outputs.whole_file(folder / "report.png") as chart:
            plots.plot_trade_offs(points, chart, f"{report['conditions']['model']}: {', '.join(_titles(report))}")


def _titles(report: dict) -> list[str]:
    return list(dict.fromkeys(row["title"] for row in report["results"]))


def trade_offs(report: dict) -> dict[str, dict[str, tuple[float, float]]]:
    """Panels of the chart: by what is on the horizontal axis, points (cost, score) of the methods. The score is the average,
    or of a single task its own."""
    titles, batch = _titles(report), report["conditions"].get("batch_size")
    panels: dict[str, dict[str, tuple[float, float]]] = {}
    for each in report["methods"]:
        score = each.get("average")
        if score is None and len(titles) == 1:
            score = next(row["score"] for row in report["results"] if row["method"] == each["method"])
        for name, label, factor in (
            ("flops_ratio", "FLOPs of the language model's prefill, % of the dense model's", 100),
            ("first_token_s", f"time to the first tokens of a batch of {batch}, ms", 1000),
        ):
            if score is not None and name in each:
                panels.setdefault(label, {})[each["method"]] = (factor * each[name], score)
    return panels
