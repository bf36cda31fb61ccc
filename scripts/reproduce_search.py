"""What a search finds, against every method alone at the same FLOPs, on questions that neither has seen.

    python scripts/reproduce_search.py                                      # the demonstration model

Layers are ranked and schedules searched on `--samples` samples (half of them judge). Then, on `--questions` held-out ones:
accuracy (the whole generated answer is right) with an exact paired p value against the dense model (McNemar), the KL
divergence from it at the first answer token with its standard error, counted FLOPs and cache of the language model's prefill,
and the time of a prefill of `--batch` rows, vision tower included, all rows in turn, as a median of ratios within a round.
Rows: ShortV with N layers by Layer Contribution, and at its FLOPs the search, VTW, FastV, VTC-CLS, random and downsample; and
what the search chooses within `--max-kl`. The figure has the KL of more points of each. Writes OUTPUT.json, .md and .png.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shortv_hf.data import outputs, scoring
from shortv_hf.data.inputs import to_device
from shortv_hf.data.sources import Samples
from shortv_hf.flops import flops_ratio
from shortv_hf.flops.meters import profile_prefill, time_prefill
from shortv_hf.hub import load
from shortv_hf.layer_contribution import LayerRanking, rank_layers
from shortv_hf.layer_contribution.kl import Settings, kl_to_dense
from shortv_hf.pictures import plots
from shortv_hf.search import SearchOptions, SearchResult, search
from shortv_hf.search.report import describe
from shortv_hf.search.result import Row, standard_error
from shortv_hf.search.space import matched, options_of


ROOT = Path(__file__).parent.parent
MATCHED = ("vtw", "fastv", "vtc_cls", "random", "downsample")
LEVELS = (1e-3, 3e-3, 1e-2, 3e-2)  # nats, of the table of FLOPs at a KL


def searches(model, samples, ranking: LayerRanking, numbers: Sequence[int], max_kl: float, folder: Path):
    """A search within `max_kl`, and one at the FLOPs of each number of layers; what was measured alone is shared."""
    t, v = ranking.text_tokens, ranking.visual_tokens
    found = {f"KL at most {max_kl:g}": search(model, samples, SearchOptions(max_kl=max_kl), progress=folder)}
    for n in numbers:
        share = flops_ratio(t, v, model.config, N=n)  # type: ignore[arg-type]  # means are no integers
        found[f"N = {n}"] = search(model, samples, SearchOptions(flops_ratio=share), progress=folder)
    return found


def rows_of(
    model, ranking: LayerRanking, found: dict[str, SearchResult], numbers: Sequence[int]
) -> list[tuple[str, str, Settings]]:
    """The table's rows: group, name, settings."""
    config, n_layers = model.config, model.config.get_text_config().num_hidden_layers
    t, v = round(ranking.text_tokens), round(ranking.visual_tokens)  # type: ignore[arg-type]  # it has samples
    rows = [("", "dense", Settings())]
    for group, result in found.items():
        if group.startswith("N = "):
            n = int(group.split()[-1])
            rows.append((group, f"LC, {n} of {n_layers} layers", Settings(ranking.layers(n))))
            for method in MATCHED:
                options = matched(method, config, t, v, flops_ratio(t, v, config, N=n))
                if options is not None:
                    rows.append((group, method, Settings((), options)))
        if result.best is not None:
            rows.append((group, "search", result.best.settings))
    return rows


