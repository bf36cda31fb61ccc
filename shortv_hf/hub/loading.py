"""ShortV repos and original checkpoints by name: config, model and processor, in directories or on the Hub."""

from functools import partial
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils.hub import cached_file

from ..data.plain_processor import plain_class
from ..modeling_shortv import MODELS, apply_shortv
from ..upstream import visual_token_ids
from .names import is_hub_id


class NoShortVClass(ValueError):
    """A model is of a family that has no ShortV class."""


def model_classes(model: str, **hub_kwargs) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """Config and model class for a ShortV repo or an original checkpoint (Hub id or directory); loads no weights.

    Raises:
        NoShortVClass: if it is of a family that has none.
        ValueError: if there is no model.
        OSError: if it cannot be found.
    """
    if not is_hub_id(str(model)) and not Path(model).expanduser().exists():
        raise ValueError(f"no such directory: {model} (and models on the Hub are named owner/name)")
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        if (Path(model) / "adapter_config.json").is_file():
            raise ValueError(
                f"{model} is a PEFT adapter, not a checkpoint: merge it first (`merge_and_unload`) and save that"
            )
        raise ValueError(f"{model} holds no config.json, so it is neither a checkpoint nor a ShortV repo")
    model_type = PretrainedConfig.get_config_dict(model, **hub_kwargs)[0].get("model_type")
    for model_class in MODELS:
        config_class = model_class.config_class
        if model_type in (config_class.model_type, config_class.base_model_type):
            return config_class, model_class
    supported = ", ".join(model_class.config_class.base_model_type for model_class in MODELS)
    raise NoShortVClass(f"{model} has model_type {model_type!r}; ShortV has classes for {supported}")


def any_config(model: str) -> tuple[PretrainedConfig, bool]:
    """The config of a vision-language model, and whether its family has a ShortV class. Errors as [`model_classes`]."""
    try:
        return model_classes(model)[0].from_pretrained(model), True
    except NoShortVClass:
        config = AutoConfig.from_pretrained(model)
        if not visual_token_ids(config):
            raise
        return config, False


def place(device: str) -> str:
    """The `device_map` for a device: "auto" is the GPU, all GPUs if there are several, or the CPU if there is none.

    Raises:
        ValueError: the device cannot be used.
    """
    if device == "auto":
        if torch.cuda.device_count() > 1:
            return "auto"
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def load_processor(model: str, config: PretrainedConfig) -> ProcessorMixin:
    """The processor of a repo or checkpoint, or of the base that a repo without processor files references.

    Raises:
        ValueError: neither has one that can be loaded.
    """
    base = getattr(config, "base_model_name_or_path", None)
    found = partial(cached_file, filename="tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    loader = plain_class(config) or AutoProcessor
    try:
        if found(model) is not None or base is None or base == model:
            return loader.from_pretrained(model)
        return loader.from_pretrained(base, revision=config.base_model_revision)
    except (OSError, ValueError, ImportError) as error:  # an import of torchvision, which some families' need
        where = model if base is None or base == model else f"{model} or its base {base}"
        raise ValueError(f"no processor can be loaded from {where}: {' '.join(str(error).split())}") from error


def load(
    model: str, layers: list[int | str] | None = None, device: str = "auto", dtype: str = "auto", **config_fields
):
    """Model and processor, ready to answer.

    Args:
        model: Hub id or directory.
        layers: frozen layers instead of the config's.
        device: a torch device, or "auto" ([`place`]).
        dtype: name of a torch dtype, or "auto" for the checkpoint's.
        config_fields: other fields instead of the config's, such as `visual_reduction`.

    Raises:
        ValueError, OSError: as `from_pretrained`, and for an unknown dtype or device.
    """
    _check_dtype(dtype)
    device_map = place(device)
    config_class, model_class = model_classes(model)
    processor = load_processor(model, config_class.from_pretrained(model))  # before the weights, which take long
    if layers is not None:
        config_fields["shortv_layers"] = layers
    loaded = model_class.from_pretrained(model, dtype=dtype, device_map=device_map, **config_fields)
    return loaded.eval(), processor


def load_stock(model: str, device: str = "auto", dtype: str = "auto") -> tuple[PreTrainedModel, ProcessorMixin]:
    """As [`load`], of a family without a ShortV class: the stock model after `apply_shortv`, with nothing frozen.

    Raises:
        ValueError, OSError: as `from_pretrained` and `apply_shortv`, and for an unknown dtype or device.
    """
    _check_dtype(dtype)
    device_map = place(device)
    processor = load_processor(model, any_config(model)[0])
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, device_map=device_map)
    return apply_shortv(loaded, []).eval(), processor


def _check_dtype(dtype: str):
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}; use auto, float32, bfloat16 or float16")


def demo_model() -> str:
    """The directory of the demonstration model that this repository carries, also in an installed package.

    Raises:
        ValueError: if the installation lacks it.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "demo", package.parent / "hub_configs" / "shortv-shapes-demo"):
        if (folder / "model.safetensors").is_file():
            return str(folder)
    raise ValueError("this installation lacks the demonstration model; name another one with --model")
