"""`shortv lc` and `shortv vtw-k`: they read options and print; `calibration.py` and `vtw.py` do the work."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
)


if TYPE_CHECKING:
    from .calibration import Calibration

Metric = Literal["lc", "greedy", "cosine", "random"]
Samples = Annotated[int, typer.Option("--samples", "--limit", min=1, help="Samples of each source.")]

# By reading its task.py and llava.py
NOTE_ON_TASKS = (
    "shortv: each question is asked about its own picture, as Appendix B of the paper says. The authors' released --cal_lc "
    "pairs random questions with the first pictures of the data set, so its order of layers can differ from this one"
)


def lc(
    model: DefaultModel = None,
    data: Data = None,
    samples: Samples = 20,
    metric: Annotated[Metric, typer.Option(help="How layers are ranked.")] = "lc",
    kl: Annotated[Direction, typer.Option(help="forward: the paper; reverse: the released code.")] = "forward",
    seed: Annotated[int, typer.Option(help="Of the choice of samples and of a random ranking.")] = 0,
    num_layers: Annotated[int | None, typer.Option(help="Freeze this number of layers.")] = None,
    flops_ratio: Annotated[float | None, typer.Option(help="Freeze as few as reach this share of FLOPs.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Freeze as many as cost at most this KL, in nats.")] = None,
    text: Annotated[bool, typer.Option(help="Measure the layers for text tokens as well, for comparison.")] = True,
    output: Annotated[
        Path | None,
        typer.Option(
            help="New or empty folder for ranking.json and the plot; default: lc-MODEL-METRIC, e.g. "
            "lc-llava-1.5-7b-hf-greedy."
        ),
    ] = None,
    save_model: Annotated[
        Path | None, typer.Option(help="New or empty folder for a repo with the chosen layers.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what --output and --save-model hold already.")
    ] = False,
    include_path: IncludePath = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    model_option: ModelOption = None,
):
    """Rank the decoder layers of a model on data, choose which to freeze, and write a repo that freezes them.

    Vision-language models without a ShortV class are ranked too, with `apply_shortv`.
    """
    from ..data import outputs, processes, sources
    from ..hub import build, loading
    from ..pictures import plots
    from .budget import Budget
    from .calibration import calibrate

    processes.join()
    model = choose_model(model, model_option)
    data = choose_data(data, model)
    budgets = {"--num-layers": num_layers, "--flops-ratio": flops_ratio, "--max-kl": max_kl}
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other")
    if save_model is not None and not given:
        raise ValueError(f"--save-model needs one of {', '.join(budgets)}")
    plots.check_matplotlib()
    config, has_class = loading.any_config(model)
    budget = Budget(num_layers, flops_ratio, max_kl) if given else None
    if budget is not None:
        budget.check(config, metric)
    if output is None:
        output = Path(f"lc-{Path(model).resolve().name}-{metric}")
    first = processes.rank() == 0  # which prints and writes; others take their share of the samples
    if first:
        outputs.check_folder(output, overwrite)
        if save_model is not None:
            build.check_new_repo(save_model, "--save-model", model, config, has_class, output, overwrite)

    def save(found: "Calibration"):
        output.mkdir(parents=True, exist_ok=True)
        found.ranking.save(output / "ranking.json")
        with outputs.whole_file(output / "layer_scores.png") as plot:
            plots.plot_ranking(found.ranking, plot, found.text_scores)

    if first and any(name.startswith(sources.TASK) for name in sources.split_sources(data)):
        print(NOTE_ON_TASKS, file=sys.stderr)
    device = processes.own_device(device)
    loaded, processor = (loading.load if has_class else loading.load_stock)(model, device=device, dtype=dtype)
    found = calibrate(
        loaded,
        sources.Samples(data, processor, samples, seed, include_path),
        budget,
        metric=metric,
        kl=kl,
        seed=seed,
        data=f"{','.join(map(plots.short_name, sources.split_sources(data)))}, {samples} each, seed {seed}",  # no paths
        text=text,
        on_scores=save if first else None,
    )
    if not first:
        return
    _print_ranking(found, plots.SCORES[metric])
    print(f"{output}: ranking.json, layer_scores.png")
    _print_choice(found)
    n = "N" if found.layers is None else len(found.layers)
    if not has_class:
        layers = found.layers or f'LayerRanking.load("{output / "ranking.json"}").layers({n})'
        print(f"to freeze {'N layers' if n == 'N' else 'them'}, in Python:")
        print(f'model = AutoModelForImageTextToText.from_pretrained("{model}")')
        print(f"apply_shortv(model, shortv_layers={layers})")
    elif found.layers is None and metric != "random":
        command = f"build-repo {model} --ranking {output / 'ranking.json'} --num-layers N --output REPO"
        if config.base_model_name_or_path is None:  # there is nothing to reference
            command = f"lc {model} --num-layers N --save-model REPO, with the same data"
        print(f"to freeze N layers: shortv {command}")
    if save_model is not None:
        config.shortv_layers = found.layers  # the rest, dtype above all, stays the checkpoint's
        build.build_repo_like(model, config, save_model, overwrite, found.ranking)
        print(f"{save_model}: a repo that freezes these layers")


def _print_ranking(found: "Calibration", label: str):
    """A row per layer, the most ineffective first; the chosen ones are marked."""
    from rich.console import Console
    from rich.table import Table

    ranking = found.ranking
    scores = {"visual tokens": ranking.scores}
    if found.text_scores is not None:
        scores["text tokens"] = found.text_scores
    table = Table(title=f"{label}, {ranking.data.get('samples', 0)} samples")
    for column in ("rank", "layer", *scores, *(() if found.layers is None else ("frozen",))):
        table.add_column(column, justify="right")
    for rank, layer in enumerate(ranking.order):
        frozen = () if found.layers is None else ("yes" if layer in found.layers else "",)
        table.add_row(str(rank + 1), str(layer), *(f"{values[int(layer)]:.4g}" for values in scores.values()), *frozen)
    Console().print(table)


def _print_choice(found: "Calibration"):
    """What the chosen layers cost; without a budget, what every number costs and which ones usual budgets give."""
    ranking, cost = found.ranking, found.cost
    if cost is not None and found.layers is not None:
        layers = ",".join(map(str, found.layers))
        of = f"{cost.num_layers} of {len(ranking.order)} layers"
        print(f"freezes {of}, joint KL {cost.kl:.3g} ± {cost.kl_error:.1g} nats: {layers}")
        if cost.flops_ratio is not None:
            t, v = f"t = {ranking.text_tokens:.0f} text", f"v = {ranking.visual_tokens:.0f} visual tokens"
            print(f"{cost.flops_ratio:.1%} of the prefill's FLOPs at the samples' {t} and {v}")
    elif found.costs:
        _print_costs(found)


def _print_costs(found: "Calibration"):
    from rich.console import Console
    from rich.table import Table

    from .budget import choose_by_kl

    ranking, costs = found.ranking, found.costs
    title = f"freezing the first N layers (t = {ranking.text_tokens:.0f}, v = {ranking.visual_tokens:.0f})"
    table = Table(title=title)
    for column in ("N", "prefill FLOPs", "joint KL (nats)"):
        table.add_column(column, justify="right")
    for cost in costs:
        table.add_row(str(cost.num_layers), f"{cost.flops_ratio:.1%}", f"{cost.kl:.3g} ± {cost.kl_error:.1g}")
    Console().print(table)
    chosen = {f"--max-kl {limit:g}": choose_by_kl(costs, limit) for limit in (0.001, 0.01, 0.1)}
    for share in (0.75, 0.55, 0.45):
        enough = [each.num_layers for each in costs if each.flops_ratio is not None and each.flops_ratio <= share]
        if enough:
            chosen[f"--flops-ratio {share:g}"] = enough[0]
    for budget, n in chosen.items():
        print(f"{budget}: N = {n} ({costs[n].flops_ratio:.1%} of FLOPs, KL {costs[n].kl:.3g})")


def vtw_k(
    model: DefaultModel = None,
    max_kl: Annotated[float, typer.Option(help="Largest mean KL divergence from the dense model, in nats.")] = 0.003,
    data: Data = None,
    samples: Samples = 20,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
    kl: Annotated[
        Direction, typer.Option(help="reverse: KL(VTW || dense), as released; forward: KL(dense || VTW).")
    ] = "reverse",
    include_path: IncludePath = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    model_option: ModelOption = None,
):
    """Find the layer at which Visual Tokens Withdrawal may begin: the first with a divergence of at most --max-kl."""
    from ..data.sources import load_samples
    from ..hub.loading import load
    from .vtw import first_layer_below, withdrawal_divergences

    model = choose_model(model, model_option)
    data = choose_data(data, model)
    first_layer_below({}, max_kl, 0)  # refuses a bad limit before the weights are read
    loaded, processor = load(model, device=device, dtype=dtype)
    n_layers = loaded.config.get_text_config().num_hidden_layers
    found = withdrawal_divergences(loaded, load_samples(data, processor, samples, seed, include_path), kl=kl)
    for layer, value in found.items():
        print(f"K = {layer:2d}   {value:.6f} nats")
    chosen = first_layer_below(found, max_kl, n_layers)
    print(f"--reduction vtw:k={chosen}" if chosen < n_layers else f"no layer stays within {max_kl} nats")
