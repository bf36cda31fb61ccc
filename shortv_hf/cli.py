"""The `shortv` command. Needs the `cli` extra."""

import os
import sys
from dataclasses import asdict
from functools import partial
from io import TextIOWrapper
from json import dumps
from pathlib import Path
from typing import Annotated


try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"the shortv command needs the extra: pip install '.[cli]' in its checkout ({error})") from error


app = typer.Typer(no_args_is_help=True, add_completion=False, help="ShortV for Hugging Face LLaVA models.")


def _version(wanted: bool):
    if wanted:
        from . import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def shortv(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False):
    """ShortV for Hugging Face LLaVA models."""


def _load_config(model: str, revision: str | None = None):
    """The ShortV config of a ShortV repo or an original checkpoint; loads no weights."""
    from .chat import model_classes

    return model_classes(model, revision=revision)[0].from_pretrained(model, revision=revision)


def _parse_layers(layers: str) -> list[int]:
    try:
        return [int(part) for part in layers.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--layers takes layer ids separated by commas, got {layers!r}") from None


def _parse_reduction(reduction: str | None) -> dict:
    """The config field that a --reduction option sets, as keyword arguments."""
    from .visual_reduction import visual_reduction_from_text

    return {} if reduction is None else {"visual_reduction": visual_reduction_from_text(reduction)}


DATA = ["gqa,flickr30k"]
REDUCTION_HELP = 'Token reduction, e.g. fastv:k=2,ratio=0.5 or {"method": "vtw", "k": 16}; none turns it off.'


@app.command()
def chat(
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id or directory of a ShortV repo or a LLaVA checkpoint; default: a small model that "
            "answers questions about coloured shapes."
        ),
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Path or URL of a picture, composed on white; may be given several times.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One question; without it, a conversation.")] = None,
    layers: Annotated[str | None, typer.Option(help="Frozen layers, e.g. 31,29,30; default: the config's.")] = None,
    reduction: Annotated[str | None, typer.Option(help=REDUCTION_HELP)] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Freeze and drop nothing.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Ask the dense model and ShortV.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
):
    """Ask a model about pictures: one answer, dense and ShortV compared, or a conversation that keeps its cache."""
    from . import chat as chats
    from .images import load_images

    if dense and (compare or layers is not None or reduction is not None):
        raise ValueError("--dense freezes and drops nothing; it goes with none of --compare, --layers and --reduction")
    if prompt is None and (compare or json):
        raise ValueError("--compare and --json need a --prompt")
    chosen = [] if dense else None if layers is None else _parse_layers(layers)
    fields = {"visual_reduction": None} if dense else _parse_reduction(reduction)
    images = load_images(image or [])
    loaded, processor = chats.load(model or chats.demo_model(), chosen, device, dtype, **fields)
    if compare:
        _print_comparison(chats.compare(loaded, processor, prompt, images, max_new_tokens), json)
        return
    conversation = chats.Conversation(loaded, processor, max_new_tokens)
    if prompt is not None:
        answer = conversation.ask(prompt, images, on_text=None if json else partial(print, end="", flush=True))
        if json:
            found = {**asdict(answer), "shortv_layers": loaded.config.shortv_layers}
            found["visual_reduction"] = loaded.config.visual_reduction
            found.pop("token_ids")
            print(dumps(found))
        else:
            print()
        return
    if isinstance(sys.stdin, TextIOWrapper):  # bytes that are not UTF-8 are that message's error
        sys.stdin.reconfigure(errors="surrogateescape")
    Console(stderr=True).print("[dim]Ask about the pictures. An empty line ends the conversation.[/dim]")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            question = ""
        if not question:
            return
        failure = None
        try:
            conversation.ask(question, images, on_text=partial(print, end="", flush=True))
            images = []
        except KeyboardInterrupt:
            failure = "shortv: interrupted"
        except Exception as error:
            if os.environ.get("SHORTV_TRACEBACK"):
                raise
            failure = _one_line(error)
        print(flush=True)
        if failure:  # the conversation is as it was before this message
            print(failure, file=sys.stderr)


