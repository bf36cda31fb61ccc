"""`shortv demo`."""

from typing import Annotated

import typer

from ..command_line.options import (
    DefaultModel,
    Device,
    Dtype,
    Layers,
    ModelOption,
    Reduction,
    choose_model,
    load_config,
    parse_layers,
    parse_reduction,
)


def demo(
    model: DefaultModel = None,
    layers: Layers = None,
    reduction: Reduction = None,
    host: Annotated[
        str, typer.Option(help="Address to serve on; 0.0.0.0 lets other machines in. There is no password.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port to serve on.", show_default="the first free one from 7860 on"),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    model_option: ModelOption = None,
):
    """A page in the browser: chat about pictures, see which tokens are frozen or dropped, compare with the dense model."""
    from ..hub.loading import demo_model

    model = choose_model(model, model_option)
    chosen = None if layers is None else parse_layers(layers)
    fields = parse_reduction(reduction, load_config(model))
    from ..pictures.plots import short_name
    from .app import build, serve  # Gradio, before the weights are loaded
    from .session import Sessions
    from .shared import load_shared

    is_demonstration_model = model == demo_model()
    name = "the demonstration model" if is_demonstration_model else short_name(model)
    shared = load_shared(model, name, chosen, device, dtype, **fields)
    serve(build(Sessions(shared, max_new_tokens), is_demonstration_model), host, port)
