"""`shortv bench`: it reads options and prints; `run.py` does the work."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..command_line.options import parse_numbers, split_names


def bench(
    models: Annotated[
        list[str] | None,
        typer.Option(
            help="cpu-small, llava-1.5-7b, llava-1.5-13b, llava-next-7b, llava-next-13b, qwen2.5-vl-7b, onevision-0.5b, or "
            "ShortV repos of any family, of which the configs alone are read; separated by commas.",
            show_default="cpu-small",
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(help="Images per prompt, e.g. 1,5.", show_default="1; of cpu-small 1,5"),
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Text tokens per row.")] = 64,
    batch: Annotated[list[str] | None, typer.Option(help="Rows, e.g. 1,4,8.", show_default="1")] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Beside the stock class: shortv; token reductions, e.g. fastv,vtw; shortv+fastv and the like for both. "
            "One with options is an entry of its own: --methods vtc_cls:layer=0,token_num=128 --methods "
            "shortv+random:token_num=128. What a model cannot have is skipped.",
            show_default="shortv,fastv,vtw,shortv+fastv",
        ),
    ] = None,
    num_layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Numbers of layers that shortv freezes, e.g. 8,10.",
            show_default="those of the paper's Tables 3 and 4; of a repo its own",
        ),
    ] = None,
    compiled: Annotated[
        Literal["none", "some", "all"] | None,
        typer.Option(
            "--compile",
            help="Measured compiled as well: stock and ShortV at the paper's N (some), all, or none.",
            show_default="some on cuda, none on the CPU",
        ),
    ] = None,
    dynamic: Annotated[
        bool,
        typer.Option(
            "--dynamic",
            help="Compile graphs for prompts of any length; without it there is one per prompt, on cuda with CUDA graphs.",
        ),
    ] = False,
    repeats: Annotated[int, typer.Option(min=0, help="Timed rounds; 0: FLOPs and memory only.")] = 5,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto is the GPU, or the CPU if there is none.")
    ] = "auto",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")] = "float32",
    peak_tflops: Annotated[
        float | None,
        typer.Option(help="Of the device in this dtype, for the roofline.", show_default="data sheet or probe"),
    ] = None,
    bandwidth_gbs: Annotated[
        float | None, typer.Option(help="Of its memory, in GB/s; with --peak-tflops.", show_default=False)
    ] = None,
    loading: Annotated[
        bool, typer.Option("--loading", help="Time from_pretrained on a generated checkpoint as well.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="A .json file in a folder that exists; table and chart are written beside it."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files that --output names.")] = False,
):
    """Measure speed and memory against the stock Hugging Face class, on real architectures with random weights.

    On the CPU, float32, a small model, prompts of 576 and 2880 visual tokens:

    shortv bench --output cpu-small.json

    On a GPU, one command per model of the paper:

    shortv bench --device cuda --dtype bfloat16 --models llava-1.5-7b
    --batch 1,4,8 --repeats 15 --output llava-1.5-7b.json

    Memory, without timing, of long prompts and of token reductions:

    shortv bench --images 5,10,20,35 --repeats 0 --methods shortv

    shortv bench --images 1 --repeats 0 --methods fastv,shortv+vtw
    --methods vtc_cls:layer=0,token_num=128

    Options that take several values take them separated by commas, and may
    be given several times. Beside the JSON file there is a Markdown table;
    both are written anew after every prompt. Where several numbers of frozen
    layers were measured, a chart follows at the end.

    All methods take turns in every repetition, so that drift hits all of
    them. Figures are medians with quartiles; a speed-up is the median of the
    ratios within a repetition, over the faster mode of the stock class.
    Methods run in eager mode; those that --compile names run a second time
    with text model and vision tower compiled by torch, each in a graph of its
    own: outside them, ShortV can plan with the exact number of text tokens.
    Decoding is measured in eager mode only, since the cache grows from step
    to step.
    """
    from . import report as reports
    from .run import BenchmarkOptions, run_benchmark

    lists: dict[str, Any] = {
        "models": split_names(models),
        "images": _numbers(images, "--images"),
        "batch": _numbers(batch, "--batch"),
        "methods": split_names(methods),
        "num_layers": _numbers(num_layers, "--num-layers"),
    }
    options = BenchmarkOptions(
        **{name: values for name, values in lists.items() if values is not None},
        text_tokens=text_tokens,
        compile=compiled,
        dynamic=dynamic,
        repeats=repeats,
        device=device,
        dtype=dtype,
        peak_tflops=peak_tflops,
        bandwidth_gbs=bandwidth_gbs,
        loading=loading,
        output=output,
        overwrite=overwrite,
    )
    chart = output is not None and _can_draw()
    report = run_benchmark(options, shlex.join(["shortv", *sys.argv[1:]]), _warn)
    print(reports.markdown(report))
    if chart and output is not None:
        reports.draw(report, output)


def _numbers(entries: list[str] | None, option: str) -> tuple[int, ...] | None:
    """Each number once."""
    return None if entries is None else tuple(dict.fromkeys(parse_numbers(",".join(entries), option)))


def _warn(message: str):
    print(message, file=sys.stderr)


def _can_draw() -> bool:
    from ..pictures import plots

    try:
        plots.check_matplotlib()
    except ValueError as error:
        _warn(f"no chart: {error}")
        return False
    return True
