"""The `shortv` command. Needs the `cli` extra."""

import sys
from dataclasses import asdict
from functools import partial
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


@app.callback()
def shortv():
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


REDUCTION_HELP = 'Token reduction, e.g. fastv:k=2,ratio=0.5 or {"method": "vtw", "k": 16}; none turns it off.'


@app.command()
def chat(
    model: Annotated[str, typer.Option(help="Hub id or directory of a ShortV repo or a LLaVA checkpoint.")],
    image: Annotated[
        list[str] | None, typer.Option(help="Path or URL of a picture; may be given several times.")
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

    if dense and (compare or layers is not None or reduction is not None):
        raise ValueError("--dense freezes and drops nothing; it goes with none of --compare, --layers and --reduction")
    if prompt is None and (compare or json):
        raise ValueError("--compare and --json need a --prompt")
    chosen = [] if dense else None if layers is None else _parse_layers(layers)
    fields = {"visual_reduction": None} if dense else _parse_reduction(reduction)
    images = chats.load_images(image or [])
    loaded, processor = chats.load(model, chosen, device, dtype, **fields)
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
    Console(stderr=True).print("[dim]Ask about the pictures. An empty line ends the conversation.[/dim]")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            question = ""
        if not question:
            return
        conversation.ask(question, images, on_text=partial(print, end="", flush=True))
        images = []
        print()


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
    for column in ("", "frozen layers", "TFLOPs", "ratio"):
        table.add_column(column, justify="right")
    dense = prefill_flops(text_tokens, visual_tokens, config, N=0)
    sparse = prefill_flops(text_tokens, visual_tokens, config, kept=kept)
    ratio = flops_ratio(text_tokens, visual_tokens, config, kept=kept)
    name = "ShortV" if config.visual_reduction is None else f"ShortV + {config.visual_reduction['method']}"
    table.add_row("dense", "0", f"{dense / 1e12:.3f}", "100.0%")
    table.add_row(name, f"{n} of {config.text_config.num_hidden_layers}", f"{sparse / 1e12:.3f}", f"{ratio:.1%}")
    Console().print(table)


@app.command()
def visualize(
    model: Annotated[str, typer.Option(help="Hub id or directory of a ShortV repo or a LLaVA checkpoint.")],
    image: Annotated[str, typer.Option(help="Path or URL of a picture.")],
    method: Annotated[str, typer.Option(help="Token reduction, e.g. fastv:k=2,ratio=0.5, prumerge or JSON.")],
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("patches.png"),
    prompt: Annotated[str, typer.Option(help="The question; FastV's choice depends on it.")] = "Describe the image.",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
):
    """Draw which patches of a picture a method keeps, drops or merges; for FastV, at every layer."""
    from rich.progress import track

    from . import chat as chats
    from .reduction_pictures import draw_reduction

    fields = _parse_reduction(method)
    (picture,) = chats.load_images([image])
    loaded, processor = chats.load(model, None, device, dtype, **fields)

    def progress(variants):
        return track(variants, description="Running", console=Console(stderr=True), transient=True)

    draw_reduction(loaded, processor, picture, prompt, fields["visual_reduction"], output, progress)
    print(output)


@app.command()
def vtw_k(
    model: Annotated[str, typer.Option(help="Hub id or directory of a ShortV repo or a LLaVA checkpoint.")],
    max_kl: Annotated[float, typer.Option(help="Largest mean KL divergence from the dense model, in nats.")] = 0.003,
    image: Annotated[
        list[str] | None,
        typer.Option(help="Path or URL of a picture; may be given several times. Default: drawn shapes."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="The question about the pictures given.")] = "Describe the image.",
    samples: Annotated[int, typer.Option(min=1, help="How many drawn pictures, each with a question.")] = 20,
    kl: Annotated[str, typer.Option(help="forward: KL(VTW || dense), as released; reverse.")] = "forward",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
):
    """Find the layer at which Visual Tokens Withdrawal may begin: the first with a divergence of at most --max-kl."""
    from rich.progress import track

    from . import chat as chats
    from .vtw_calibration import first_layer_below, sample_inputs, withdrawal_divergences

    pictures = chats.load_images(image or [])
    loaded, processor = chats.load(model, None, device, dtype)
    n_layers = loaded.config.text_config.num_hidden_layers
    first_layer_below({}, max_kl, n_layers)
    inputs = list(sample_inputs(processor, samples, pictures, prompt))
    tracked = track(inputs, description="Measuring", console=Console(stderr=True), transient=True)
    found = withdrawal_divergences(loaded, tracked, kl=kl)
    for layer, value in found.items():
        print(f"K = {layer:2d}   {value:.6f} nats")
    chosen = first_layer_below(found, max_kl, n_layers)
    print(f"--reduction vtw:k={chosen}" if chosen < n_layers else f"no layer stays within {max_kl} nats")


@app.command()
def build_repo(
    model: Annotated[str, typer.Argument(help="Hub id or directory of the original checkpoint.")],
    output: Annotated[Path, typer.Option(help="Directory to write.")],
    layers: Annotated[str, typer.Option(help="Layers to freeze, most ineffective first, e.g. 31,29,30.")],
    reduction: Annotated[str | None, typer.Option(help=REDUCTION_HELP)] = None,
    revision: Annotated[str | None, typer.Option(help="Commit or branch of the original checkpoint.")] = None,
    processor_dir: Annotated[Path | None, typer.Option(help="Local directory with the processor files.")] = None,
):
    """Write a repo (config, code, processor files) that references the weights of an original checkpoint."""
    from huggingface_hub import snapshot_download

    from . import hub

    config = _load_config(model, revision)
    config.shortv_layers = _parse_layers(layers)
    if reduction is not None:
        config.visual_reduction = _parse_reduction(reduction)["visual_reduction"]
    config.validate_shortv()
    if config.base_model_name_or_path is None:
        raise ValueError(f"{model} holds its own weights; build-repo needs an original checkpoint to reference")
    if output.resolve() == Path(model).resolve():
        raise ValueError(f"--output {output} is the checkpoint itself; name another directory")
    if processor_dir is None and not Path(model).is_dir():
        files = [*hub.PROCESSOR_FILES, "generation_config.json"]
        processor_dir = Path(snapshot_download(model, revision=config.base_model_revision, allow_patterns=files))
    elif processor_dir is None and any((Path(model) / name).is_file() for name in hub.PROCESSOR_FILES):
        processor_dir = Path(model)
    hub.build_repo(config, output, processor_dir)
    print(f"{output}: freezes layers {config.shortv_layers}, weights from {config.base_model_name_or_path}")
    if processor_dir is None:
        print(f"no processor files in {model}: pass --processor-dir to make a repo for pipelines", file=sys.stderr)


def main():
    """Entry point: errors that a user can mend are one line, without a traceback."""
    try:
        app()
    except (OSError, ValueError) as error:
        raise SystemExit(f"shortv: {str(error).splitlines()[0]}") from None


if __name__ == "__main__":
    main()