def _print_comparison(result: dict, as_json: bool):
    if as_json:
        print(dumps(result))
        return
    title = f"{result['prompt_tokens']} prompt tokens, {result['visual_tokens']} of them visual"
    table = Table(title=title)
    for column in ("", "answer", "time to first token", "prefill GFLOPs", "frozen layers"):
        table.add_column(column, justify="left" if column in ("", "answer") else "right")
    reduction = result["shortv"]["visual_reduction"]
    ours = "ShortV" if reduction is None else f"ShortV + {reduction['method']}"
    for name, label in (("dense", "dense"), ("shortv", ours)):
        row = result[name]
        time, flops = f"{1000 * row['time_to_first_token_s']:.1f} ms", f"{row['prefill_flops'] / 1e9:.3f}"
        table.add_row(label, row["answer"], time, flops, str(len(row["shortv_layers"])))
    console = Console()
    console.print(table)
    time = result["dense"]["time_to_first_token_s"] / result["shortv"]["time_to_first_token_s"]
    flops = result["shortv"]["prefill_flops"] / result["dense"]["prefill_flops"]
    agree = "the answers agree" if result["answers_agree"] else "the answers differ"
    console.print(f"{ours}: {time:.2f}x to the first token, {flops:.1%} of the prefill's FLOPs; {agree}")


@app.command()
def flops(
    model: Annotated[str, typer.Argument(help="Hub id or directory of a ShortV repo or a LLaVA checkpoint.")],
    layers: Annotated[str | None, typer.Option(help="Frozen layers, e.g. 31,29,30; default: the config's.")] = None,
    reduction: Annotated[str | None, typer.Option(help=REDUCTION_HELP)] = None,
    kept: Annotated[
        int | None, typer.Option(help="Visual tokens left by PruMerge, which depend on the image.")
    ] = None,
    text_tokens: Annotated[int, typer.Option("--text-tokens", "-t", help="Text tokens t.")] = 64,
    visual_tokens: Annotated[
        int | None, typer.Option("--visual-tokens", "-v", help="Visual tokens v; default 576, LLaVA-NeXT 2880.")
    ] = None,
):
    """FLOPs of the language model's prefill, dense and with ShortV (Eq. 3-5 of the paper) and token reduction."""
    from .flops import flops_ratio, prefill_flops

    config = _load_config(model)
    if layers is not None:
        config.shortv_layers = _parse_layers(layers)
    if reduction is not None:
        config.visual_reduction = _parse_reduction(reduction)["visual_reduction"]
    config.validate_shortv()
    if visual_tokens is None:
        visual_tokens = 2880 if config.base_model_type == "llava_next" else 576
    n = len(config.shortv_layers)
    table = Table(title=f"Prefill, t = {text_tokens}, v = {visual_tokens}")
    unit, scale = (
        ("TFLOPs", 1e12) if prefill_flops(text_tokens, visual_tokens, config, N=0) > 1e11 else ("GFLOPs", 1e9)
    )
    for column in ("", "frozen layers", unit, "ratio"):
        table.add_column(column, justify="right")
    dense = prefill_flops(text_tokens, visual_tokens, config, N=0)
    sparse = prefill_flops(text_tokens, visual_tokens, config, kept=kept)
    ratio = flops_ratio(text_tokens, visual_tokens, config, kept=kept)
    name = "ShortV" if config.visual_reduction is None else f"ShortV + {config.visual_reduction['method']}"
    table.add_row("dense", "0", f"{dense / scale:.3f}", "100.0%")
    table.add_row(name, f"{n} of {config.text_config.num_hidden_layers}", f"{sparse / scale:.3f}", f"{ratio:.1%}")
    Console().print(table)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
def bench(context: typer.Context):
    """Measure speed and memory against the stock class, on random weights; --help lists the options."""
    from .benchmark import main as benchmark

    benchmark(context.args, "shortv bench")


