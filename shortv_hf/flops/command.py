"""`shortv flops`."""

from typing import Annotated

import typer

from ..command_line.options import (
    DefaultModel,
    Layers,
    ModelOption,
    Reduction,
    choose_model,
    load_config,
    parse_layers,
    parse_reduction,
)


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
    from rich.console import Console
    from rich.table import Table

    from ..configuration_shortv import frozen_text
    from .equations import flops_ratio, prefill_flops, visual_tokens_of

    config = load_config(choose_model(model, model_option))
    if layers is not None:
        config.shortv_layers = parse_layers(layers)
    if reduction is not None:
        config.visual_reduction = parse_reduction(reduction, config)["visual_reduction"]
    config.validate_shortv()
    if visual_tokens is None:
        visual_tokens = visual_tokens_of(config)
    n_layers = config.get_text_config().num_hidden_layers
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
    frozen = frozen_text(config.shortv_layers, n_layers).replace(" layers", "")
    table.add_row(name, frozen, f"{sparse / scale:.3f}", f"{ratio:.1%}")
    Console().print(table)
