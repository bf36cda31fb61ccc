"""Speed of ShortV and other methods against the stock Hugging Face class, on real architectures with random weights.

[`run_benchmark`] is `shortv bench` without its printing; how it measures is in the help of the command (`command.py`).
"""

import platform
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging

from ..data import outputs
from ..flops.meters import profile_prefill, time_decoding, time_loading, time_prefill, vision_parts
from ..flops.roofline import Peak, device_peak, prefill_seconds
from ..hub.trial import check_decoding
from ..upstream import text_model
from . import report as reports
from .subjects import METHODS, STOCK, Method, Subject, build_models, choose_methods, find_subject, make_inputs


WARM_UP = {"cpu": 1, "cuda": 3}  # rounds; on CUDA, a compiled forward records its graph in the second
COMPILED: dict[str, dict[str, Any]] = {
    "cpu": {"dynamic": False},
    "cuda": {"dynamic": False, "mode": "reduce-overhead"},
}  # of torch.compile
DYNAMIC = {"dynamic": True}
RECOMPILE_LIMIT = 64  # one graph per method is meant, not a sign of trouble
# Out of memory, no graph, wrong tokens: the other methods' figures stand.
FAILURES = (RuntimeError, AssertionError, ValueError)


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure, and how. In messages, an option has the name that it has on the command line.

    Attributes:
        models: names of `subjects.SUBJECTS` or ShortV repos.
        images: numbers of images per prompt; `None`: those of the model.
        text_tokens: per row.
        batch: numbers of rows.
        methods: beside the stock class, each as `subjects.choose_methods` takes it.
        num_layers: numbers of layers that "shortv" freezes; `None`: those of the model.
        compile: which methods run compiled as well; `None`: "some" on CUDA, else "none".
        dynamic: compile graphs for prompts of any length.
        repeats: timed rounds; 0: FLOPs and memory only.
        device: "auto", or a name that torch knows.
        dtype: of weights and inputs.
        peak_tflops, bandwidth_gbs: 10¹² FLOP/s and 10⁹ bytes/s of the device; `None`: of its data sheet or a probe.
        loading: time `from_pretrained` as well.
        output: a .json file to write, with the table (.md) beside it; `None`: nothing is written.
        overwrite: replace these files if they are there.
    """

    models: tuple[str, ...] = ("cpu-small",)
    images: tuple[int, ...] | None = None
    text_tokens: int = 64
    batch: tuple[int, ...] = (1,)
    methods: tuple[str, ...] = METHODS
    num_layers: tuple[int, ...] | None = None
    compile: Literal["none", "some", "all"] | None = None
    dynamic: bool = False
    repeats: int = 5
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    peak_tflops: float | None = None
    bandwidth_gbs: float | None = None
    loading: bool = False
    output: Path | None = None
    overwrite: bool = False


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
        self.stock: Any
        self.shortv: Any
        self.stock, self.shortv = build_models(subject.config, device, dtype)
        self._compiled: dict[Any, Callable] = {}

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
        model: Any = self.stock if method == STOCK else self.shortv
        if method != STOCK:
            model.set_shortv_layers(list(method.shortv_layers or ()))
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
        times: dict[Variant, dict[str, list[float]]] = {variant: {} for variant in variants}
        skipped = []
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
    lines = str(error).strip().splitlines()  # an assertion can be without words
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def variants_of(methods: list[Method], compile_: str | None, n_frozen: int) -> list[Variant]:
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
        rows.append(
            {
                "text_tokens": t,
                "visual_tokens": v,
                "batch": batch,
                "method": method.name,
                "mode": variant.mode,
                "shortv_layers": None if method == STOCK else list(method.shortv_layers or ()),
                "visual_reduction": method.visual_reduction,
                **profile,
                "roofline_s": roofline_seconds(method, profile, t, v, config, peak, batch, bench.stock.dtype.itemsize),
                "seconds": seconds,
            }
        )
    return reports.add_speed_ups(rows), [*skipped, *failed]


def roofline_seconds(
    method: Method, profile: dict, t: int, v: int, config, peak: Peak, batch: int, value_bytes: int
) -> dict | None:
    """Least seconds by stage on a device, for `batch` rows of `t` text and `v` visual tokens with weights of
    `value_bytes`; `None` where it depends on the pictures how many visual tokens the method keeps."""
    try:
        layers = method.per_layer(v, config)
    except ValueError:
        return None
    least = prefill_seconds(layers, t, config, peak, batch=batch, value_bytes=value_bytes)
    rest = (profile["flops"] - profile["language_model_flops"]) / peak.flops_per_s
    return {"language_model": least, "time_to_first_token": least + rest}


def conditions(options: BenchmarkOptions, command: str, device: torch.device, peak: Peak) -> dict:
    """What a figure depends on."""
    return {
        "command": command,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "attention": "sdpa",
        "compiled": {**compile_options(device, options.dynamic), "methods": options.compile},
        "repeats": options.repeats,
        "peak_flops_per_s": peak.flops_per_s,
        "peak_bytes_per_s": peak.bytes_per_s,
        "peak_source": peak.source,
        **outputs.versions(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere the platform's name
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def settle(options: BenchmarkOptions) -> BenchmarkOptions:
    """The options, with what "auto" and `compile=None` stand for on this machine.

    Raises:
        ValueError: a value is out of its range, options exclude each other or do not fit the machine, or the output
            cannot be written.
    """
    _check_ranges(options)
    if options.output is not None:
        if options.output.suffix != ".json":
            raise ValueError(f"--output is {options.output}; it must end in .json")
        written = [options.output.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
        outputs.check_files(*written, overwrite=options.overwrite)
    if options.loading and options.repeats == 0:
        raise ValueError("--loading takes times; --repeats 0 takes none")
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type not in COMPILED:
        raise ValueError(f"--device is {name}; this benchmark knows cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name}, but torch finds no GPU")
    compile_ = options.compile or ("some" if device.type == "cuda" else "none")
    if options.dynamic and compile_ == "none":
        raise ValueError("--dynamic is about compiled methods; --compile is none, valid with it are some and all")
    return replace(options, device=name, compile=compile_)


def _check_ranges(options: BenchmarkOptions):
    for name in ("models", "images", "batch", "methods", "num_layers"):
        if getattr(options, name) == ():
            raise ValueError(f"--{name.replace('_', '-')} names nothing")
    for name in ("images", "batch", "num_layers"):
        for number in getattr(options, name) or ():
            if number < 1:
                raise ValueError(f"--{name.replace('_', '-')}: {number} is not 1 or more")
    if options.repeats < 0:
        raise ValueError(f"--repeats: {options.repeats} is negative")


def run_benchmark(
    options: BenchmarkOptions, command: str | None = None, warn: Callable[[str], None] = warnings.warn
) -> dict:
    """Measure, and write report and table after every prompt where the options name an output.

    Args:
        options: what to measure, and how.
        command: how the report says that it was made; `None`: by the options.
        warn: called with a line for each method that is skipped.

    Returns:
        The report: `conditions`, a row per measurement in `results`, what was `skipped` and why, and seconds of
        `loading`. `report.markdown` makes a table of it, `report.draw` a chart.

    Raises:
        ValueError: for options that do not fit each other, the machine or the models.
    """
    command, options = command or repr(options), settle(options)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if device.index is not None:
        torch.cuda.set_device(device)  # events and statistics are the current device's
    subjects = {name: find_subject(name) for name in options.models}
    methods = {name: choose_methods(each, options.methods, options.num_layers) for name, each in subjects.items()}
    peak = device_peak(device, dtype, options.peak_tflops, options.bandwidth_gbs)
    report = {"conditions": conditions(options, command, device, peak), "results": [], "skipped": [], "loading": []}
    for name, subject in subjects.items():
        measure_model(report, name, subject, methods[name], options, peak, warn)
    if options.output is not None:
        reports.write(report, options.output)
    return report


def measure_model(
    report: dict,
    name: str,
    subject: Subject,
    methods: list[Method],
    options: BenchmarkOptions,
    peak: Peak,
    warn: Callable[[str], None],
):
    """Add what is measured on one model to the report, and write this after every prompt. `options`: settled ones."""
    torch.manual_seed(0)
    bench = Bench(subject, torch.device(options.device), getattr(torch, options.dtype), options.dynamic)
    variants = variants_of(methods, options.compile, len(subject.config.shortv_layers))
    for images in options.images or subject.images:
        for batch in options.batch:
            label = f"{name}, {images} image{'s' if images > 1 else ''}, batch {batch}"
            inputs = make_inputs(bench.stock, options.text_tokens, images, batch)
            rows, skipped = measure_prompt(bench, variants, inputs, options.repeats, peak, label)
            for each in skipped:
                warn(f"{label}: skipped {each['method']}, {each['mode']}: {each['reason']}")
            report["results"] += [{"model": name, "images": images, **row} for row in rows]
            report["skipped"] += [{"model": name, "images": images, "batch": batch, **each} for each in skipped]
            if options.output is not None:
                reports.write(report, options.output)
    if options.loading:
        report["loading"].append({"model": name, **time_loading(bench.stock, bench.shortv, options.repeats)})
