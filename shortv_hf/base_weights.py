"""Loading weights from the original checkpoint that a ShortV repo references, and saving self-contained repos.

A ShortV repo holds a config and code, no weights; `config.base_model_name_or_path` says where they are. Any weight that
the base lacks, has too much or in another shape is an error: a partly random model must never look like a loaded one.
"""

import copy
import json
import os
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file, extract_commit_hash

from .configuration_shortv import SHORTV_FIELDS, ShortVConfigMixin, local_path_or_id
from .upstream import has_inner_vision_model


# The parts of the models without their heads.
PARTS = "language_model|visual|vision_tower|multi_modal_projector|image_newline"
# Key layouts of the original checkpoints → module names. Custom classes get no conversion in Transformers 5.x.
KEY_MAPPING = {
    r"^language_model.lm_head": "lm_head",
    r"^language_model.model": "model.language_model",
    r"^vision_tower": "model.vision_tower",
    r"^multi_modal_projector": "model.multi_modal_projector",
    r"^image_newline": "model.image_newline",
    # Qwen2-VL and Qwen2.5-VL
    r"^visual": "model.visual",
    rf"^model(?!\.({PARTS}))": "model.language_model",
}
# Newer Transformers 5.x save these vision towers without a level that older ones have, and read both.
VISION_MODEL_TYPES = ("clip_vision_model", "siglip_vision_model")
INNER_VISION_MODEL = {
    r"^model.vision_tower.(?!vision_model)": "model.vision_tower.vision_model.",
    r"^vision_tower.(?!vision_model)": "model.vision_tower.vision_model.",
}
# Where the ShortV repo's own files are found. Its `revision` and `subfolder` mean nothing to the base.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# These are config attributes too, but say how to load.
LOADER_KWARGS = ("attn_implementation", "dtype", "quantization_config", "torch_dtype")
# Config fields that have to be those of the base: they decide the shapes of weights, or what the weights mean. Families
# have some of them each.
ARCHITECTURE = {
    "text_config": (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "hidden_activation",
        "rms_norm_eps",
        "layer_types",
        "query_pre_attn_scalar",
    ),
    "vision_config": (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "hidden_act",
        "depth",
        "embed_dim",
        "num_heads",
        "mlp_ratio",
        "out_hidden_size",
        "in_channels",
        "temporal_patch_size",
        "spatial_merge_size",
        "window_size",
        "fullatt_block_indexes",
        "deepstack_visual_indexes",
        "num_position_embeddings",
        "use_qk_norm",
        "norm_type",
    ),
}


if TYPE_CHECKING:

    class _Model(PreTrainedModel):
        """What the mixin is put before."""

        config: Any  # a ShortV config and the family's, which is not the same class in each
        config_class: type[ShortVConfigMixin]

else:
    _Model = object

Loaded = TypeVar("Loaded", bound="BaseWeightsMixin")


