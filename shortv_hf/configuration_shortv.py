"""Configurations of the ShortV models: those of Hugging Face's vision-language models plus four fields.

`shortv_layers` (`list[int | str]`, default `[]`)
    Decoder layers that freeze visual tokens. A set for the forward pass; the order records the ranking (the most
    ineffective layer first). `[]` is the dense model. A layer updates visual tokens twice, and an entry can name one of
    the two: `12` is the whole layer, `"12.mlp"` its FFN, `"12.self_attn"` its attention.
`visual_reduction` (`dict`, *optional*)
    A visual-token reduction method to combine with, e.g. `{"method": "fastv", "k": 2, "ratio": 0.5}`; the methods and
    their options are in `reduction_….py`. `None` turns it off.
`base_model_name_or_path` (`str`, *optional*)
    The original checkpoint (Hub id or local directory) whose weights this repo references. `None` when the repo holds
    its own weights.
`base_model_revision` (`str`, *optional*)
    The commit of the base checkpoint.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from transformers import (
    Gemma3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)
from transformers.utils.hub import cached_file, extract_commit_hash

from .reduction import ModelSizes, parse_visual_reduction
from .reduction_downsample import Downsample
from .reduction_fastv import FastV
from .reduction_illava import ILLaVA, illava_defaults
from .reduction_prumerge import PruMerge, PruMergePlus
from .reduction_random import RandomSubset
from .reduction_vtc_cls import VTCCLS
from .reduction_vtw import VTW
from .upstream import has_tied_head, inherit_tables


# What `config.visual_reduction` can name: methods are known from here on.
REDUCTIONS = (Downsample, FastV, ILLaVA, PruMerge, PruMergePlus, RandomSubset, VTCCLS, VTW)


PARTS = ("self_attn", "mlp")  # of a layer, in their order; as Transformers calls its modules
PART = re.compile(r"(0|[1-9][0-9]*)\.(self_attn|mlp)")
SHORTV_FIELDS = ("shortv_layers", "visual_reduction", "base_model_name_or_path", "base_model_revision")


def validate_shortv_layers(shortv_layers: Iterable[int | str], num_hidden_layers: int) -> list[int | str]:
    """Return `shortv_layers` as a list of ints and names of parts in the given order.

    Raises:
        ValueError: if an id is not an integer, is negative, is not below `num_hidden_layers`, or a part's name is unknown;
            or if an update is named twice.
    """
    valid = (
        f"valid layer ids are the integers 0 to {num_hidden_layers - 1}, and of their parts '0.mlp' or '0.self_attn'"
    )
    if isinstance(shortv_layers, (str, bytes)) or not isinstance(shortv_layers, Iterable):
        raise ValueError(f"shortv_layers must be a list of layer ids, got {shortv_layers!r}; {valid}")
    layers: list[int | str] = []
    updates: set[tuple[int, str]] = set()
    for entry in shortv_layers:
        parts: tuple[str, ...] = PARTS
        layer: Any = entry
        if isinstance(entry, str) and (named := PART.fullmatch(entry)):
            layer, parts = int(named[1]), (named[2],)
        if isinstance(layer, bool) or not isinstance(layer, Integral):
            raise ValueError(f"shortv_layers holds {entry!r}, which is not an integer; {valid}")
        if not 0 <= int(layer) < num_hidden_layers:
            raise ValueError(f"shortv_layers holds {entry}, which is out of range; {valid}")
        named_now = {(int(layer), part) for part in parts}
        if named_now & updates:
            raise ValueError(f"shortv_layers holds {entry} twice, or beside a part of it; {valid}, each at most once")
        updates |= named_now
        layers.append(entry if isinstance(entry, str) else int(layer))
    return layers


def frozen_updates(shortv_layers: Iterable[int | str]) -> tuple[frozenset[int], frozenset[int]]:
    """Ids of the layers whose attention does not update visual tokens, and of those whose FFN does not."""
    attention, ffn = set(), set()
    for entry in shortv_layers:
        layer, _, part = str(entry).partition(".")
        if part != "mlp":
            attention.add(int(layer))
        if part != "self_attn":
            ffn.add(int(layer))
    return frozenset(attention), frozenset(ffn)


def frozen_text(shortv_layers: Iterable[int | str], num_hidden_layers: int) -> str:
    """How much is frozen, in words: "8 of 12 layers", "6 of 12 layers and 3 halves"."""
    attention, ffn = frozen_updates(shortv_layers)
    whole, halves = len(attention & ffn), len(attention ^ ffn)
    more = f" and {halves} {'half' if halves == 1 else 'halves'}" if halves else ""
    return f"{whole} of {num_hidden_layers} layers{more}"


def validate_visual_reduction(visual_reduction: dict | None, config: PretrainedConfig) -> dict | None:
    """Return a copy of `visual_reduction`.

    Raises:
        ValueError: for an unknown method or option, or a value out of range for the model of this `config`.
    """
    if visual_reduction is None:
        return None
    parse_visual_reduction(visual_reduction, ModelSizes.of(config))
    return dict(visual_reduction)


def local_path_or_id(name: str | os.PathLike) -> str:
    """`name` if it is a Hub id; the absolute path if it is a local directory, since a reference outlives the process."""
    return os.path.abspath(name) if os.path.isdir(name) else str(name)


def validate_settings(config: PretrainedConfig) -> None:
    """Check the ShortV fields of a config against its text model; the layers become a list of ints.

    Raises:
        ValueError: names the bad value.
    """
    layers = [] if config.shortv_layers is None else config.shortv_layers
    config.shortv_layers = validate_shortv_layers(layers, config.get_text_config().num_hidden_layers)
    config.visual_reduction = validate_visual_reduction(config.visual_reduction, config)


def with_both_rope_layouts(text_config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings in the fields of both lines: 5.x reads and writes `rope_parameters`, 4.x `rope_theta` and
    `rope_scaling`, and each silently takes its default for what it does not find. M-RoPE's sections are part of the
    scaling on 4.x. Where 5.x keeps parameters per kind of layer, as of Gemma 3, 4.x has a field for the sliding ones."""
    rope = text_config.get("rope_parameters") or {}
    fields: dict[str, Any] = {}
    if "full_attention" in rope:
        local = rope.get("sliding_attention") or {}
        if "rope_theta" in local:
            fields["rope_local_base_freq"] = local["rope_theta"]
        rope = rope["full_attention"]
    if "rope_theta" not in rope:
        return text_config
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    fields["rope_theta"] = rope["rope_theta"]
    fields["rope_scaling"] = None if scaling in ({}, {"rope_type": "default"}) else scaling
    return {**text_config, **fields}


