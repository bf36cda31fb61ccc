"""Where a prefill's time goes on a GPU: the kernels of the language model by kind, and how long the device waits for them.

    python scripts/profile_kernels.py --models llava-1.5-7b --batch 1,8 --output kernels.json

Models and methods are those of `shortv bench`: real architectures, random weights, SDPA, eager. Per method: seconds of the
language model, the median of `--repeats` passes without a profiler; then, of one pass under torch's, how many kernels ran, how
long they took together (`busy`), and what part of that each kind took. A device that is busy for less than the time waits
for the host to launch. Writes JSON, with the kernels that took longest by name, and beside it the table as Markdown.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from shortv_hf.benchmark.run import Bench, Variant
from shortv_hf.benchmark.subjects import choose_methods, find_subject, make_inputs
from shortv_hf.command_line.options import parse_numbers
from shortv_hf.data import outputs
from shortv_hf.flops.meters import time_prefill
from shortv_hf.upstream import text_model


KINDS = {  # parts of kernels' names; the first that fits
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "products": ("nvjet", "gemm", "gemv", "cutlass", "xmma", "splitk"),
    "moving": ("gather", "scatter", "index", "cat", "copy", "memcpy", "memset", "sort"),
}
REST = "rest"  # norms, activations, rotations, sums
WARM_UP = 3
LONGEST = 12  # kernels that the JSON names


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), REST)


def add_up(trace: dict) -> dict:
    """Of a Chrome trace: how many kernels and copies ran on the device, their seconds together and by kind, and those that
    took longest, by name: how often, and seconds."""
    seconds, by_name = dict.fromkeys([*KINDS, REST], 0.0), defaultdict(lambda: [0, 0.0])
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            seconds[kind_of(event["name"])] += event["dur"] / 1e6
            entry = by_name[event["name"][:120]]
            entry[0] += 1
            entry[1] += event["dur"] / 1e6
    return {
        "kernels": sum(count for count, _ in by_name.values()),
        "busy_s": sum(seconds.values()),
        "by_kind_s": seconds,
        "longest": dict(sorted(by_name.items(), key=lambda item: -item[1][1])[:LONGEST]),
    }


def trace_language_model(model: Any, inputs: dict) -> dict:
    """The Chrome trace of the text model in one forward pass."""
    profiler = torch.profiler.profile()  # of the host and of what device there is
    text = text_model(model.model)

    def start(*_):
        _synchronize(model.device)
        profiler.start()

    def stop(*_):
        _synchronize(model.device)
        profiler.stop()

    hooks = text.register_forward_pre_hook(start), text.register_forward_hook(stop)
    try:
        time_prefill(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return json.loads(file.read_text(encoding="utf-8", errors="replace"))


def _synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(subject, batches, names, num_layers, device, dtype, repeats: int) -> list[dict]:
    """A row per method and number of rows of one picture and 64 text tokens each."""
    torch.manual_seed(0)
    bench, rows = Bench(subject, device, dtype), []
    for batch in batches:
        inputs = make_inputs(bench.stock, 64, 1, batch)
        for method in choose_methods(subject, names, num_layers):
            with bench.running(Variant(method, "eager")) as model, torch.inference_mode():
                times = [time_prefill(model, inputs)[0]["language_model"] for _ in range(WARM_UP + repeats)][WARM_UP:]
                found = add_up(trace_language_model(model, inputs))
            rows.append({"batch": batch, "method": method.name, "median_s": statistics.median(times), **found})
            print(_line(rows[-1]), file=sys.stderr)
    return rows


def _line(row: dict) -> str:
    cells = [f"{1000 * row['median_s']:.1f}", f"{1000 * row['busy_s']:.1f}", str(row["kernels"])]
    cells += [f"{1000 * row['by_kind_s'][kind]:.1f}" for kind in ("products", "attention", "moving", REST)]
    return f"| {row['batch']} | {row['method']} | {' | '.join(cells)} |"


def markdown(report: dict) -> str:
    lines = [f"`{report['conditions']['command']}`", ""]
    lines += [f"- {name}: {value}" for name, value in report["conditions"].items() if name != "command"]
    for name, rows in report["models"].items():
        header = "| batch | method | language model, ms | busy, ms | kernels | products, ms | attention, ms | moving, ms | rest, ms |"
        lines += ["", f"{name}:", "", header, "|---" * 9 + "|", *map(_line, rows)]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="llava-1.5-7b", help="as shortv bench takes them, separated by commas")
    parser.add_argument("--batch", default="1", help="rows, e.g. 1,8")
    parser.add_argument("--methods", default="shortv", help="as shortv bench takes them, separated by commas")
    parser.add_argument("--num-layers", default="19", help="how many layers shortv freezes")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the table goes beside it as .md")
    parser.add_argument("--overwrite", action="store_true", help="replace the two files")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU")
    try:
        table = arguments.output.with_suffix(".md")
        outputs.check_files(arguments.output, table, overwrite=arguments.overwrite)
        batches, num_layers = (parse_numbers(text, "") for text in (arguments.batch, arguments.num_layers))
        subjects = {name: find_subject(name) for name in arguments.models.split(",")}
    except ValueError as error:
        parser.error(str(error))
    report: dict = {
        "conditions": {
            "command": shlex.join(["python", "scripts/profile_kernels.py", *sys.argv[1:]]),
            "device": torch.cuda.get_device_name(),
            "dtype": arguments.dtype,
            "repeats": arguments.repeats,
            **outputs.versions(),
        },
        "models": {},
    }
    device, dtype = torch.device("cuda"), getattr(torch, arguments.dtype)
    for name, subject in subjects.items():
        names = arguments.methods.split(",")
        report["models"][name] = measure(subject, batches, names, num_layers, device, dtype, arguments.repeats)
        outputs.write_text(arguments.output, json.dumps(report, indent=1) + "\n")
        outputs.write_text(table, markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
