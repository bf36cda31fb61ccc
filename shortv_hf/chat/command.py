"""`shortv chat`."""

import os
import sys
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from io import TextIOWrapper
from json import dumps
from typing import Annotated

import typer

from ..command_line.errors import one_line
from ..command_line.options import (
    DefaultModel,
    Device,
    Dtype,
    Layers,
    ModelOption,
    Reduction,
    check_takes_video,
    choose_model,
    load_config,
    parse_layers,
    parse_reduction,
)


def chat(
    model: DefaultModel = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            help="Path or URL of a picture, composed on white, or a directory of pictures, in the order of their names; may "
            "be given several times."
        ),
    ] = None,
    video: Annotated[
        str | None,
        typer.Option(help="Path of a video, for models that take one. Needs the `video` extra."),
    ] = None,
    max_frames: Annotated[
        int, typer.Option(min=1, help="The most frames of the video, spaced evenly from its first to its last.")
    ] = 32,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames of the video a second, where they are not too many.", show_default="--max-frames"),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="One question.", show_default="a conversation, with line editing and history")
    ] = None,
    layers: Layers = None,
    reduction: Reduction = None,
    dense: Annotated[bool, typer.Option("--dense", help="Freeze and drop nothing.")] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Ask the dense model and ShortV: answers, visual tokens, time, FLOPs, memory."),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    model_option: ModelOption = None,
):
    """Ask a model about pictures or a video: one answer, dense and ShortV compared, or a conversation that keeps its cache."""
    from ..data.images import load_images
    from ..data.video import load_video
    from ..hub.loading import demo_model, load
    from .comparison import compare as compare_with_dense
    from .conversation import Conversation

    if dense and (compare or layers is not None or reduction is not None):
        raise ValueError("--dense freezes and drops nothing; it goes with none of --compare, --layers and --reduction")
    if prompt is None and (compare or json):
        raise ValueError("--compare and --json need a --prompt")
    if fps is not None and fps <= 0:
        raise ValueError(f"--fps is {fps}; it must be more than 0")
    chosen = [] if dense else None if layers is None else parse_layers(layers)
    model = choose_model(model, model_option)
    config = load_config(model)
    if video is not None:
        check_takes_video(model, config)
    kind = "image" if video is None else "video"
    fields = {"visual_reduction": None} if dense else parse_reduction(reduction, config, kind)
    images = load_images(image or [])
    videos = [] if video is None else [load_video(video, max_frames, fps)]
    loaded, processor = load(model, chosen, device, dtype, **fields)
    if model == demo_model():
        _say_what_the_demonstration_model_knows(images)
    if compare and prompt is not None:
        _print_comparison(compare_with_dense(loaded, processor, prompt, images, max_new_tokens, videos), json)
        return
    conversation = Conversation(loaded, processor, max_new_tokens)
    if prompt is not None:
        on_text = None if json else partial(print, end="", flush=True)
        answer = conversation.ask(prompt, images, on_text, videos)
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
    from rich.console import Console

    what = "video" if videos else "pictures"
    Console(stderr=True).print(f"[dim]Ask about the {what}. An empty line ends the conversation.[/dim]")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            question = ""
        if not question:
            return
        failure = None
        try:
            conversation.ask(question, images, partial(print, end="", flush=True), videos)
            images, videos = [], []
        except KeyboardInterrupt:
            failure = "shortv: interrupted"
        except Exception as error:
            if os.environ.get("SHORTV_TRACEBACK"):
                raise
            failure = one_line(error)
        print(flush=True)
        if failure:  # the conversation is as it was before this message
            print(failure, file=sys.stderr)


def _say_what_the_demonstration_model_knows(images: list):
    from rich.console import Console

    from ..data import shapes

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
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    reduction = result["shortv"]["visual_reduction"]
    ours = "ShortV" if reduction is None else f"ShortV + {reduction['method']}"
    rows = [result["dense"], result["shortv"]]
    table = Table(title=f"{result['prompt_tokens']} prompt tokens, {result['visual_tokens']} of them visual")
    for column in ("", "dense", ours):
        table.add_column(column)
    table.add_row("answer", *(Text(row["answer"]) for row in rows))  # never markup
    table.add_row("frozen layers and halves", *(str(len(row["shortv_layers"])) for row in rows))
    table.add_row("visual tokens in the last layer", *(str(row["visual_tokens_left"]) for row in rows))
    table.add_row("time to first token", *(f"{1000 * row['time_to_first_token_s']:.1f} ms" for row in rows))
    table.add_row("prefill GFLOPs, vision tower included", *(f"{row['prefill_flops'] / 1e9:.3f}" for row in rows))
    table.add_row("peak memory above the weights", *(f"{row['peak_memory_bytes'] / 2**20:.1f} MiB" for row in rows))
    console = Console()
    console.print(table)
    low, high = result["speed_up_quartiles"]
    spread = f"quartiles {low:.2f}x to {high:.2f}x of {result['rounds']} rounds"
    time = f"{result['speed_up']:.2f}x to the first token ({spread})"
    if not result["settled"]:
        time = f"times scatter too much to compare ({spread}; the model is small or the machine is busy)"
    whole, text = (rows[1][name] / rows[0][name] for name in ("prefill_flops", "language_model_flops"))
    agree = "the answers agree" if result["answers_agree"] else "the answers differ"
    flops = f"{text:.1%} of the language model's prefill FLOPs ({whole:.1%} with the vision tower)"
    console.print(f"{ours}: {flops}; {agree}; {time}")