class BaseWeightsMixin(_Model):
    """Modifications: `from_pretrained` reads weights from the base checkpoint; `save_pretrained` writes all of them."""

    _auto_class = "AutoModelForImageTextToText"  # makes `save_pretrained` copy the code files beside the weights
    # buffers that old checkpoints hold and models recompute; the head, for the models without one
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)position_ids$", r"^lm_head\.weight$"]

    @classmethod
    def from_pretrained(
        cls: type[Loaded],
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: PretrainedConfig | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Loaded:
        """Load a ShortV repo that references its weights, one that holds them, or an original checkpoint.

        Takes what `PreTrainedModel.from_pretrained` takes. `shortv_layers=[...]` and the other ShortV fields override
        the config's; `base_model_name_or_path` may then name another copy of the base, a local directory for example.
        `revision` and `subfolder` belong to the repo that is named here; the base is read at
        `config.base_model_revision`. `trust_remote_code` is never passed on to the base, of which only safetensors
        are read. `key_mapping` goes before the renames of the known layouts (on Transformers 4.x the first rename that
        matches is the only one). A `generation_config.json` of the ShortV repo wins over the base's.

        Returns:
            The model; with `output_loading_info=True`, a pair of the model and the info, as upstream's.

        Raises:
            ValueError: bad ShortV fields, a base of another architecture, `use_safetensors=False`, a damaged weight
                file; any missing, unexpected or mismatched weight, unless `output_loading_info=True` asks to be told
                of them instead.
            OSError: a repo or file that cannot be found.
        """
        path = pretrained_model_name_or_path
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_KWARGS if name in kwargs}
        config_file = None
        if path is not None:
            config_file = cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if path is None or config_file is None:
            return cls._load_without_config(path, model_args, config, hub_kwargs, kwargs)
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors=False: ShortV models read weights from safetensors files only")

        config, kwargs = cls._prepare_config(path, config, hub_kwargs, kwargs)
        location, location_kwargs = cls._locate_weights(path, config, config_file, hub_kwargs)
        if location != path:  # these speak of the ShortV repo
            kwargs.pop("code_revision", None)
            kwargs.pop("trust_remote_code", None)
            if kwargs.get("adapter_kwargs"):
                dropped = ("revision", "_commit_hash")
                kept = {name: value for name, value in kwargs["adapter_kwargs"].items() if name not in dropped}
                kwargs["adapter_kwargs"] = kept
        wants_info = kwargs.pop("output_loading_info", False)
        own_key_mapping = kwargs.pop("key_mapping", None)
        # The adapter comes after the weights have been found complete: 5.5 reports on nothing if it loads both.
        adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
        adapter, adapter_name = adapter_kwargs.pop("_adapter_model_path", None), kwargs.pop("adapter_name", "default")
        try:
            loaded: Any = super().from_pretrained(  # a pair, which upstream does not declare
                location,
                *model_args,
                config=config,
                key_mapping=cls._key_mapping(config, own_key_mapping),
                use_safetensors=True,
                output_loading_info=True,
                **location_kwargs,
                **kwargs,
            )
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # importing its class is not for remote code
                raise
            raise ValueError(
                f"a weight file of {location} is damaged or cut short ({error}); force_download=True fetches it again"
            ) from error
        model, info = loaded
        if not wants_info:
            _require_complete(info, location)
        if adapter is not None:
            if hub_kwargs.get("token") is not None:
                adapter_kwargs.setdefault("token", hub_kwargs["token"])
            model.load_adapter(adapter, adapter_name=adapter_name, adapter_kwargs=adapter_kwargs)
        if own_key_mapping and hasattr(model, "_weight_conversions"):
            del model._weight_conversions  # 5.x would save under the caller's names, which no reload knows
        elif hasattr(model, "_weight_conversions"):  # and 5.0 to 5.5 without the level that they read with and without
            model._weight_conversions = [
                each for each in model._weight_conversions if not set(each.source_patterns) & INNER_VISION_MODEL.keys()
            ]
        if location != path:
            model.name_or_path = model.config.name_or_path = str(path)
            own_file = cached_file(
                path, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub_kwargs
            )
            if own_file is not None and model.can_generate() and kwargs.get("generation_config") is None:
                model.generation_config = GenerationConfig.from_pretrained(path, **hub_kwargs)
        return loaded if wants_info else model

    @classmethod
    def _load_without_config(
        cls,
        path: str | os.PathLike | None,
        model_args: tuple,
        config: Any,
        hub_kwargs: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> Any:
        """A state dict, an adapter, or a path that holds nothing to load."""
        find = {"_raise_exceptions_for_missing_entries": False, **hub_kwargs}
        adapter_file = None if path is None else cached_file(path, "adapter_config.json", **find)
        if adapter_file is not None:  # as the Auto classes do: load its base, then the adapter
            with open(adapter_file, encoding="utf-8") as file:
                base = json.load(file)["base_model_name_or_path"]
            hub_kwargs = {name: value for name, value in hub_kwargs.items() if name not in ("revision", "subfolder")}
            adapter_kwargs = {**(kwargs.pop("adapter_kwargs", None) or {}), "_adapter_model_path": path}
            return cls.from_pretrained(
                base, *model_args, config=config, adapter_kwargs=adapter_kwargs, **hub_kwargs, **kwargs
            )
        if path is not None:
            return super().from_pretrained(path, *model_args, config=config, **hub_kwargs, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        key_mapping = cls._key_mapping(config, kwargs.pop("key_mapping", None))
        loaded: Any = super().from_pretrained(  # a pair, as above
            None, *model_args, config=config, key_mapping=key_mapping, output_loading_info=True, **kwargs
        )
        model, info = loaded
        if not wants_info:
            _require_complete(info, "the state dict")
        return loaded if wants_info else model

    @classmethod
    def _key_mapping(cls, config: Any, key_mapping: dict[str, str] | None) -> dict[str, str]:
        """Renames from the known layouts to the module names, behind those of the caller."""
        known = dict(KEY_MAPPING)
        vision_type = config.vision_config.model_type
        if vision_type in VISION_MODEL_TYPES and has_inner_vision_model(vision_type):
            known = {**INNER_VISION_MODEL, **known}
        if not cls.can_generate():  # the model without a head, whose modules are one level higher
            takes_off = cls.base_model_prefix == "model"  # 5.x takes "model." off by itself
            known = {
                old: new if takes_off and old.startswith("^model") else new.removeprefix("model.")
                for old, new in known.items()
            }
            if not takes_off:
                known[rf"^model\.(?=({PARTS}))"] = ""
        key_mapping = dict(key_mapping or {})
        return key_mapping | {old: new for old, new in known.items() if old not in key_mapping}

    @classmethod
    def _prepare_config(
        cls, path: str | os.PathLike, config: Any, hub_kwargs: dict[str, Any], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The config to build the model with (a copy), and the keyword arguments that are not for it."""
        if not isinstance(config, PretrainedConfig):
            loader_kwargs = {name: kwargs.pop(name) for name in LOADER_KWARGS if name in kwargs}
            source = path if config is None else config
            config, kwargs = cls.config_class.from_pretrained(
                source, return_unused_kwargs=True, **hub_kwargs, **kwargs
            )
            kwargs.update(loader_kwargs)
            kwargs = {name: value for name, value in kwargs.items() if name not in HUB_KWARGS}
        elif config.model_type != cls.config_class.model_type:
            raise ValueError(f"config has model_type {config.model_type!r}; {cls.__name__} needs a {cls.config_class}")
        else:
            config = copy.deepcopy(config)
            for name in SHORTV_FIELDS:
                if name in kwargs:
                    setattr(config, name, kwargs.pop(name))
        config._commit_hash = None  # the ShortV repo's: Transformers 4.x would look for it in the base
        config.validate_shortv()
        return config, kwargs

    @classmethod
    def _locate_weights(
        cls, path: str | os.PathLike, config: Any, config_file: str, hub_kwargs: dict[str, Any]
    ) -> tuple[str | os.PathLike, dict[str, Any]]:
        """Where the weights are, and the arguments to find them there; brings the config's reference up to date."""
        with open(config_file, encoding="utf-8") as file:
            own = json.load(file)
        if own.get("model_type") == cls.config_class.base_model_type:  # an original checkpoint
            config.base_model_name_or_path = local_path_or_id(path)
            config.base_model_revision = extract_commit_hash(config_file, None)
            return path, hub_kwargs
        if own.get("base_model_name_or_path") is None:  # holds its own weights, whatever the config was made from
            config.base_model_name_or_path = config.base_model_revision = None
            return path, hub_kwargs
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = own["base_model_name_or_path"]
        base = config.base_model_name_or_path
        if base != own["base_model_name_or_path"] and config.base_model_revision == own.get("base_model_revision"):
            config.base_model_revision = None  # the commit of another repo
        base_kwargs = {k: v for k, v in hub_kwargs.items() if k not in ("revision", "subfolder")}
        if config.base_model_revision is not None:
            base_kwargs["revision"] = config.base_model_revision
        commit = f" at commit {config.base_model_revision}" if config.base_model_revision else ""
        try:
            base_config = cls.config_class.from_pretrained(base, **base_kwargs)  # refuses another model type
        except (OSError, ValueError) as error:  # the caller named another repo, and may not know this one
            message = f"{path} reads its weights from {base}{commit}, which failed: {' '.join(str(error).split())}"
            raise (OSError if isinstance(error, OSError) else ValueError)(message) from error
        for part, names in ARCHITECTURE.items():
            for name in names:
                expected = _field(config, part, name)
                found = _field(base_config, part, name)
                if expected != found:
                    raise ValueError(
                        f"the base checkpoint {base} does not fit {path}: its {part}.{name} is {found!r}, "
                        f"the ShortV config needs {expected!r}"
                    )
        return base, base_kwargs

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write a self-contained repo: weights, config without a base reference, generation config and code files."""
        config = self.config
        reference = config.base_model_name_or_path, config.base_model_revision
        config.base_model_name_or_path = config.base_model_revision = None
        head, embeddings = self.get_output_embeddings(), self.get_input_embeddings()
        if head is not None and not head.weight.is_meta:  # what is written, whichever of the two fields a line asks
            tied = head.weight is embeddings.weight
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            config.base_model_name_or_path, config.base_model_revision = reference


def _field(config: PretrainedConfig, part: str, name: str) -> Any:
    """A field of the text or vision config; `None` for a family that does not have it."""
    part_config = config.get_text_config() if part == "text_config" else config.vision_config
    value = getattr(part_config, name, None)
    return list(value) if isinstance(value, tuple) else value  # files have no tuples


def _require_complete(info: dict, location: str | os.PathLike) -> None:
    """Raise `ValueError` unless every weight of the model was read from the checkpoint and none was left over."""
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        entries = sorted(str(entry) for entry in info.get(kind) or [])
        if entries:
            more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
            problems.append(f"{len(entries)} {kind.replace('_', ' ')}: {', '.join(entries[:5])}{more}")
    if problems:
        raise ValueError(f"the weights in {location} do not fit the model; {'; '.join(problems)}")