@app.command()
def lc(
    model: Annotated[str, typer.Argument(help="Hub id or directory of a LLaVA checkpoint or a ShortV repo.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="gqa, flickr30k, shapes or folders of pictures with a JSONL file, separated by commas; may be given "
            "several times."
        ),
    ] = DATA,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each source.")] = 20,
    metric: Annotated[str, typer.Option(help="lc, greedy, cosine or random.")] = "lc",
    kl: Annotated[str, typer.Option(help="forward (the paper) or reverse (the released code).")] = "forward",
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
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto (several devices).")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
):
    """Rank the decoder layers of a model on data, choose which to freeze, and write a repo that freezes them."""
    from . import calibration_data, chat, hub, outputs, plots
    from . import layer_contribution as lcs
    from .flops import flops_ratio as ratio_of_flops

    budgets = {"--num-layers": num_layers, "--flops-ratio": flops_ratio, "--max-kl": max_kl}
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other")
    if save_model is not None and not given:
        raise ValueError(f"--save-model needs one of {', '.join(budgets)}")
    if save_model is not None and save_model.resolve() == Path(model).resolve():
        raise ValueError(f"--save-model {save_model} is the checkpoint itself; name another directory")
    plots.check_matplotlib()
    config = _load_config(model)
    lcs.check_choices(metric, kl=kl)
    lcs.check_budget(config, num_layers, flops_ratio, max_kl)
    if output is None:
        output = Path(f"lc-{Path(model).resolve().name}-{metric}")
    outputs.check_folder(output, overwrite)
    if save_model is not None:
        if output.resolve().is_relative_to(save_model.resolve()):
            raise ValueError(f"--output {output} is inside --save-model {save_model}; name two folders")
        outputs.check_folder(save_model, overwrite)
        hub.check_output_dir(save_model, overwrite=overwrite)

    loaded, processor = chat.load(model, None, device, dtype)
    inputs = calibration_data.Samples(data, processor, samples, seed)
    options = {"kl": kl, "seed": seed, "data": f"{','.join(data)}, {samples} each, seed {seed}"}
    ranking = lcs.rank_layers(loaded, inputs, metric, **options)
    output.mkdir(parents=True, exist_ok=True)
    ranking.save(output / "ranking.json")  # now: what follows can still fail
    scores = {"visual tokens": ranking.scores}
    if text and metric in ("lc", "cosine"):
        scores["text tokens"] = lcs.rank_layers(loaded, inputs, metric, "text", **options).scores
    label = SCORE_LABELS[metric]
    title, log = plots.ranking_title(ranking, label), metric in ("lc", "greedy")  # a KL divergence is 0 or more
    with outputs.whole_file(output / "layer_scores.png") as plot:
        plots.plot_layer_scores(scores, label, plot, log, title)
    n = lcs.choose_num_layers(loaded, inputs, ranking, num_layers, flops_ratio, max_kl, kl) if given else None

    _print_ranking(ranking, scores, n)
    print(f"{output}: ranking.json, layer_scores.png")
    if n is not None:
        ranking.apply(loaded, n)
        cost = lcs.joint_kl(loaded, inputs, ranking.layers(n), kl)
        layers = ",".join(map(str, ranking.layers(n)))
        print(f"freezes {n} of {len(ranking.order)} layers, joint KL {cost:.3g} nats: {layers}")
        if ranking.text_tokens is not None:
            t, v = ranking.text_tokens, ranking.visual_tokens
            share = ratio_of_flops(t, v, config, N=n)
            print(f"{share:.1%} of the prefill's FLOPs at the samples' t = {t:.0f} text and v = {v:.0f} visual tokens")
    if save_model is not None:
        config.shortv_layers = ranking.layers(n)  # the rest, dtype above all, stays the checkpoint's
        _write_repo(model, config, save_model, overwrite)
        print(f"{save_model}: a repo that freezes these layers")


SCORE_LABELS = {
    "lc": "Layer Contribution (nats)",
    "greedy": "joint KL when chosen (nats)",
    "cosine": "cosine similarity",
    "random": "random number",
}


def _print_ranking(ranking, scores: dict[str, list[float]], n: int | None):
    """A row per layer, the most ineffective first; the first `n` are the frozen ones."""
    table = Table(title=f"{SCORE_LABELS[ranking.metric]}, {ranking.data.get('samples', 0)} samples")
    for column in ("rank", "layer", *scores, *(() if n is None else ("frozen",))):
        table.add_column(column, justify="right")
    for rank, layer in enumerate(ranking.order):
        frozen = () if n is None else ("yes" if rank < n else "",)
        table.add_row(str(rank + 1), str(layer), *(f"{values[layer]:.4g}" for values in scores.values()), *frozen)
    Console().print(table)


