"""`shortv visualize`."""

from pathlib import Path
from typing import Annotated

import typer

from ..command_line.options import DefaultModel, Device, Dtype, ModelOption, check_png, choose_model, parse_reduction


def visualize(
    model: DefaultModel = None,
    image: Annotated[
        str | None,
        typer.Option(help="Path or URL of a picture, composed on white.", show_default="the demonstration model's"),
    ] = None,
    reduction: Annotated[
        str,
        typer.Option("--reduction", "--method", help="Token reduction, e.g. fastv:k=2,ratio=0.5, prumerge or JSON."),
    ] = "fastv:k=2,ratio=0.5",
    output: Annotated[Path, typer.Option(help="PNG file to write, in a folder that exists.")] = Path("patches.png"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    prompt: Annotated[str, typer.Option(help="The question; FastV's choice depends on it.")] = "Describe the image.",
    device: Device = "auto",
    dtype: Dtype = "auto",
    model_option: ModelOption = None,
):
    """Draw which patches of a picture a method keeps, drops or merges; for FastV, at every layer."""
    from rich.console import Console
    from rich.progress import track

    from ..data import outputs
    from ..data.images import load_image
    from ..hub.loading import demo_model, load
    from .patches import draw_reduction

    model = choose_model(model, model_option)
    if image is None:
        image = str(Path(demo_model()) / "example.png")
    outputs.check_files(output, overwrite=overwrite)
    check_png(output)
    fields = parse_reduction(reduction)
    picture = load_image(image)
    loaded, processor = load(model, None, device, dtype, **fields)

    def progress(variants):
        return track(variants, description="Running", console=Console(stderr=True), transient=True)

    with outputs.whole_file(output) as file:
        draw_reduction(loaded, processor, picture, prompt, fields["visual_reduction"], file, progress)
    print(output)
