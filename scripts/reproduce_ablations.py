"""The paper's ablations on a model and data at hand: which layers to freeze, and which tokens.

    python scripts/reproduce_ablations.py                                      # the demonstration model
    python scripts/reproduce_ablations.py llava-hf/llava-1.5-7b-hf --data gqa --device cuda --dtype bfloat16

Measures, against the number N of frozen layers, accuracy and the KL divergence from the dense model, for layers ranked by
Layer Contribution, greedily, by cosine similarity (Table 6) and at random (several seeds); retention of accuracy, as in
Figure 1(b); and freezing other tokens in N layers (Table 7). Layers are ranked on other samples than those of the
evaluation. Writes OUTPUT.json with the conditions, OUTPUT.md, OUTPUT.png and OUTPUT-layers.png.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from shortv_hf.data import outputs
from shortv_hf.data import scoring as evaluation
from shortv_hf.data.sources import encode, load_cases, split_sources
from shortv_hf.flops import flops_ratio
from shortv_hf.hub import load
from shortv_hf.layer_contribution import rank_layers
from shortv_hf.layer_contribution.freezing import frozen_tokens
from shortv_hf.layer_contribution.kl import Settings, kl_to_dense
from shortv_hf.pictures import plots
from shortv_hf.reduction import visual_reduction_from_text


ROOT = Path(__file__).parent.parent


def split_cases(data: str, samples: int, questions: int) -> tuple[list, list]:
    """Of every source, `samples` cases to rank layers on and `questions` others, those with answers, to evaluate on.

    Raises:
        ValueError: as `load_cases`, or if no case to evaluate on has an answer.
    """
    ranked, evaluated = [], []
    for name in split_sources(data):
        if name == "shapes":
            ranked += load_cases(name, samples)
            evaluated += evaluation.held_out_cases(questions)
        else:
            cases = list(load_cases(name, samples + questions))
            ranked += cases[:samples]
            evaluated += [case for case in cases[samples:] if case.answer is not None]
    if not evaluated:
        raise ValueError(f"{data} holds no answers to compare with")
    return ranked, evaluated


class Measurement:
    """Accuracy and KL of the model with some tokens frozen in some layers; what was measured is not measured again."""

    def __init__(self, model, processor, cases, batch_size, reduction: dict | None = None):
        self.model, self.processor, self.cases, self.batch_size = model, processor, cases, batch_size
        self.reduction = reduction  # on in all measurements; the KL is that from the model without
        self.batches = list(evaluation.encode_batches(processor, cases, batch_size))
        self.known = {}

    def __call__(self, layers: list[int], tokens: str = "visual") -> dict:
        key = (frozenset(layers), tokens)
        if key not in self.known:
            uncached = {} if tokens == "visual" else {"use_cache": False}  # see `frozen_tokens`
            with self.model.using(visual_reduction=self.reduction), frozen_tokens(self.model, layers, tokens):
                answers = evaluation.answer(self.model, self.processor, self.cases, self.batch_size, **uncached)
            self.known[key] = {
                "accuracy": evaluation.accuracy(answers, self.cases),
                "kl": kl_to_dense(self.model, self.batches, [Settings(layers, self.reduction, tokens)]).mean().item(),
            }
        return self.known[key]

    def random_tokens(self, layers: list[int], seed: int) -> dict:
        """As many tokens frozen as there are visual ones, but drawn from all tokens (Table 7 c)."""
        generator = torch.Generator().manual_seed(seed)

        def random_mask(inputs):
            visual = (inputs["input_ids"] == self.model.config.image_token_id).cpu()
            order = torch.rand(visual.shape, generator=generator)
            order[inputs["attention_mask"].cpu() == 0] = 2  # padding last
            ranks = order.argsort(1).argsort(1)
            return {"visual_mask": (ranks < visual.sum(1, keepdim=True)).to(inputs["input_ids"].device)}

        with frozen_tokens(self.model, layers):
            answers = evaluation.answer(
                self.model, self.processor, self.cases, self.batch_size, make_kwargs=random_mask
            )
        return {"accuracy": evaluation.accuracy(answers, self.cases)}


def measure_rankings(measure, rankings: dict[str, list], numbers: list[int]) -> dict:
    """Accuracy and KL by method and N; methods with several rankings get mean, lowest and highest."""
    curves = {}
    for method, group in rankings.items():
        curves[method] = []
        for n in numbers:
            results = [measure(ranking.layers(n)) for ranking in group]
            row = {"N": n}
            for name, values in (
                ("accuracy", [result["accuracy"]["overall"] for result in results]),
                ("kl", [result["kl"] for result in results]),
            ):
                row[name] = statistics.mean(values)
                if len(values) > 1:
                    row |= {f"{name}_low": min(values), f"{name}_high": max(values)}
            curves[method].append(row)
            print(f"{method:8} N = {n:2}  accuracy {row['accuracy']:.1%}  KL {row['kl']:.4f}", flush=True)
    return curves


def measure_frozen_tokens(measure, model, samples, kl: str, n: int, seeds: int) -> dict:
    """Table 7: N layers chosen for, and frozen for, other tokens."""
    chosen = {
        tokens: rank_layers(model, samples, tokens=tokens, kl=kl).layers(n) for tokens in ("visual", "text", "all")
    }
    random_tokens = [measure.random_tokens(chosen["all"], seed)["accuracy"]["overall"] for seed in range(seeds)]
    return {
        "none (dense)": {"layers": [], **measure([])},
        "visual tokens (ShortV)": {"layers": chosen["visual"], **measure(chosen["visual"])},
        "(a) text tokens": {"layers": chosen["text"], **measure(chosen["text"], "text")},
        "(b) all tokens": {"layers": chosen["all"], **measure(chosen["all"], "all")},
        "(c) random tokens, as many as visual ones": {
            "layers": chosen["all"],
            "accuracy": {"overall": statistics.mean(random_tokens)},
            "accuracy_low": min(random_tokens),
            "accuracy_high": max(random_tokens),
        },
    }


def markdown(results: dict) -> str:
    """Two tables: accuracy and KL by N, and by frozen tokens."""
    methods, numbers = list(results["curves"]), [row["N"] for row in results["curves"]["LC"]]
    lines = [f"| accuracy / KL | {' | '.join(methods)} | FLOPs |", "| --- |" + " ---: |" * (len(methods) + 1)]
    for index, n in enumerate(numbers):
        cells = []
        for method in methods:
            row = results["curves"][method][index]
            spread = f" ({row['accuracy_low']:.1%} to {row['accuracy_high']:.1%})" if "accuracy_low" in row else ""
            cells.append(f"{row['accuracy']:.1%}{spread} / {row['kl']:.3g}")
        ratio = results["flops_ratio"][index]  # of ShortV alone
        lines.append(f"| N = {n} | {' | '.join(cells)} | {'' if ratio is None else f'{ratio:.1%}'} |")
    if results["frozen_tokens"] is None:
        return "\n".join(lines) + "\n"
    lines += ["", f"| frozen in {results['N']} layers | accuracy | KL |", "| --- | ---: | ---: |"]
    for name, row in results["frozen_tokens"].items():
        kl = f"{row['kl']:.3g}" if "kl" in row else ""
        lines.append(f"| {name} | {row['accuracy']['overall']:.1%} | {kl} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ROOT / "hub_configs" / "shortv-shapes-demo"))
    parser.add_argument("--data", default="shapes", help="as for shortv lc")
    parser.add_argument("--samples", type=int, default=100, help="of each source, to rank the layers on")
    parser.add_argument("--greedy-samples", type=int, help="about so many of them for the greedy ranking; default all")
    parser.add_argument("--questions", type=int, default=700, help="of each source, to measure accuracy and KL on")
    parser.add_argument("--kl", default="forward", choices=("forward", "reverse"))
    parser.add_argument("--seeds", type=int, default=3, help="random rankings")
    parser.add_argument("--num-layers", type=int, help="N of the ablation on tokens; default 60 %% of the layers")
    parser.add_argument("--reduction", default="none", help="with it on, as for shortv chat; leaves out Table 7")
    parser.add_argument("--every", type=int, default=2, help="measure every so many N")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, help="in a folder that exists; default ablations-MODEL")
    parser.add_argument("--overwrite", action="store_true", help="replace the files that --output names")
    args = parser.parse_args()
    output = args.output or Path(f"ablations-{Path(args.model).resolve().name}")
    files = [output.with_name(output.name + ending) for ending in (".json", ".md", ".png", "-layers.png")]
    try:
        outputs.check_files(*files, overwrite=args.overwrite)
    except ValueError as error:
        parser.error(str(error))
    reduction = visual_reduction_from_text(args.reduction)
    plots.check_matplotlib()
    started = time.monotonic()
    model, processor = load(args.model, [], args.device, args.dtype)
    n_layers = model.config.text_config.num_hidden_layers
    n = args.num_layers or round(0.6 * n_layers)
    ranked, cases = split_cases(args.data, args.samples, args.questions)
    samples = [encode(case, processor) for case in ranked]
    greedy_samples = samples[:: max(1, len(samples) // (args.greedy_samples or len(samples)))]
    rankings = {
        "LC": [rank_layers(model, samples, kl=args.kl)],
        "greedy": [rank_layers(model, greedy_samples, "greedy", kl=args.kl)],
        "cosine": [rank_layers(model, samples, "cosine")],
        "random": [rank_layers(model, None, "random", seed=seed) for seed in range(args.seeds)],
    }
    text = rank_layers(model, samples, tokens="text", kl=args.kl)
    for name, group in rankings.items():
        print(f"{name}: {group[0].order}", flush=True)
    measure = Measurement(model, processor, cases, args.batch, reduction)
    numbers = sorted({*range(0, n_layers + 1, args.every), n, n_layers})
    curves = measure_rankings(measure, rankings, numbers)
    lc = rankings["LC"][0]
    dense = curves["LC"][0]["accuracy"]
    results = {
        "conditions": {
            "model": Path(args.model).name,
            "data": args.data,
            "ranked_on": len(samples),
            "greedy_ranked_on": len(greedy_samples),
            "evaluated_on": len(measure.cases),
            "kl": args.kl,
            "visual_reduction": reduction,
            "random_seeds": args.seeds,
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU",
            "dtype": args.dtype,
            **outputs.versions(),
            "seconds": None,
        },
        "N": n,
        "orders": {name: [ranking.order for ranking in group] for name, group in rankings.items()},
        "layer_contribution": {"visual": lc.scores, "text": text.scores},
        "flops_ratio": [
            flops_ratio(lc.text_tokens, lc.visual_tokens, model.config, N=i) if reduction is None else None
            for i in numbers
        ],
        "curves": curves,
        "retention": {row["N"]: row["accuracy"] / dense for row in curves["LC"]},
        "frozen_tokens": None,  # a method that drops visual tokens leaves nothing to freeze instead of text
    }
    if reduction is None:
        results["frozen_tokens"] = measure_frozen_tokens(measure, model, samples, args.kl, n, args.seeds)
    results["conditions"]["seconds"] = round(time.monotonic() - started)
    report, table, curves_picture, layers_picture = files
    outputs.write_text(report, json.dumps(results, indent=1) + "\n")
    outputs.write_text(table, markdown(results))
    print(markdown(results))
    with outputs.whole_file(curves_picture) as curves_file, outputs.whole_file(layers_picture) as layers_file:
        draw(results, curves_file, layers_file)


def draw(results: dict, curves_file: Path, layers_file: Path):
    """Accuracy, KL and retention against N; Layer Contribution by layer."""

    def curve(rows, name, scale=1.0):
        lines = {"x": [row["N"] for row in rows], "y": [row[name] * scale for row in rows]}
        for edge in ("low", "high"):
            if f"{name}_{edge}" in rows[0]:
                lines[edge] = [row[f"{name}_{edge}"] * scale for row in rows]
        return lines

    panels = {
        "accuracy (%)": {method: curve(rows, "accuracy", 100) for method, rows in results["curves"].items()},
        "KL from the dense model (nats)": {method: curve(rows, "kl") for method, rows in results["curves"].items()},
        "retained accuracy (%)": {
            "LC": {
                "x": [row["N"] for row in results["curves"]["LC"]],
                "y": [100 * value for value in results["retention"].values()],
            }
        },
    }
    plots.plot_curves(panels, "layers with frozen visual tokens", curves_file)
    scores = {f"{kind} tokens": values for kind, values in results["layer_contribution"].items()}
    label, made = "Layer Contribution (nats)", results["conditions"]
    title = f"{made['model']}: {label}\n{made['ranked_on']} samples ({made['data']}), {made['kl']} KL"
    plots.plot_layer_scores(scores, label, layers_file, log=True, title=title)


if __name__ == "__main__":
    main()
