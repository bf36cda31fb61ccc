"""The `shortv` command. Needs the `cli` extra."""

import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from io import TextIOWrapper
from json import dumps
from pathlib import Path
from typing import Annotated, Literal


try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise SystemExit(f"the shortv command needs the extra: pip install '.[cli]' in its checkout ({error})") from error


app = typer.Typer(no_args_is_help=True, add_completion=False, help="ShortV for Hugging Face vision-language models.")


def _version(wanted: bool):
    if wanted:
        from . import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def shortv(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False):
    """ShortV for Hugging Face vision-language models."""


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
    from .reduction import visual_reduction_from_text

    return {} if reduction is None else {"visual_reduction": visual_reduction_from_text(reduction)}


Reduction = Annotated[
    str | None,
    typer.Option(
        help='Token reduction, e.g. fastv:k=2,ratio=0.5 or {"method": "vtw", "k": 16}; none turns it off.',
        show_default="that of the model's config",
    ),
]


# What several commands take, in one form everywhere. The model is the first argument; `--model NAME` is the same.
MODEL_HELP = "Hub id or directory of a ShortV repo or an original checkpoint"
ModelOption = Annotated[str | None, typer.Option("--model", help="The same as MODEL.", hidden=True)]
DefaultModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help=f"{MODEL_HELP}. Default: the demonstration model, which answers questions about coloured shapes.",
        show_default=False,
    ),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, ...; auto is the GPU, all of them if there are several, else the CPU.")
]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: the checkpoint's.")]
Layers = Annotated[
    str | None, typer.Option(help="Frozen layers, e.g. 31,29,30.", show_default="those of the model's config")
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="gqa, flickr30k, shapes or folders of pictures with a JSONL file, separated by commas; may be given several "
        "times.",
        show_default="gqa,flickr30k; for the demonstration model, shapes",
    ),
]
Metric = Literal["lc", "greedy", "cosine", "random"]
Direction = Literal["forward", "reverse"]


def _choose_model(model: str | None, option: str | None) -> str:
    """The model that an argument or `--model` names; the demonstration model if neither does."""
    from .chat import demo_model

    if model is not None and option is not None and model != option:
        raise ValueError(f"two models are named: {model} and, by --model, {option}")
    return model or option or demo_model()