class Measurement:
    """Held-out questions, and what a setting does to their answers."""

    def __init__(self, model, processor, questions: int, batch: int):
        self.model, self.processor = model, processor
        self.cases = scoring.held_out_cases(questions)
        self.batches = list(scoring.encode_batches(processor, self.cases, 50))
        self.timed = to_device(model, next(scoring.encode_batches(processor, self.cases, batch)))

    def using(self, settings: Settings):
        return self.model.using(shortv_layers=settings.shortv_layers, visual_reduction=settings.visual_reduction)

    def right(self, settings: Settings) -> list[bool]:
        with self.using(settings):
            answers = scoring.answer(self.model, self.processor, self.cases)
        return [scoring.is_right(text, str(case.answer)) for text, case in zip(answers, self.cases, strict=True)]

    def kl(self, settings: Sequence[Settings]) -> list[list[float]]:
        return kl_to_dense(self.model, self.batches, settings).tolist()

    def costs(self, settings: Settings) -> dict[str, Any]:
        with torch.inference_mode(), self.using(settings):
            return profile_prefill(self.model, self.timed)

    def seconds(self, settings: Sequence[Settings], rounds: int) -> list[list[float]]:
        """Of a prefill, by setting and round; all settings in each round."""
        times: list[list[float]] = [[] for _ in settings]
        with torch.inference_mode():
            for number in range(rounds + 2):
                for each, kept in zip(settings, times, strict=True):
                    with self.using(each):
                        start = time.perf_counter()
                        time_prefill(self.model, self.timed)
                        if number > 1:  # the first ones warm up
                            kept.append(time.perf_counter() - start)
        return times


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Exact two-sided p value of paired right and wrong answers."""
    worse = sum(a and not b for a, b in zip(one, other, strict=True))
    better = sum(b and not a for a, b in zip(one, other, strict=True))
    n = worse + better
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(worse, better) + 1)) / 2**n)


def measure(measurement: Measurement, rows: list[tuple[str, str, Settings]], rounds: int) -> list[dict]:
    settings = [each for _, _, each in rows]
    kls, times = measurement.kl(settings), measurement.seconds(settings, rounds)
    measured: list[dict] = []
    dense_right: list[bool] = []
    dense: dict[str, Any] = {}
    n_layers = measurement.model.config.get_text_config().num_hidden_layers
    for (group, name, each), kl, seconds in zip(rows, kls, times, strict=True):
        right, costs = measurement.right(each), measurement.costs(each)
        dense_right, dense = dense_right or right, dense or costs
        ratios = [first / own for first, own in zip(times[0], seconds, strict=True)]
        row = Row("", list(each.shortv_layers), each.visual_reduction, 0, 0, 0, 0, [])
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
        measured.append(
            {
                "group": group,
                "name": name,
                "what": describe(row, n_layers),
                "shortv_layers": row.shortv_layers,
                "visual_reduction": row.visual_reduction,
                "accuracy": sum(right) / len(right),
                "p_to_dense": mcnemar(dense_right, right),
                "kl": statistics.mean(kl),
                "kl_error": standard_error(kl),
                "flops_ratio": costs["language_model_flops"] / dense["language_model_flops"],
                "cache_ratio": costs["kv_tokens"] / dense["kv_tokens"],
                "prefill_ms": 1000 * statistics.median(seconds),
                "speed_up": quartiles[1],
                "speed_up_quartiles": [quartiles[0], quartiles[2]],
            }
        )
        print(f"{group or name}: {name}", file=sys.stderr)
    return measured


def measure_curves(
    measurement: Measurement, ranking: LayerRanking, found: dict[str, SearchResult]
) -> dict[str, list[tuple[float, float, float]]]:
    """FLOPs in percent, KL and its standard error on the held-out questions, of each method alone and of the search: of
    its results, the rows that no other beat where they were judged."""
    config = measurement.model.config
    n_layers, t, v = config.get_text_config().num_hidden_layers, ranking.text_tokens, ranking.visual_tokens
    unique = {str(row.settings): row for result in found.values() for row in result.frontier}
    frontier, lowest = [], math.inf
    for row in sorted(unique.values(), key=lambda row: (row.flops_ratio, row.kl)):
        if row.kl < lowest:
            frontier.append(row.settings)
            lowest = row.kl
    settings = {
        "search": frontier,
        "LC": [Settings(ranking.layers(n)) for n in range(1, n_layers + 1)],
        "VTW": [Settings((), {"method": "vtw", "k": k}) for k in range(1, n_layers)],
    }
    for method in MATCHED[1:]:
        settings[method] = [Settings((), each) for each in options_of(method, config, round(v), (0.75, 0.5, 0.25))]
    kls = iter(measurement.kl([each for group in settings.values() for each in group]))
    curves = {}
    for name, group in settings.items():
        points = []
        for each in group:
            kl = next(kls)
            share = flops_ratio(
                round(t), round(v), config, shortv_layers=each.shortv_layers, visual_reduction=each.visual_reduction
            )
            points.append((100 * share, statistics.mean(kl), standard_error(kl)))
        curves[name] = sorted(points)
    return curves


def flops_at(points: list[tuple[float, float, float]], level: float) -> float | None:
    """FLOPs in percent at which a curve's lower envelope comes down to a KL, between its points by the logarithm."""
    before: tuple[float, float] | None = None
    lowest = math.inf
    for flops, kl, _ in points:
        if kl >= lowest:
            continue
        lowest = kl
        if kl <= level:
            if before is None or kl <= 0:
                return flops
            share = math.log(before[1] / level) / math.log(before[1] / kl)
            return before[0] + share * (flops - before[0])
        before = flops, kl
    return None


