"""`shortv search`: it reads options and prints; `run.py` does the work."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..command_line.options import (
    Data,
    DefaultModel,
    Device,
    Direction,
    Dtype,
    IncludePath,
    ModelOption,
    choose_data,
    choose_model,
    split_names,
)


def search(
    model: DefaultModel = None,
    data: Data = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples", "--limit", min=1, help="Of each source; half of them choose, the other half judges."
        ),
    ] = 40,
    max_kl: Annotated[float | None, typer.Option(help="The cheapest that costs at most this KL, in nats.")] = None,
    flops_ratio: Annotated[
        float | None, typer.Option(help="The lowest KL at this share of the dense prefill's FLOPs.")
    ] = None,
    parts: Annotated[
        list[str] | None,
        typer.Option(
            help="What may be left out, separated by commas: layer, mlp, self_attn (of visual tokens, in some layers), tail (all "
            "visual tokens, from some layer on), tokens (some of them, by a method).",
            show_default="layer,mlp,tail,tokens",
        ),
    ] = None,
    finalists: Annotated[int, typer.Option(min=2, help="About how many schedules are measured together.")] = 20,
    kl: Annotated[Direction, typer.Option(help="forward: KL(dense || schedule); reverse: the other way.")] = "forward",
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for search.json, the plot and the progress; default: search-MODEL. A search that broke off goes on "
            "where it was."
        ),
    ] = None,
    output_repo: Annotated[
        Path | None, typer.Option(help="New or empty folder for a repo that is set to the chosen schedule.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what --output and --output-repo hold already.")
    ] = False,
    include_path: IncludePath = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    model_option: ModelOption = None,
):
    """Search the cheapest prefill within a budget, over layers, halves of layers, VTW and token reduction together.

    Each change is measured alone on one half of the samples; the schedules that this proposes, on the other half. Printed is
    what they cost and save: > marks the chosen one, = those whose KL is not told apart from its, - those that another one
    beats.
    """
    from ..data import outputs, processes, sources
    from ..hub import build, loading, provenance
    from ..pictures import plots
    from .run import SearchOptions
    from .run import search as run
    from .space import DEFAULT_PARTS

    processes.join()
    model = choose_model(model, model_option)
    data = choose_data(data, model)
    options = SearchOptions(max_kl, flops_ratio, split_names(parts) or DEFAULT_PARTS, kl, finalists)
    if output_repo is not None and not options.budget:
        raise ValueError("--output-repo needs --max-kl or --flops-ratio")
    plots.check_matplotlib()
    config, has_class = loading.any_config(model)
    if output is None:
        output = Path(f"search-{Path(model).resolve().name}")
    progress, file, plot = output / "progress", output / "search.json", output / "search.png"
    first = processes.rank() == 0
    if first:  # it prints and writes; others take their share of the samples
        outputs.check_folder(output, overwrite, own=progress.is_dir() and not file.exists())
        if output_repo is not None:
            build.check_new_repo(output_repo, "--output-repo", model, config, has_class, output, overwrite)
    device = processes.own_device(device)
    loaded, processor = (loading.load if has_class else loading.load_stock)(model, device=device, dtype=dtype)
    result = run(
        loaded,
        sources.Samples(data, processor, samples, seed, include_path),
        options,
        data=f"{','.join(map(plots.short_name, sources.split_sources(data)))}, {samples} each, seed {seed}",  # no paths
        progress=progress,
        say=lambda line: print(line, file=sys.stderr) if first else None,
    )
    if not first:
        return
    result.command = shlex.join(["shortv", *sys.argv[1:]])
    result.save(file)
    with outputs.whole_file(plot) as drawn:
        provenance.draw_search(result, drawn)
    _print(result)
    print(f"{output}: {file.name}, {plot.name}")
    if output_repo is not None:
        if result.best is None:
            raise typer.Exit(1)  # the message is printed
        config.shortv_layers = result.best.shortv_layers  # the rest, dtype above all, stays the checkpoint's
        config.visual_reduction = result.best.visual_reduction
        # The command has paths of this machine in it.
        build.build_repo_like(model, config, output_repo, overwrite, replace(result, command=None))
        print(f"{output_repo}: a repo that is set so")


def _print(result):
    from rich.console import Console
    from rich.table import Table

    from .report import COLUMNS, cells, kl_text, options_of

    t, v = f"t = {result.text_tokens:.0f} text", f"v = {result.visual_tokens:.0f} visual tokens"
    table = Table(title=f"{result.samples['judging']} samples that did not propose these schedules, {t}, {v}")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == COLUMNS[-1] else "right")
    for row in cells(result):
        table.add_row(*row)
    Console().print(table)
    if result.best is not None:
        print(f"{result.best.flops_ratio:.1%} of the prefill's FLOPs, KL {kl_text(result.best)} nats:")
        print(options_of(result.best) or "the dense model")
    elif result.budget:
        ((name, limit),) = result.budget.items()
        least = min(result.rows, key=lambda row: row.kl if name == "max_kl" else row.flops_ratio)
        reached = f"KL {least.kl:.3g}" if name == "max_kl" else f"{least.flops_ratio:.1%} of FLOPs"
        print(f"no schedule is within --{name.replace('_', '-')} {limit:g}; the least that was measured is {reached}")
    else:
        print("to choose one, --max-kl or --flops-ratio, with --overwrite; what was measured is not measured again")
