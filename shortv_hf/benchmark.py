"""Speed of ShortV and other methods against the stock Hugging Face class, on real architectures with random weights.

On the CPU, float32, a small model, prompts of 576 and 2880 visual tokens:

    shortv bench --output cpu-small.json

On a GPU, one command per model of the paper (llava-1.5-7b, llava-1.5-13b, llava-next-7b, llava-next-13b):

    shortv bench --device cuda --dtype bfloat16 --models llava-1.5-7b --batch 1 4 8 --repeats 15 --output llava-1.5-7b.json

`--models` takes ShortV repos of any family too, of which the configs alone are read. `python scripts/benchmark.py` in a
checkout is the same. Beside the JSON file there is a Markdown table; both are written anew after every prompt. Where
several numbers of frozen layers were measured, a chart follows at the end.

Memory of long prompts, without timing: `--images 5 10 20 35 --repeats 0 --methods shortv --num-layers 10`.
Time to load a checkpoint: `--loading`.

How it measures: all methods take turns in every repetition, so that drift hits all of them; medians with quartiles, and
speed-ups as the median of the ratios within a repetition.
Methods run in eager mode; those that `--compile` names run a second time with text model and vision tower compiled by
torch, each in a graph of its own: outside them, ShortV can plan with the exact number of text tokens. A speed-up is over
the faster mode of the stock class. Decoding is measured in eager mode only, since the cache grows from step to step.
"""

import argparse
import platform
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from . import benchmark_report as reports
from . import outputs, plots
from .benchmark_loading import time_loading
from .benchmark_meters import profile_prefill, time_decoding, time_prefill, vision_parts
from .benchmark_models import METHODS, STOCK, Method, build_models, choose_methods, find_subject, make_inputs
from .roofline import Peak, device_peak, prefill_seconds
from .trial import check_decoding
from .upstream import text_model


WARM_UP = {"cpu": 1, "cuda": 3}  # rounds; on CUDA, a compiled forward records its graph in the second
COMPILED = {"cpu": {"dynamic": False}, "cuda": {"dynamic": False, "mode": "reduce-overhead"}}  # of torch.compile
DYNAMIC = {"dynamic": True}
RECOMPILE_LIMIT = 64  # one graph per method is meant, not a sign of trouble
# Out of memory, no graph, wrong tokens: the other methods' figures stand.
FAILURES = (RuntimeError, AssertionError, ValueError)


@dataclass(frozen=True)
class Variant:
    """A method in a mode, "eager" or "compiled"."""

    method: Method
    mode: str


def compile_options(device: torch.device, dynamic: bool) -> dict:
    """Arguments of `torch.compile`."""
    return DYNAMIC if dynamic else COMPILED[device.type]


