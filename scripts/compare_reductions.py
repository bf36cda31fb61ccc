"""Reduction methods at matched FLOPs on questions about drawn shapes: accuracy, KL, counted FLOPs, cache.

    python scripts/compare_reductions.py MODEL_DIR --output scripts/results/reductions.json

Rows: the dense model, ShortV with the layers of the model's config, each method with the options whose prefill costs
closest to ShortV's (`--ratio` for another target), and ShortV with each. PruMerge and adaptive PruMerge+ have no option
that sets their cost; they come as they are. Writes JSON and, beside it, the table as Markdown.

Accuracy: the whole generated answer is right, held-out scenes (`shapes.held_out_questions`). KL: KL(dense || row) in nats
between the distributions of the first answer token, mean over the questions. FLOPs: `torch.utils.flop_counter` on the
language model's prefill; cache: bytes of keys and values after it; means over the first `--measured` questions.
"""

import argparse
import json
import math
import platform
import statistics
import sys
from pathlib import Path

import torch

from shortv_hf.data import outputs
from shortv_hf.data import scoring as evaluation
from shortv_hf.data.inputs import to_device
from shortv_hf.data.sources import Case, encode
from shortv_hf.flops import prefill_flops
from shortv_hf.flops.meters import language_model_flops
from shortv_hf.hub.loading import load
from shortv_hf.layer_contribution.kl import Settings, kl_to_dense
from shortv_hf.reduction import METHODS
from shortv_hf.search.space import matched
from shortv_hf.upstream import find_cache


@torch.inference_mode()
def cost(model, processor, cases: list[Case]) -> tuple[float, float]:
    """Mean counted FLOPs of the prefill and bytes of its cache."""
    flops, nbytes = [], []
    for case in cases:
        inputs = to_device(model, encode(case, processor))
        flops.append(language_model_flops(model, inputs))
        cache = find_cache(model.model(**inputs, use_cache=True))
        nbytes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
    return statistics.mean(flops), statistics.mean(nbytes)


def compare(
    model, processor, n: int, batch_size: int, max_new_tokens: int, measured: int, ratio: float | None
) -> dict:
    """The rows; see the module's docstring."""
    config = model.config
    cases = evaluation.held_out_cases(n)
    batches = list(evaluation.encode_batches(processor, cases, batch_size))
    ids = encode(cases[0], processor)["input_ids"]
    v = int((ids == config.image_token_id).sum())
    t = ids.shape[1] - v
    layers = list(config.shortv_layers)
    if ratio is None:
        dense = prefill_flops(t, v, config, N=0)
        ratio = prefill_flops(t, v, config, shortv_layers=layers) / dense
    variants = [("dense", [], None), ("ShortV", layers, None)]
    for method in METHODS:
        options = matched(method, config, t, v, ratio)
        if options is not None:
            variants += [(method, [], options), (f"ShortV + {method}", layers, options)]
    rows, reference = [], None
    for name, frozen, options in variants:
        print(f"{name} ...", file=sys.stderr)
        with model.using(shortv_layers=frozen, visual_reduction=options):
            answers = evaluation.answer(model, processor, cases, batch_size, max_new_tokens)
            flops, nbytes = cost(model, processor, cases[:measured])
        reference = (flops, nbytes) if reference is None else reference
        accuracy = evaluation.accuracy(answers, cases)["overall"]
        rows.append(
            {
                "name": name,
                "visual_reduction": options,
                "shortv_layers": frozen,
                "accuracy": accuracy,
                "standard_error": math.sqrt(accuracy * (1 - accuracy) / n),
                "kl_nats": kl_to_dense(model, batches, [Settings(frozen, options)]).mean().item(),
                "prefill_flops": flops,
                "flops_ratio": flops / reference[0],
                "cache_bytes": nbytes,
                "cache_ratio": nbytes / reference[1],
            }
        )
    return {"text_tokens": t, "visual_tokens": v, "target_ratio": ratio, "rows": rows}


def markdown(report: dict) -> str:
    lines = [
        "| method | options | accuracy | KL (nats) | prefill FLOPs | cache |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        options = ", ".join(f"{k} {v}" for k, v in (row["visual_reduction"] or {}).items() if k != "method")
        accuracy = f"{row['accuracy']:.1%} ± {row['standard_error']:.1%}"
        cells = (row["name"], options, accuracy, f"{row['kl_nats']:.4f}", f"{row['flops_ratio']:.1%}")
        lines.append(f"| {' | '.join(cells)} | {row['cache_ratio']:.1%} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hub id or directory")
    parser.add_argument("--questions", type=int, default=700)
    parser.add_argument("--measured", type=int, default=10, help="questions whose FLOPs and cache are measured")
    parser.add_argument(
        "--ratio", type=float, help="FLOPs ratio to match; default: that of ShortV with the config's layers"
    )
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the table goes beside it as .md")
    parser.add_argument("--overwrite", action="store_true", help="replace the two files")
    arguments = parser.parse_args()
    table = arguments.output.with_suffix(".md")
    if table == arguments.output:
        parser.error(f"--output is {arguments.output}, which is where the table goes; name a .json file")
    try:
        outputs.check_files(arguments.output, table, overwrite=arguments.overwrite)
    except ValueError as error:
        parser.error(str(error))
    model, processor = load(arguments.model, None, arguments.device, arguments.dtype)
    report = compare(
        model,
        processor,
        arguments.questions,
        arguments.batch,
        arguments.max_new_tokens,
        min(arguments.measured, arguments.questions),
        arguments.ratio,
    )
    report["conditions"] = {
        "command": " ".join(["python", "scripts/compare_reductions.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.machine(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "questions": arguments.questions,
        **outputs.versions(),
    }
    outputs.write_text(arguments.output, json.dumps(report, indent=1) + "\n")
    outputs.write_text(table, markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
