"""The `shortv` command. Needs the `cli` extra."""

from pathlib import Path
from typing import Annotated


try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"the shortv command needs the extra: pip install 'shortv_hf[cli]' ({error})") from error


app = typer.Typer(no_args_is_help=True, add_completion=False, help="ShortV for Hugging Face LLaVA models.")


@app.callback()
def shortv():
    """ShortV for Hugging Face LLaVA models."""


def _load_config(model: str, revision: str | None = None):
    """The ShortV config of a ShortV repo or an original checkpoint; loads no weights."""
    from transformers import PretrainedConfig

    from .configuration_shortv import ShortVLlavaConfig, ShortVLlavaNextConfig

    model_type = PretrainedConfig.get_config_dict(model, revision=revision)[0].get("model_type")
    for config_class in (ShortVLlavaConfig, ShortVLlavaNextConfig):
        if model_type in (config_class.model_type, config_class.base_model_type):
            return config_class.from_pretrained(model, revision=revision)
    raise ValueError(f"{model} has model_type {model_type!r}; ShortV supports LLaVA-1.5 and LLaVA-NeXT")


def _parse_layers(layers: str) -> list[int]:
    try:
        return [int(part) for part in layers.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--layers takes layer ids separated by commas, got {layers!r}") from None


@app.command()
def flops(
    model: Annotated[str, typer.Argument(help="Hub id or directory of a ShortV repo or a LLaVA checkpoint.")],
    layers: Annotated[str | None, typer.Option(help="Frozen layers, e.g. 31,29,30; default: the config's.")] = None,
    text_tokens: Annotated[int, typer.Option("--text-tokens", "-t", help="Text tokens t.")] = 64,
    visual_tokens: Annotated[int, typer.Option("--visual-tokens", "-v", help="Visual tokens v.")] = 576,
):
    """FLOPs of the language model's prefill, dense and with ShortV (Eq. 3-5 of the paper)."""
    from .flops import flops_ratio, prefill_flops

    config = _load_config(model)
    if layers is not None:
        config.shortv_layers = _parse_layers(layers)
        config.validate_shortv()
    n = len(config.shortv_layers)
    table = Table(title=f"Prefill, t = {text_tokens}, v = {visual_tokens}")
    for column in ("", "frozen layers", "TFLOPs", "ratio"):
        table.add_column(column, justify="right")
    dense = prefill_flops(text_tokens, visual_tokens, config)
    sparse = prefill_flops(text_tokens, visual_tokens, config, N=n)
    ratio = flops_ratio(text_tokens, visual_tokens, config, N=n)
    table.add_row("dense", "0", f"{dense / 1e12:.3f}", "100.0 %")
    table.add_row("ShortV", f"{n} of {config.text_config.num_hidden_layers}", f"{sparse / 1e12:.3f}", f"{ratio:.1%}")
    Console().print(table)


@app.command()
def build_repo(
    model: Annotated[str, typer.Argument(help="Hub id or directory of the original checkpoint.")],
    output: Annotated[Path, typer.Option(help="Directory to write.")],
    layers: Annotated[str, typer.Option(help="Layers to freeze, most ineffective first, e.g. 31,29,30.")],
    revision: Annotated[str | None, typer.Option(help="Commit or branch of the original checkpoint.")] = None,
    processor_dir: Annotated[Path | None, typer.Option(help="Local directory with the processor files.")] = None,
):
    """Write a repo (config, code, processor files) that references the weights of an original checkpoint."""
    from . import hub

    config = _load_config(model, revision)
    config.shortv_layers = _parse_layers(layers)
    if processor_dir is None and any((Path(model) / name).is_file() for name in hub.PROCESSOR_FILES):
        processor_dir = Path(model)
    hub.build_repo(config, output, processor_dir)
    print(f"{output}: freezes {len(config.shortv_layers)} layers, weights from {config.base_model_name_or_path}")


def main():
    """Entry point: errors that a user can mend are one line, without a traceback."""
    try:
        app()
    except (OSError, ValueError) as error:
        raise SystemExit(f"shortv: {error}") from None


if __name__ == "__main__":
    main()
