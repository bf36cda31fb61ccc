"""What several commands take, in one form everywhere. The model is the first argument; `--model NAME` is the same."""

from pathlib import Path
from typing import Annotated, Literal

import typer


Reduction = Annotated[
    str | None,
    typer.Option(
        help='Token reduction, e.g. fastv:k=2,ratio=0.5 or {"method": "vtw", "k": 16}; none turns it off.',
        show_default="that of the model's config",
    ),
]
ModelOption = Annotated[str | None, typer.Option("--model", help="The same as MODEL.", hidden=True)]
DefaultModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Hub id or directory of a ShortV repo or an original checkpoint. Default: the demonstration model, which "
        "answers questions about coloured shapes.",
        show_default=False,
    ),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, ...; auto is the GPU, all of them if there are several, else the CPU.")
]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: the checkpoint's.")]
Layers = Annotated[
    str | None,
    typer.Option(
        help="Frozen layers, e.g. 31,29,30, or halves of them: 31.mlp,29.self_attn.",
        show_default="those of the model's config",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="gqa, flickr30k, shapes, task:NAME for a task of lmms-eval's, or folders of pictures with a JSONL file, "
        "separated by commas; may be given several times.",
        show_default="gqa,flickr30k; for the demonstration model, shapes",
    ),
]
IncludePath = Annotated[Path | None, typer.Option(help="Folder with further tasks for lmms-eval.", show_default=False)]
Direction = Literal["forward", "reverse"]


def parse_numbers(text: str, option: str, what: str = "numbers") -> list[int]:
    """Whole numbers separated by commas. Raises `ValueError` that names the option."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{option} takes {what} separated by commas, got {text!r}") from None


def split_names(entries: list[str] | None) -> tuple[str, ...] | None:
    """Each name once. Entries are split at commas, but for a method with options, which is taken whole."""
    if entries is None:
        return None
    names = []
    for entry in entries:
        whole = ":" in entry or entry.lstrip().startswith("{")
        names += [entry] if whole else entry.split(",")
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))


def parse_layers(layers: str, option: str = "--layers") -> list[int | str]:
    """Layer ids and names of their parts, separated by commas; whether a model has them is not checked. Raises `ValueError`
    that names the option."""
    try:
        return [part if "." in part else int(part) for part in map(str.strip, layers.split(",")) if part]
    except ValueError:
        raise ValueError(
            f"{option} takes layer ids (31, or 31.mlp and 31.self_attn for a half) separated by commas, got {layers!r}"
        ) from None


def parse_reduction(reduction: str | None, config=None, kind: str = "image") -> dict:
    """The config field that a --reduction option sets, as keyword arguments.

    Of a method whose options depend on the model, the bare name stands for its `defaults(config, kind)`: those for the
    model's `config` and the `kind` of input, "image" or "video".
    """
    from ..reduction import METHODS, visual_reduction_from_text

    if reduction is None:
        return {}
    method = METHODS.get(reduction.strip())
    if method is not None and config is not None:
        return {"visual_reduction": method.defaults(config, kind)}
    return {"visual_reduction": visual_reduction_from_text(reduction)}


def choose_model(model: str | None, option: str | None) -> str:
    """The model that an argument or `--model` names; the demonstration model if neither does."""
    from ..hub.loading import demo_model

    if model is not None and option is not None and model != option:
        raise ValueError(f"two models are named: {model} and, by --model, {option}")
    return model or option or demo_model()


def choose_data(data: list[str] | None, model: str) -> list[str]:
    from ..hub.loading import demo_model

    return data or (["shapes"] if model == demo_model() else ["gqa", "flickr30k"])


def load_config(model: str, revision: str | None = None):
    """The ShortV config of a ShortV repo or an original checkpoint; loads no weights."""
    from ..hub.loading import model_classes

    config_class = model_classes(model, revision=revision)[0]
    return config_class.from_pretrained(model, revision=revision)  # type: ignore[arg-type]  # upstream means `str | None`


def check_takes_video(model: str, config):
    """Raises `ValueError` if the family of the model has no token for videos."""
    from ..hub.loading import demo_model
    from ..upstream import visual_token_ids

    if "video" not in visual_token_ids(config):
        name = "the demonstration model" if model == demo_model() else model
        raise ValueError(f"{name} takes no video: its family, {config.base_model_type}, has no token for one")


def check_png(output: Path):
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output is {output}; it must end in .png")