class Bench:
    """Two models with the same weights, and the switch between methods and modes.

    Args:
        subject: the model to measure.
        device, dtype: of weights and inputs.
        dynamic: compile graphs that serve prompts of any length.
    """

    def __init__(self, subject, device: torch.device, dtype: torch.dtype, dynamic: bool = False):
        self.dynamic = dynamic
        self.compile_options = compile_options(device, dynamic)
        self.stock, self.shortv = build_models(subject.config, device, dtype)
        self.n_layers = subject.config.get_text_config().num_hidden_layers
        self._compiled = {}

    def reset_compiled(self):
        """Forget the graphs, unless they are for any prompt: another one has other shapes."""
        if not self.dynamic:
            self._compiled.clear()
            torch._dynamo.reset()

    def refusal(self, method: Method) -> str | None:
        """Why the installed package cannot run a method, or `None`."""
        try:
            self.shortv.set_visual_reduction(method.visual_reduction)
        except ValueError as error:
            return str(error)
        return None

    @contextmanager
    def running(self, variant: Variant):
        """The model, set up to run a variant."""
        method = variant.method
        model = self.stock if method == STOCK else self.shortv
        if method != STOCK:
            model.set_shortv_layers(list(method.shortv_layers))
            model.set_visual_reduction(method.visual_reduction)
        parts = (vision_parts(model.model)[0], text_model(model.model)) if variant.mode == "compiled" else ()
        for part in parts:
            if part not in self._compiled:
                self._compiled[part] = torch.compile(part.forward, **self.compile_options)
            part.forward = self._compiled[part]
        try:
            yield model
        finally:
            for part in parts:
                del part.forward

    def profile(self, variants: list[Variant], inputs: dict, label: str) -> tuple[dict, list[dict]]:
        """Counted FLOPs and memory per method, and what could not run, or decodes wrongly: figures of a method that loses
        a part of its cache would flatter it."""
        profiles, skipped = {}, []
        for variant in logging.tqdm(variants, desc=f"{label}, FLOPs and memory"):
            reason = self.refusal(variant.method)
            if reason is None:
                try:
                    with self.running(variant) as model:
                        self._check(model, variant.method, inputs)
                        profiles[variant.method] = profile_prefill(model, inputs)
                except FAILURES as error:
                    reason = _first_line(error)
            if reason is not None:
                skipped.append({"method": variant.method.name, "mode": variant.mode, "reason": reason})
        return profiles, skipped

    def _check(self, model, method: Method, inputs: dict):
        reduction = None if method == STOCK else model.model._active_reduction()
        if reduction is None or not reduction.looks_at_last_token:
            rows = len(inputs["input_ids"])
            check_decoding(model, {name: value[: len(value) // rows] for name, value in inputs.items()}, steps=3)

    def time(self, variants: list[Variant], inputs: dict, repeats: int, label: str) -> tuple[dict, list[dict]]:
        """Seconds by variant and stage, one per repetition, and what could not run."""
        times, skipped = {variant: {} for variant in variants}, []
        token, warm_up = inputs["input_ids"][:, -1:], WARM_UP[self.stock.device.type]
        for round_ in logging.tqdm(range(repeats + warm_up if repeats else 0), desc=f"{label}, time"):
            for variant in list(times):
                try:
                    seconds = self._time_once(variant, inputs, token)
                except FAILURES as error:
                    skipped.append({"method": variant.method.name, "mode": variant.mode, "reason": _first_line(error)})
                    del times[variant]
                    continue
                if round_ >= warm_up:
                    for stage, value in seconds.items():
                        times[variant].setdefault(stage, []).append(value)
        return times, skipped

    def _time_once(self, variant: Variant, inputs: dict, token: torch.Tensor) -> dict:
        torch.compiler.cudagraph_mark_step_begin()  # the last forward's outputs are no longer needed
        with self.running(variant) as model, torch.inference_mode():
            seconds, cache = time_prefill(model, inputs)
            if variant.mode == "eager":
                seconds["output_token"] = time_decoding(model, cache, token)
        return seconds


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def variants_of(methods: list[Method], compile_: str, n_frozen: int) -> list[Variant]:
    """Every method in eager mode; compiled too where `compile_` is "all", or is "some" and the method is the stock class
    or ShortV alone with `n_frozen` layers."""
    variants = [Variant(method, "eager") for method in methods]
    for method in methods:
        alone = method.visual_reduction is None and len(method.shortv_layers or ()) == n_frozen
        if compile_ == "all" or (compile_ == "some" and (method == STOCK or alone)):
            variants.append(Variant(method, "compiled"))
    return variants


def measure_prompt(bench: Bench, variants: list[Variant], inputs: dict, repeats: int, peak: Peak, label: str):
    """Rows of the report for one prompt, and what was skipped.

    The bound of a stage is what the method's FLOPs allow, counted; the roofline bound takes the least time of the
    language model on the device, and everything else at the peak of its arithmetic.
    """
    bench.reset_compiled()
    profiles, skipped = bench.profile([each for each in variants if each.mode == "eager"], inputs, label)
    left = [variant for variant in variants if variant.method in profiles] if STOCK in profiles else []
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        times, failed = bench.time(left, inputs, repeats, label)
    if not any(variant.method == STOCK for variant in times):  # no baseline
        reason = "the stock class could not be measured"
        failed += [{"method": each.method.name, "mode": each.mode, "reason": reason} for each in times]
        times = {}
    batch, config = len(inputs["input_ids"]), bench.shortv.config
    v = int((inputs["input_ids"][0] == config.image_token_id).sum())
    t = inputs["input_ids"].shape[1] - v
    rows = []
    for variant, seconds in times.items():
        method, profile = variant.method, profiles[variant.method]
        least = prefill_seconds(
            method.per_layer(v, bench.n_layers), t, config, peak, batch=batch, value_bytes=bench.stock.dtype.itemsize
        )
        rest = (profile["flops"] - profile["language_model_flops"]) / peak.flops_per_s
        rows.append(
            {
                "text_tokens": t,
                "visual_tokens": v,
                "batch": batch,
                "method": method.name,
                "mode": variant.mode,
                "shortv_layers": None if method == STOCK else list(method.shortv_layers),
                "visual_reduction": method.visual_reduction,
                **profile,
                "roofline_s": {"language_model": least, "time_to_first_token": least + rest},
                "seconds": seconds,
            }
        )
    return reports.add_speed_ups(rows), [*skipped, *failed]


def conditions(arguments, command: str, device: torch.device, peak: Peak) -> dict:
    """What a figure depends on."""
    return {
        "command": command,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "attention": "sdpa",
        "compiled": {**compile_options(device, arguments.dynamic), "methods": arguments.compile},
        "repeats": arguments.repeats,
        "peak_flops_per_s": peak.flops_per_s,
        "peak_bytes_per_s": peak.bytes_per_s,
        "peak_source": peak.source,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere the platform's name
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def parse_arguments(arguments: list[str], program: str) -> argparse.Namespace:
    """The command line. Prints a message and exits with 2 on a mistake in it."""
    parser = argparse.ArgumentParser(
        program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["cpu-small"], help="of those above, or ShortV repos (default cpu-small)")
    add("--images", nargs="+", type=_positive, help="images per prompt; default 1, of cpu-small 1 and 5")
    add("--text-tokens", type=_positive, default=64, help="per row (default 64)")
    add("--batch", nargs="+", type=_positive, default=[1], help="rows (default 1)")
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="beside the stock class (default all)")
    add("--num-layers", nargs="+", type=_positive, help="numbers of frozen layers; default those of Tables 3 and 4")
    add(
        "--compile",
        choices=("none", "some", "all"),
        help="measured compiled as well: stock and ShortV at the paper's N (some, the default on cuda), all, or none "
        "(the default on the CPU)",
    )
    add(
        "--dynamic",
        action="store_true",
        help="compile graphs for prompts of any length; without it there is one per prompt, on cuda with CUDA graphs",
    )
    add("--repeats", type=_not_negative, default=5, help="timed rounds (default 5); 0: FLOPs and memory only")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default auto: the GPU, or the CPU if there is none)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add(
        "--peak-tflops", type=float, help="of the device in this dtype, for the roofline; default: data sheet or probe"
    )
    add("--bandwidth-gbs", type=float, help="of its memory, in GB/s; with --peak-tflops")
    add("--loading", action="store_true", help="time from_pretrained on a generated checkpoint as well")
    add("--output", type=Path, help="a .json file in a folder that exists; table and chart are written beside it")
    add("--overwrite", action="store_true", help="replace the files that --output names")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, program: str = "shortv bench"):
    """The command. Raises `ValueError` for options that do not fit the machine or the models."""
    given = sys.argv[1:] if arguments is None else arguments
    arguments = parse_arguments(given, program)
    if arguments.output is not None and arguments.output.suffix != ".json":
        raise ValueError(f"--output is {arguments.output}; it must end in .json")
    if arguments.output is not None:
        written = [arguments.output.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
        outputs.check_files(*written, overwrite=arguments.overwrite)
    if arguments.loading and arguments.repeats == 0:
        raise ValueError("--loading takes times; --repeats 0 takes none")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(arguments.device)
    if device.type not in COMPILED:
        raise ValueError(f"--device is {arguments.device}; this benchmark knows cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {arguments.device}, but torch finds no GPU")
    if device.index is not None:
        torch.cuda.set_device(device)  # events and statistics are the current device's
    arguments.compile = arguments.compile or ("some" if device.type == "cuda" else "none")
    if arguments.dynamic and arguments.compile == "none":
        raise ValueError("--dynamic is about compiled methods; --compile is none, valid with it are some and all")
    dtype = getattr(torch, arguments.dtype)
    subjects = {name: find_subject(name) for name in arguments.models}
    chosen = {name: choose_methods(each, arguments.methods, arguments.num_layers) for name, each in subjects.items()}
    peak = device_peak(device, dtype, arguments.peak_tflops, arguments.bandwidth_gbs)
    command = " ".join([program, *given])
    report = {"conditions": conditions(arguments, command, device, peak), "results": [], "skipped": [], "loading": []}
    chart = arguments.output is not None and _can_draw()

    for name, subject in subjects.items():
        torch.manual_seed(0)
        bench = Bench(subject, device, dtype, arguments.dynamic)
        variants = variants_of(chosen[name], arguments.compile, len(subject.config.shortv_layers))
        for images in arguments.images or subject.images:
            for batch in arguments.batch:
                label = f"{name}, {images} image{'s' if images > 1 else ''}, batch {batch}"
                inputs = make_inputs(bench.stock, arguments.text_tokens, images, batch)
                rows, skipped = measure_prompt(bench, variants, inputs, arguments.repeats, peak, label)
                for each in skipped:
                    print(f"{label}: skipped {each['method']}, {each['mode']}: {each['reason']}", file=sys.stderr)
                report["results"] += [{"model": name, "images": images, **row} for row in rows]
                report["skipped"] += [{"model": name, "images": images, "batch": batch, **each} for each in skipped]
                if arguments.output is not None:
                    reports.write(report, arguments.output)
        if arguments.loading:
            report["loading"].append({"model": name, **time_loading(bench.stock, bench.shortv, arguments.repeats)})
        del bench
    if arguments.output is not None:
        reports.write(report, arguments.output)
    print(reports.markdown(report))
    if chart:
        reports.draw(report, arguments.output)


def _can_draw() -> bool:
    try:
        plots.check_matplotlib()
    except ValueError as error:
        print(f"no chart: {error}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    main()