def markdown(results: dict) -> str:
    lines = [
        "| at | method | FLOPs | KV cache | KL (nats) | accuracy | p | prefill |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        name = (
            row["name"]
            if row["name"] in ("dense",) or row["name"].startswith("LC")
            else f"{row['name']}: {row['what']}"
        )
        low, high = row["speed_up_quartiles"]
        cells = [
            row["group"], name, f"{row['flops_ratio']:.1%}", f"{row['cache_ratio']:.0%}",
            f"{row['kl']:.2g} ± {row['kl_error']:.1g}", f"{row['accuracy']:.1%}", f"{row['p_to_dense']:.2g}",
            f"{row['prefill_ms']:.0f} ms, {row['speed_up']:.2f}× ({low:.2f} to {high:.2f})",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"| FLOPs at a KL of | {' | '.join(f'{level:g}' for level in LEVELS)} |",
        "|---|" + "---:|" * len(LEVELS),
    ]
    for name, values in results["flops_at"].items():
        cells = ["–" if value is None else f"{value:.1f} %" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ROOT / "hub_configs" / "shortv-shapes-demo"))
    parser.add_argument("--samples", type=int, default=200, help="to rank layers on and to search with")
    parser.add_argument("--questions", type=int, default=1400)
    parser.add_argument("--num-layers", type=int, nargs="+", default=[8, 10, 11], help="N of the rows")
    parser.add_argument("--max-kl", type=float, default=0.01)
    parser.add_argument("--batch", type=int, default=10, help="rows of a timed prefill")
    parser.add_argument("--rounds", type=int, default=15, help="of timing, 2 at least")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--progress", type=Path, help="folder for the searches' progress, to go on after a break")
    parser.add_argument("--output", type=Path, help="in a folder that exists; default search-MODEL")
    parser.add_argument("--overwrite", action="store_true", help="replace the files that --output names")
    args = parser.parse_args()
    output = args.output or Path(f"search-{Path(args.model).resolve().name}")
    files = [output.with_name(output.name + ending) for ending in (".json", ".md", ".png")]
    try:
        outputs.check_files(*files, overwrite=args.overwrite)
    except ValueError as error:
        parser.error(str(error))
    plots.check_matplotlib()
    model, processor = load(args.model, [], args.device, args.dtype, visual_reduction=None)
    samples = Samples("shapes", processor, args.samples)
    ranking = rank_layers(model, samples)
    found = searches(model, samples, ranking, args.num_layers, args.max_kl, args.progress)
    measurement = Measurement(model, processor, args.questions, args.batch)
    rows = measure(measurement, rows_of(model, ranking, found, args.num_layers), args.rounds)
    curves = measure_curves(measurement, ranking, found)
    results = {
        "conditions": {
            "command": shlex.join(["python", "scripts/reproduce_search.py", *sys.argv[1:]]),
            "model": Path(args.model).name,
            "samples": args.samples,
            "questions": args.questions,
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU",
            "threads": torch.get_num_threads(),
            "dtype": args.dtype,
            **outputs.versions(),
        },
        "order": ranking.order,
        "rows": rows,
        "curves": curves,
        "flops_at": {name: [flops_at(points, level) for level in LEVELS] for name, points in curves.items()},
    }
    report, table, picture = files
    outputs.write_text(report, json.dumps(results, indent=1) + "\n")
    outputs.write_text(table, markdown(results))
    print(markdown(results))
    labels = "FLOPs of the prefill (% of dense)", "KL from the dense model (nats)"
    with outputs.whole_file(picture) as drawn:
        title = f"{results['conditions']['model']}: {args.questions} held-out questions"
        plots.plot_costs(curves, *labels, drawn, title)


if __name__ == "__main__":
    main()