@app.command()
def chat(
    model: DefaultModel = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Path or URL of a picture, composed on white; may be given several times.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="One question.", show_default="a conversation, with line editing and history")
    ] = None,
    layers: Layers = None,
    reduction: Reduction = None,
    dense: Annotated[bool, typer.Option("--dense", help="Freeze and drop nothing.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Ask the dense model and ShortV.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    model_option: ModelOption = None,
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
    model = _choose_model(model, model_option)
    loaded, processor = chats.load(model, chosen, device, dtype, **fields)
    if model == chats.demo_model():
        _say_what_the_demonstration_model_knows(images)
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
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  gives `input` line editing and history
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


def _choose_data(data: list[str] | None, model: str) -> list[str]:
    from .chat import demo_model

    return data or (["shapes"] if model == demo_model() else ["gqa", "flickr30k"])


def _say_what_the_demonstration_model_knows(images: list):
    from . import shapes

    console = Console(stderr=True, highlight=False)
    console.print(
        f"[dim]The demonstration model knows {len(shapes.COLORS)} colours ({', '.join(shapes.COLORS)}) and "
        f"{len(shapes.SHAPES)} shapes ({', '.join(shapes.SHAPES)}) on a plain ground, and nothing else. It was asked: Describe "
        "the picture. How many red objects are there? What color is the square? What shape is the blue object? Where is the "
        "large circle? Is the circle above the square?[/dim]"
    )
    for image in images:
        share = shapes.plain_share(image)
        if share < shapes.LEAST_PLAIN_SHARE:
            console.print(
                f"[yellow]This picture is not of that kind: {share:.0%} of its area is in plain colours, of those that the "
                f"model was trained on at least {shapes.LEAST_PLAIN_SHARE:.0%}. Its answer will mean nothing.[/yellow]"
            )


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
        table.add_row(label, Text(row["answer"]), time, flops, str(len(row["shortv_layers"])))  # never markup
    console = Console()
    console.print(table)
    low, high = result["speed_up_quartiles"]
    spread = f"quartiles {low:.2f}x to {high:.2f}x of {result['rounds']} rounds"
    time = f"{result['speed_up']:.2f}x to the first token ({spread})"
    if not result["settled"]:
        time = f"times scatter too much to compare ({spread}; the model is small or the machine is busy)"
    flops = result["shortv"]["prefill_flops"] / result["dense"]["prefill_flops"]
    agree = "the answers agree" if result["answers_agree"] else "the answers differ"
    console.print(f"{ours}: {flops:.1%} of the prefill's FLOPs; {agree}; {time}")


@app.command()
def flops(
    model: DefaultModel = None,
    layers: Layers = None,
    reduction: Reduction = None,
    kept: Annotated[
        int | None,
        typer.Option(
            help="Visual tokens that PruMerge leaves, which depend on the image.", show_default="what the options say"
        ),
    ] = None,
    text_tokens: Annotated[int, typer.Option("--text-tokens", "-t", help="Text tokens t.")] = 64,
    visual_tokens: Annotated[
        int | None,
        typer.Option(
            "--visual-tokens",
            "-v",
            help="Visual tokens v.",
            show_default="those of one image, e.g. 576; of LLaVA-NeXT an overview and 2 x 2 tiles, e.g. 2880",
        ),
    ] = None,
    model_option: ModelOption = None,
):
    """FLOPs of the language model's prefill, dense and with ShortV (Eq. 3-5 of the paper) and token reduction."""
    from .flops import flops_ratio, prefill_flops, visual_tokens_of

    config = _load_config(_choose_model(model, model_option))
    if layers is not None:
        config.shortv_layers = _parse_layers(layers)
    if reduction is not None:
        config.visual_reduction = _parse_reduction(reduction)["visual_reduction"]
    config.validate_shortv()
    if visual_tokens is None:
        visual_tokens = visual_tokens_of(config)
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
    table.add_row(
        name, f"{n} of {config.get_text_config().num_hidden_layers}", f"{sparse / scale:.3f}", f"{ratio:.1%}"
    )
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
    model: DefaultModel = None,
    data: Data = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each source.")] = 20,
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
    device: Device = "auto",
    dtype: Dtype = "auto",
    model_option: ModelOption = None,
):
    """Rank the decoder layers of a model on data, choose which to freeze, and write a repo that freezes them.

    Vision-language models without a ShortV class are ranked too, with `apply_shortv`.
    """
    from . import calibration_data, chat, hub, outputs, plots
    from . import layer_contribution as lcs
    from .flops import flops_ratio as ratio_of_flops

    model = _choose_model(model, model_option)
    data = _choose_data(data, model)
    budgets = {"--num-layers": num_layers, "--flops-ratio": flops_ratio, "--max-kl": max_kl}
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other")
    if save_model is not None and not given:
        raise ValueError(f"--save-model needs one of {', '.join(budgets)}")
    if save_model is not None and save_model.resolve() == Path(model).resolve():
        raise ValueError(f"--save-model {save_model} is the checkpoint itself; name another directory")
    plots.check_matplotlib()
    config, has_class = chat.any_config(model)
    if save_model is not None and not has_class:
        raise ValueError(
            f"there is no ShortV class for {config.model_type!r}, so no repo of it can be written (--save-model)"
        )
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

    loaded, processor = chat.load(model, None, device, dtype) if has_class else chat.load_stock(model, device, dtype)
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
    elif metric != "random":
        sets = [ranking.layers(number) for number in range(len(ranking.order) + 1)]
        _print_budgets(ranking, config, lcs.joint_kl_curve(loaded, inputs, sets, kl))
    if not has_class:
        file = output / "ranking.json"
        layers = f'LayerRanking.load("{file}").layers(N)' if n is None else ranking.layers(n)
        print("to freeze N layers, in Python:" if n is None else "to freeze them, in Python:")
        print(f'model = AutoModelForImageTextToText.from_pretrained("{model}")')
        print(f"apply_shortv(model, shortv_layers={layers})")
    elif n is None and metric != "random":
        build = f"build-repo {model} --ranking {output / 'ranking.json'} --num-layers N --output REPO"
        if config.base_model_name_or_path is None:  # there is nothing to reference
            build = f"lc {model} --num-layers N --save-model REPO, with the same data"
        print(f"to freeze N layers: shortv {build}")
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


def _print_budgets(ranking, config, curve: list[float]):
    """What freezing the first N layers of a ranking costs and saves, and the N that usual budgets give."""
    from .flops import flops_ratio

    t, v = ranking.text_tokens, ranking.visual_tokens
    shares = [flops_ratio(t, v, config, N=number) for number in range(len(curve))]
    table = Table(title=f"freezing the first N layers (t = {t:.0f}, v = {v:.0f})")
    for column in ("N", "prefill FLOPs", "joint KL (nats)"):
        table.add_column(column, justify="right")
    for number, (share, cost) in enumerate(zip(shares, curve, strict=True)):
        table.add_row(str(number), f"{share:.1%}", f"{cost:.3g}")
    Console().print(table)
    chosen = {}
    for budget in (0.001, 0.01, 0.1):
        chosen[f"--max-kl {budget:g}"] = max(n for n, cost in enumerate(curve) if n == 0 or cost <= budget)
    for budget in (0.75, 0.55, 0.45):
        if shares[-1] <= budget:
            chosen[f"--flops-ratio {budget:g}"] = next(n for n, share in enumerate(shares) if share <= budget)
    for budget, number in chosen.items():
        print(f"{budget}: N = {number} ({shares[number]:.1%} of FLOPs, KL {curve[number]:.3g})")


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
    model: DefaultModel = None,
    image: Annotated[
        str | None,
        typer.Option(help="Path or URL of a picture, composed on white.", show_default="the demonstration model's"),
    ] = None,
    method: Annotated[
        str, typer.Option(help="Token reduction, e.g. fastv:k=2,ratio=0.5, prumerge or JSON.")
    ] = "fastv:k=2,ratio=0.5",
    output: Annotated[Path, typer.Option(help="PNG file to write, in a folder that exists.")] = Path("patches.png"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    prompt: Annotated[str, typer.Option(help="The question; FastV's choice depends on it.")] = "Describe the image.",
    device: Device = "auto",
    dtype: Dtype = "auto",
    model_option: ModelOption = None,
):
    """Draw which patches of a picture a method keeps, drops or merges; for FastV, at every layer."""
    from rich.progress import track

    from . import chat as chats
    from . import outputs
    from .images import load_image
    from .reduction_pictures import draw_reduction

    model = _choose_model(model, model_option)
    if image is None:
        image = str(Path(chats.demo_model()) / "example.png")
    outputs.check_files(output, overwrite=overwrite)
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output is {output}; it must end in .png")
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
    model: DefaultModel = None,
    max_kl: Annotated[float, typer.Option(help="Largest mean KL divergence from the dense model, in nats.")] = 0.003,
    data: Data = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each source.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
    kl: Annotated[
        Direction, typer.Option(help="reverse: KL(VTW || dense), as released; forward: KL(dense || VTW).")
    ] = "reverse",
    device: Device = "auto",
    dtype: Dtype = "auto",
    model_option: ModelOption = None,
):
    """Find the layer at which Visual Tokens Withdrawal may begin: the first with a divergence of at most --max-kl."""
    from . import calibration_data
    from . import chat as chats
    from .vtw_calibration import first_layer_below, withdrawal_divergences

    model = _choose_model(model, model_option)
    data = _choose_data(data, model)
    loaded, processor = chats.load(model, None, device, dtype)
    n_layers = loaded.config.get_text_config().num_hidden_layers
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
    reduction: Reduction = None,
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
        raise ValueError(
            f"{model} holds its own weights, so there is no original checkpoint to reference: `shortv lc {model} "
            "--num-layers N --save-model REPO` writes a repo that holds them too"
        )
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
    device: Device = "auto",
):
    """Check files, pinned commit and code of a ShortV repo, and try it in a process without this package."""
    from .chat import place
    from .check_repo import check_repo as check

    checks = check(repo, revision, place(device))
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
    """Entry point: errors, those of the command line too, are one line, without a traceback unless SHORTV_TRACEBACK is
    set."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see the package's `__init__`
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if os.environ.get("SHORTV_TRACEBACK"):
            raise
        name = type(error).__name__  # of click's classes, which newer versions of typer keep for themselves
        if name == "NoArgsIsHelpError":
            error.show()
            raise SystemExit(2) from None
        if hasattr(error, "format_message"):
            raise SystemExit(f"shortv: {' '.join(error.format_message().split())}") from None
        raise SystemExit(_one_line(error)) from None
    if code == 130:  # typer's for Ctrl-C
        print("shortv: interrupted", file=sys.stderr)
    raise SystemExit(code or 0)


if __name__ == "__main__":
    main()
