"""`shortv visualize`."""

from pathlib import Path
from typing import Annotated

import typer

from ..command_line.options import (
    DefaultModel,
    Device,
    Dtype,
    ModelOption,
    check_png,
    check_takes_video,
    choose_model,
    load_config,
    parse_reduction,
)


def visualize(
    model: DefaultModel = None,
    image: Annotated[
        str | None,
        typer.Option(help="Path or URL of a picture, composed on white.", show_default="the demonstration model's"),
    ] = None,
    video: Annotated[
        str | None,
        typer.Option(
            help="Path of a video instead, for illava and models that take one. Needs the `video` extra.",
            show_default="none",
        ),
    ] = None,
    max_frames: Annotated[
        int, typer.Option(min=1, help="The most frames of the video for the model; 8 of them are drawn.")
    ] = 32,
    reduction: Annotated[
        str,
        typer.Option(
            "--reduction",
            "--method",
            help="Token reduction, e.g. fastv:k=2,ratio=0.5, prumerge, illava (its settings for the model) or JSON.",
        ),
    ] = "fastv:k=2,ratio=0.5",
    output: Annotated[Path, typer.Option(help="PNG file to write, in a folder that exists.")] = Path("patches.png"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    prompt: Annotated[str, typer.Option(help="The question; FastV's choice depends on it.")] = "Describe the image.",
    token: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="For illava: the patch to follow, whose token is outlined. They are numbered from 0 in rows, tile after tile.",
            show_default="the one that the last merge in the vision tower is into",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    model_option: ModelOption = None,
):
    """Draw which patches of a picture, or of a video's frames, a method keeps, drops or merges; for FastV and iLLaVA, layer by layer."""
    from rich.console import Console
    from rich.progress import track

    from ..data import outputs
    from ..data.images import load_image
    from ..data.video import load_video
    from ..hub.loading import demo_model, load
    from .patches import draw_reduction

    model = choose_model(model, model_option)
    if image is not None and video is not None:
        raise ValueError("--image and --video: only one of them can be drawn")
    if image is None:
        image = str(Path(demo_model()) / "example.png")
    outputs.check_files(output, overwrite=overwrite)
    check_png(output)
    config, picture = load_config(model), load_image(image) if video is None else load_video(video, max_frames)
    if video is not None:
        check_takes_video(model, config)
    fields = parse_reduction(reduction, config, "image" if video is None else "video")
    loaded, processor = load(model, None, device, dtype, **fields)

    def progress(variants):
        return track(variants, description="Running", console=Console(stderr=True), transient=True)

    with outputs.whole_file(output) as file:
        draw_reduction(loaded, processor, picture, prompt, fields["visual_reduction"], file, progress, token)
    print(output)