def _write_repo(model: str, config, output: Path, overwrite: bool):
    """A repo with this config for the checkpoint in a directory or on the Hub: it references the checkpoint or, of a
    ShortV repo with weights of its own, copies them."""
    from huggingface_hub import snapshot_download

    from . import hub

    if config.base_model_name_or_path is not None:
        hub.build_repo_from_base(config, output, overwrite=overwrite)
        return
    folder = model if Path(model).is_dir() else snapshot_download(model)
    hub.build_repo(config, output, folder, weights_dir=folder, overwrite=overwrite)


@app.command()
def visualize(
    model: Annotated[str, typer.Option(help="Hub id or directory of a ShortV repo or a LLaVA checkpoint.")],
    image: Annotated[str, typer.Option(help="Path or URL of a picture, composed on white.")],
    method: Annotated[str, typer.Option(help="Token reduction, e.g. fastv:k=2,ratio=0.5, prumerge or JSON.")],
    output: Annotated[Path, typer.Option(help="PNG file to write, in a folder that exists.")] = Path("patches.png"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    prompt: Annotated[str, typer.Option(help="The question; FastV's choice depends on it.")] = "Describe the image.",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
):
    """Draw which patches of a picture a method keeps, drops or merges; for FastV, at every layer."""
    from rich.progress import track

    from . import chat as chats
    from . import outputs
    from .images import load_image
    from .reduction_pictures import draw_reduction

    outputs.check_files(output, overwrite=overwrite)
    fields = _parse_reduction(method)
    picture = load_image(image)
    loaded, processor = chats.load(model, None, device, dtype, **fields)

    def progress(variants):
        return track(variants, description="Running", console=Console(stderr=True), transient=True)

    with outputs.whole_file(output) as file:
        draw_reduction(loaded, processor, picture, prompt, fields["visual_reduction"], file, progress)
    print(output)


@app.command()
def vtw_k(
    model: Annotated[str, typer.Option(help="Hub id or directory of a ShortV repo or a LLaVA checkpoint.")],
    max_kl: Annotated[float, typer.Option(help="Largest mean KL divergence from the dense model, in nats.")] = 0.003,
    data: Annotated[list[str], typer.Option(help="Samples, as for shortv lc.")] = DATA,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each source.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
    kl: Annotated[str, typer.Option(help="reverse: KL(VTW || dense), as released; forward.")] = "reverse",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
):
    """Find the layer at which Visual Tokens Withdrawal may begin: the first with a divergence of at most --max-kl."""
    from . import calibration_data
    from . import chat as chats
    from .vtw_calibration import first_layer_below, withdrawal_divergences

    loaded, processor = chats.load(model, None, device, dtype)
    n_layers = loaded.config.text_config.num_hidden_layers
    first_layer_below({}, max_kl, n_layers)  # refuses a bad limit before the passes
    found = withdrawal_divergences(loaded, calibration_data.load_samples(data, processor, samples, seed), kl=kl)
    for layer, value in found.items():
        print(f"K = {layer:2d}   {value:.6f} nats")
    chosen = first_layer_below(found, max_kl, n_layers)
    print(f"--reduction vtw:k={chosen}" if chosen < n_layers else f"no layer stays within {max_kl} nats")


@app.command()
def build_repo(
    model: Annotated[str, typer.Argument(help="Hub id or directory of the original checkpoint.")],
    output: Annotated[
        Path, typer.Option(help="Folder to write: new, empty, or what build-repo wrote earlier, which is built again.")
    ],
    layers: Annotated[
        str | None, typer.Option(help="Layers to freeze, most ineffective first, e.g. 31,29,30.")
    ] = None,
    ranking: Annotated[Path | None, typer.Option(help="ranking.json to take the layers from, instead.")] = None,
    num_layers: Annotated[int | None, typer.Option(help="How many layers of the ranking to freeze.")] = None,
    base_revision: Annotated[
        str | None,
        typer.Option("--base-revision", "--revision", help="Commit or branch of the original checkpoint."),
    ] = None,
    reduction: Annotated[str | None, typer.Option(help=REDUCTION_HELP)] = None,
    processor_dir: Annotated[Path | None, typer.Option(help="Local directory with the processor files.")] = None,
    include_weights: Annotated[
        bool, typer.Option("--include-weights", help="Copy the weights too, instead of referencing them.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace files that build-repo did not write, or that were changed since; weights beside a reference go.",
        ),
    ] = False,
):
    """Write a repo (config, code, processor files, model card) that references an original checkpoint's weights."""
    from . import hub

    if (layers is None) == (ranking is None) or (ranking is None) != (num_layers is None):
        raise ValueError("pass either --layers, or --ranking together with --num-layers")
    if base_revision is not None and Path(model).is_dir():
        raise ValueError(
            f"{model} is a directory, which has no revisions; --base-revision is for checkpoints on the Hub"
        )
    config = _load_config(model, base_revision)
    if config.base_model_name_or_path is None:
        raise ValueError(f"{model} holds its own weights; build-repo needs an original checkpoint to reference")
    if ranking is None:
        config.shortv_layers = _parse_layers(layers)
    else:
        from .layer_contribution import LayerRanking

        config.shortv_layers = LayerRanking.load(ranking).layers_for(config, num_layers)
    if reduction is not None:
        config.visual_reduction = _parse_reduction(reduction)["visual_reduction"]
    config.validate_shortv()
    hub.build_repo_from_base(config, output, processor_dir, include_weights, overwrite)
    base, commit = config.base_model_name_or_path, config.base_model_revision
    weights = f"a copy of the weights of {base}" if include_weights else f"weights from {base}"
    print(f"{output}: freezes layers {config.shortv_layers}, {weights}{f' at commit {commit}' if commit else ''}")
    if not any((output / name).is_file() for name in hub.PROCESSOR_FILES):
        print(f"no processor files in {model}: pass --processor-dir to make a repo for pipelines", file=sys.stderr)


@app.command()
def check_repo(
    repo: Annotated[str, typer.Argument(help="Directory or Hub id of a ShortV repo.")],
    revision: Annotated[str | None, typer.Option(help="Commit or branch of the repo.")] = None,
    device: Annotated[str, typer.Option(help="Where to try it: cpu, cuda, ... or auto.")] = "cpu",
):
    """Check files, pinned commit and code of a ShortV repo, and try it in a process without this package."""
    from .check_repo import check_repo as check

    checks = check(repo, revision, device)
    print("\n".join(map(str, checks)))
    failed = [each.name for each in checks if each.problem]
    print(f"{repo}: {'not to be trusted as it is: ' + ', '.join(failed) if failed else 'in order'}")
    if failed:
        raise typer.Exit(1)


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Directory that build-repo wrote.")],
    repo_id: Annotated[str, typer.Option(help="Where to: owner/name. Created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private repo.")] = False,
    revision: Annotated[str, typer.Option(help="Branch to publish to.")] = "main",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
):
    """Publish a ShortV repo in one commit, with the token of `hf auth login` or HF_TOKEN. Safe to repeat."""
    from . import publish as publishing

    plan = publishing.plan_publication(folder, repo_id, private, revision, may_be_offline=dry_run)
    print(plan, flush=True)
    if dry_run:
        print("dry run: nothing was changed")
        return
    commit = publishing.publish(plan)
    print(f"{'nothing to do' if plan.is_done else 'published'}: {repo_id} is at commit {commit}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    repo: Annotated[str, typer.Argument(help="Hub id or directory of a ShortV repo.")],
    revision: Annotated[str | None, typer.Option(help="Commit or branch of the repo.")] = None,
):
    """Serve a ShortV repo: `transformers serve` (Transformers 5) with our classes; its options may follow."""
    from .serve import serve as run_server

    run_server(repo, context.args, revision)


def _one_line(error: Exception) -> str:
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    lines = str(error).splitlines() or [type(error).__name__]
    return f"shortv: {kind}{lines[0]}"


def main():
    """Entry point: errors are one line, without a traceback unless SHORTV_TRACEBACK is set."""
    try:
        app()
    except Exception as error:
        if os.environ.get("SHORTV_TRACEBACK"):
            raise
        raise SystemExit(_one_line(error)) from None


if __name__ == "__main__":
    main()