if TYPE_CHECKING:  # what the mixin is put before
    _Config = PretrainedConfig
else:
    _Config = object


class ShortVConfigMixin(_Config):
    """What the ShortV configs add to their Hugging Face parents: validation, and how they are read and written."""

    base_model_type: str  # the model type of the original checkpoints, the parent's
    tokenizer_is_the_file = False  # whether upstream reads `tokenizer.json` as it is, whatever class is declared

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "__init__" not in vars(cls):  # 5.x would write one from the parent's fields
            cls.__init__ = ShortVConfigMixin.__init__  # type: ignore[method-assign]
        super().__init_subclass__(**kwargs)
        cls.base_model_type = super().model_type
        inherit_tables(cls, cls.base_model_type)

    def __init__(
        self,
        *args: Any,
        shortv_layers: Sequence[int] | None = (),
        visual_reduction: dict | None = None,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(kwargs.get("text_config"), dict):
            kwargs["text_config"] = with_both_rope_layouts(kwargs["text_config"])
        else:  # the text model's fields can stand beside the others, as in Qwen2-VL's original configs
            kwargs = with_both_rope_layouts(kwargs)
        super().__init__(*args, **kwargs)
        for part in (self.get_text_config(), self.vision_config):
            vars(part).pop(
                "model_type", None
            )  # the class's, not what 4.x takes from a flat config or another line wrote
        self.shortv_layers = shortv_layers
        self.visual_reduction = visual_reduction
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.validate_shortv()

    def validate_shortv(self) -> None:
        """Check the ShortV fields against the text model. Raises `ValueError` that names the bad value."""
        validate_settings(self)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a `config.json`. That of an original checkpoint becomes a ShortV config which references it."""
        hub_kwargs = {k: kwargs[k] for k in ("cache_dir", "token", "local_files_only", "revision") if k in kwargs}
        subfolder = kwargs.get("subfolder", "")
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type == cls.base_model_type:
            name = os.fspath(pretrained_model_name_or_path)
            commit = None
            if os.path.isfile(name):
                name = os.path.dirname(name)
            elif not os.path.isdir(name):
                config_file = cached_file(name, "config.json", subfolder=subfolder, **hub_kwargs)
                commit = extract_commit_hash(config_file, None)
            config_dict = {
                **config_dict,
                "model_type": cls.model_type,
                "base_model_name_or_path": local_path_or_id(name),
                "base_model_revision": commit,
            }
            config_dict.pop("architectures", None)
        elif model_type != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} has model_type {model_type!r}; {cls.__name__} reads "
                f"{cls.model_type!r} and the original {cls.base_model_type!r} checkpoints"
            )
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the parent's; fields that `kwargs` override are validated too."""
        result = super().from_dict(config_dict, **kwargs)
        (result[0] if isinstance(result, tuple) else result).validate_shortv()
        return result

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As the parent's. Raises `ValueError` rather than write bad fields."""
        self.validate_shortv()
        super().save_pretrained(*args, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As the parent's; without the `auto_map` where the code that it names is not beside the file."""
        super().to_json_file(json_file_path, *args, **kwargs)
        if not os.path.isfile(os.path.join(os.path.dirname(json_file_path), "modeling_shortv.py")):
            with open(json_file_path, encoding="utf-8") as file:
                content = json.load(file)
            content.pop("auto_map", None)
            with open(json_file_path, "w", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """The parent's dict, with the `auto_map` by which the Auto classes of both Transformers lines find the code."""
        output = super().to_dict()
        output["architectures"] = self.architectures  # on 4.x, Qwen2-VL's keeps it in the text config
        output["text_config"] = with_both_rope_layouts(output["text_config"])
        output["tie_word_embeddings"] = has_tied_head(self)  # where 5.x looks; 4.x asks the text config
        if output["tie_word_embeddings"]:
            output["text_config"].setdefault("tie_word_embeddings", True)
        model = type(self).__name__.removesuffix("Config")
        generation_class = f"modeling_shortv.{model}ForConditionalGeneration"
        output["auto_map"] = {
            "AutoConfig": f"configuration_shortv.{model}Config",
            "AutoModel": f"modeling_shortv.{model}Model",
            "AutoModelForImageTextToText": generation_class,
            "AutoModelForMultimodalLM": generation_class,
            "AutoModelForVision2Seq": generation_class,  # Transformers 4.x
        }
        return output


class ShortVLlavaConfig(ShortVConfigMixin, LlavaConfig):
    """[`LlavaConfig`] with the ShortV fields (see the module's docstring)."""

    model_type = "shortv_llava"
    tokenizer_is_the_file = True


class ShortVLlavaNextConfig(ShortVConfigMixin, LlavaNextConfig):
    """[`LlavaNextConfig`] with the ShortV fields (see the module's docstring)."""

    model_type = "shortv_llava_next"
    tokenizer_is_the_file = True


class ShortVLlavaOnevisionConfig(ShortVConfigMixin, LlavaOnevisionConfig):
    """[`LlavaOnevisionConfig`] with the ShortV fields (see the module's docstring)."""

    model_type = "shortv_llava_onevision"


class ShortVQwen2VLConfig(ShortVConfigMixin, Qwen2VLConfig):
    """[`Qwen2VLConfig`] with the ShortV fields (see the module's docstring)."""

    model_type = "shortv_qwen2_vl"


class ShortVQwen2_5_VLConfig(ShortVConfigMixin, Qwen2_5_VLConfig):
    """[`Qwen2_5_VLConfig`] with the ShortV fields (see the module's docstring)."""

    model_type = "shortv_qwen2_5_vl"


class ShortVQwen3VLConfig(ShortVConfigMixin, Qwen3VLConfig):
    """[`Qwen3VLConfig`] with the ShortV fields (see the module's docstring)."""

    model_type = "shortv_qwen3_vl"


class ShortVInternVLConfig(ShortVConfigMixin, InternVLConfig):
    """[`InternVLConfig`] with the ShortV fields (see the module's docstring)."""

    model_type = "shortv_internvl"


class ShortVGemma3Config(ShortVConfigMixin, Gemma3Config):
    """[`Gemma3Config`] with the ShortV fields (see the module's docstring)."""

    model_type = "shortv_gemma3"


__all__ = [
    "ShortVGemma3Config",
    "ShortVInternVLConfig",
    "ShortVLlavaConfig",
    "ShortVLlavaNextConfig",
    "ShortVLlavaOnevisionConfig",
    "ShortVQwen2VLConfig",
    "ShortVQwen2_5_VLConfig",
    "ShortVQwen3VLConfig",
    "illava_defaults",
]
