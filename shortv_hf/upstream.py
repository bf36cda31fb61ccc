"""What Transformers' versions spell differently, and the check that a version nobody has tested is right.

No other file of the closure knows which version it runs on. Arguments that upstream may rename are read from `kwargs`
under the name that they came with and passed on under it: the cache is found by its type, the others by `argument`,
which raises where an argument is missing instead of taking a default for it.

`check_upstream` runs on versions newer than the tested ones only, once per architecture and process.
"""

import copy
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.auto import image_processing_auto, processing_auto, tokenization_auto, video_processing_auto
from transformers.models.llama.modeling_llama import LlamaModel


try:  # 5.x
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
except ImportError:
    from transformers.utils.generic import _CAN_RECORD_REGISTRY  # type: ignore[attr-defined, no-redef]


TESTED = ("4.57.0", "5.24.0")  # the oldest and the newest version that the tests have passed on
ON_4 = transformers.__version__.startswith("4.")
# What models call the cache: 5.24 and later, and until then.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


def release(version: str) -> tuple[int, ...]:
    """`"5.24.0.dev0"` → `(5, 24, 0)`."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


def is_newer_than_tested() -> bool:
    """Whether nobody has run the tests on the installed Transformers yet."""
    return release(transformers.__version__) > release(TESTED[1])


def not_right(what: str) -> ValueError:
    """The error for a Transformers that does not do what this package relies on."""
    return ValueError(
        f"ShortV cannot run on Transformers {transformers.__version__}: {what}. It was tested with Transformers "
        f"{TESTED[0]} to {TESTED[1]}; install one of these, or a newer shortv_hf."
    )


def inherit_tables(config_class: type[PretrainedConfig], base_model_type: str) -> None:
    """Read the processor and tokenizer files of a config's model type as those of the original type.

    From 5.5 on, upstream ignores the tokenizer class that some types' files declare; of a type that it does not know it
    would believe them, and cut prompts into other tokens. Files that name no class at all, such as Qwen2-VL's for videos,
    are read by the class that the tables name for the type; they import it when it is asked for.
    """
    ignored = getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", None)
    names = tokenization_auto.TOKENIZER_MAPPING_NAMES
    if isinstance(ignored, set) and base_model_type in names:
        names.setdefault(config_class.model_type, names[base_model_type])
        if base_model_type in ignored:
            ignored.add(config_class.model_type)
    for module, table in (
        (image_processing_auto, "IMAGE_PROCESSOR_MAPPING"),
        (processing_auto, "PROCESSOR_MAPPING"),
        (tokenization_auto, "TOKENIZER_MAPPING"),
        (video_processing_auto, "VIDEO_PROCESSOR_MAPPING"),
    ):
        try:
            getattr(module, table)._reverse_config_mapping[config_class.__name__] = base_model_type
        except ImportError:  # 4.x has no video processors without torchvision
            continue


def has_tied_head(config: PretrainedConfig) -> bool:
    """Whether the head of a model shares the weights of its embeddings: 5.x asks the whole config, 4.x that of the text."""
    return bool(getattr(config.get_text_config() if ON_4 else config, "tie_word_embeddings", ON_4))


# Modules

if TYPE_CHECKING:
    # What is read of upstream's modules. No family shares these classes; annotations on the mixins themselves would be
    # read by `PreTrainedModel`.

    class Attention(nn.Module):
        """The attention of a decoder layer."""

        config: PretrainedConfig
        layer_idx: int
        head_dim: int
        scaling: float
        attention_dropout: float
        attn_logit_softcapping: float | None  # Gemma
        is_sliding: bool  # Gemma 3
        sliding_window: int | None  # Qwen2, Gemma 3
        rope_scaling: dict[str, Any] | None  # Qwen2-VL, Qwen2.5-VL
        o_proj: nn.Module

    class DecoderLayer(nn.Module):
        """A decoder layer."""

        self_attn: Attention
        mlp: nn.Module
        input_layernorm: nn.Module

    class TextModel(PreTrainedModel):
        """A text model without its head."""

        layers: Sequence[DecoderLayer]
        gradient_checkpointing: bool

else:
    Attention = DecoderLayer = nn.Module
    TextModel = PreTrainedModel


def stock_class(module: nn.Module) -> type:
    """The class of upstream's that a module is, or descends from. Raises `ValueError` if there is none."""
    found = next((each for each in type(module).__mro__ if each.__module__.startswith("transformers.")), None)
    if found is None:
        raise ValueError(f"{type(module).__name__} is not of Transformers' own")
    return found


def family_of(module: nn.Module) -> Any:
    """The file of upstream's that defines a module's class."""
    return sys.modules[stock_class(module).__module__]


def text_model(base: nn.Module) -> TextModel:
    """The text model in a vision-language model without its head. Raises `ValueError` if there is none."""
    for name in ("language_model", "text_model"):
        found = getattr(base, name, None)
        if isinstance(found, nn.Module) and hasattr(found, "layers"):
            return cast(TextModel, found)
    raise ValueError(f"{type(base).__name__} has no text model with decoder layers")


def record_outputs(model: PreTrainedModel) -> None:
    """Upstream keeps what it records of a model by the name of the class that it was built as."""
    name = str(model.__class__)
    dict.__setitem__(_CAN_RECORD_REGISTRY, name, model._can_record_outputs)


def visual_token_ids(config: PretrainedConfig) -> dict[str, int]:
    """The ids of the placeholders of "image" and "video" that a config has."""
    found: dict[str, int] = {}
    for kind in ("image", "video"):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if isinstance(getattr(config, name, None), int):
                found.setdefault(kind, getattr(config, name))
    return found


def sliding_window(attention: Attention) -> int | None:
    """The attention window of a layer: Qwen2 keeps it on the module, Mistral in the config, Llama has none."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None)


def kind_of(attention: Attention) -> tuple:
    """Equal for layers that upstream gives the same mask and the same rotary tables."""
    return sliding_window(attention), getattr(attention, "layer_type", None)


def rotary_tables(kwargs: dict) -> dict[str, tuple[Tensor, Tensor]]:
    """The rotary tables among the arguments of a layer: one, or (Gemma 3 on 4.x) one for each kind of layer."""
    found = {name: value for name, value in kwargs.items() if name.startswith(ROTARY) and value is not None}
    return found or {ROTARY: argument(kwargs, ROTARY)}


def own_tables(attention: Attention, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Those of a layer's own kind."""
    tables = rotary_tables(kwargs)
    if len(tables) == 1:
        return next(iter(tables.values()))
    return argument(tables, f"{ROTARY}_local" if attention.is_sliding else f"{ROTARY}_global")


def outputs_of_layers(model: PreTrainedModel, kwargs: dict) -> bool:
    """Whether a call asks for what layers make, beside the result: by an argument, or the configs' own settings."""
    names = ("output_hidden_states", "output_attentions")
    configs = model.config, model.config.get_text_config()
    return any(
        given if (given := kwargs.get(name)) is not None else any(getattr(each, name, None) for each in configs)
        for name in names
    )


def layer_norms(layer: Any) -> tuple[Callable, Callable, Callable, Callable]:
    """A layer's norms before and after its attention, before and after its FFN. Llama has those before; Gemma and GLM have all
    four, under other names."""
    if hasattr(layer, "pre_feedforward_layernorm"):
        after = layer.post_attention_layernorm, layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm
        return layer.input_layernorm, *after
    after_attention = getattr(layer, "post_self_attn_layernorm", None) or nn.Identity()
    after_ffn = getattr(layer, "post_mlp_layernorm", None) or nn.Identity()
    return layer.input_layernorm, after_attention, layer.post_attention_layernorm, after_ffn


def attention_arguments(attention: Attention, kwargs: dict) -> dict:
    """What a layer hands on to its attention. Of Gemma 3 on 4.57 it is the layer that chooses the rotary tables."""
    tables = rotary_tables(kwargs)
    if len(tables) == 1:
        return kwargs
    return {
        **{name: value for name, value in kwargs.items() if name not in tables},
        ROTARY: own_tables(attention, kwargs),
    }


def returns_tuple(layer_class: type[Any]) -> bool:
    """Whether a layer's forward returns a tuple, as on 4.x some do; by its source, since annotations say otherwise in places."""
    try:
        return "outputs = (hidden_states,)" in inspect.getsource(inspect.unwrap(layer_class.forward))
    except (OSError, TypeError):  # there is none
        return False


def eager_attention(attention: Attention) -> Callable:
    """The eager attention of a module's family, with what it does to logits."""
    return family_of(attention).eager_attention_forward


def rotate(attention: Attention, states: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of `states` `[B, heads, n, d]` with cos and sin `[B or 1, n, d]`, by the family's own function. It
    takes queries and keys of one length: the other ones are empty here."""
    family = family_of(attention)
    if tables[0].ndim == 4:  # `[3, B, n, d]`, Qwen2-VL and Qwen2.5-VL on 4.x and the first of 5.x
        settings = getattr(attention, "rope_scaling", None) or attention.config.rope_parameters
        sections = settings["mrope_section"]
        return family.apply_multimodal_rotary_pos_emb(states, states[:, :0], *tables, sections)[0]
    return family.apply_rotary_pos_emb(states, states[:, :0], *tables)[0]


@cache
def has_inner_vision_model(model_type: str) -> bool:
    """Whether a vision tower of this type keeps its parts in a `vision_model`, as CLIP and SigLIP do before 5.6 or so."""
    with torch.device("meta"):
        tower = AutoModel.from_config(AutoConfig.for_model(model_type, num_hidden_layers=1))
    return hasattr(tower, "vision_model")


# Arguments


def argument(kwargs: dict, name: str) -> Any:
    """`kwargs[name]`, of the arguments that upstream hands to a decoder layer. Raises `ValueError` if it hands none."""
    if name not in kwargs:
        raise not_right(f"its decoder layers get no `{name}`, only {', '.join(sorted(kwargs))}")
    return kwargs[name]


ROTARY = "position_embeddings"
# What brings features of each kind: pixels, or (Idefics3) what the tower made of them.
FEATURES = {"image": ("pixel_values", "image_hidden_states"), "video": ("pixel_values_videos",)}


def features_given(kwargs: dict[str, Any]) -> list[str]:
    """Of "image" and "video", those whose features come with a model's arguments."""
    encoded = kwargs.get("mm_encoder_outputs") or {}
    return [
        kind
        for kind, names in FEATURES.items()
        if encoded.get(kind) is not None or any(kwargs.get(name) is not None for name in names)
    ]


TEXT_ARGUMENTS = ("attention_mask", "inputs_embeds", "position_ids")


def require_text_arguments(model_class: type) -> None:
    """Raises `ValueError` if a text model does not take the arguments that are read and replaced on their way to it: under
    another name, a replacement would be ignored."""
    stock = (c for c in model_class.__mro__ if c.__module__.startswith("transformers.") and "forward" in vars(c))
    upstream: Any = next(stock, None)
    if upstream is None:
        raise ValueError(f"{model_class.__name__} is not a text model of Transformers' own")
    for name in TEXT_ARGUMENTS:
        if name not in inspect.signature(upstream.forward).parameters:
            raise not_right(f"its {upstream.__name__} takes no `{name}`")


def find_cache(kwargs: dict) -> Cache | None:
    """The cache in a call's arguments or in an output, whatever its name; `None` if there is none."""
    return next((value for value in kwargs.values() if isinstance(value, Cache)), None)


def update_cache(cache: Cache, key: Tensor, value: Tensor, layer: int, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Store `key` and `value` `[B, kv_heads, S, head_dim]`, and return those that the layer attends to, `[…, K, …]`.

    `kwargs` are the attention's: on 4.x the static cache writes where their `cache_position` says; 5.x ignores them.

    Raises:
        ValueError: the cache did not take them.
    """
    stored = cache.update(key, value, layer, kwargs)
    if not (isinstance(stored, tuple) and len(stored) == 2 and all(map(torch.is_tensor, stored))):
        raise not_right(f"{type(cache).__name__}.update returns {type(stored).__name__}, not keys and values")
    if stored[0].shape[-2] < key.shape[-2]:
        raise not_right(f"{type(cache).__name__}.update gave {stored[0].shape[-2]} of {key.shape[-2]} keys back")
    return stored


_BY_POSITIONS = "cache_position" in inspect.signature(Cache.get_mask_sizes).parameters  # 4.x and the first of 5.x


def seen_by(cache: Cache | None, layer: int) -> int | Tensor:
    """How many tokens a layer of the cache has seen; a tensor, if it counts on the device."""
    return 0 if cache is None else cache.get_seq_length(layer)


def mask_sizes(cache: Cache | None, layer: int, length: int, kwargs: dict, device: torch.device) -> tuple[int, int]:
    """How many keys a layer attends to in a chunk of `length` tokens, and the slot of the first. `kwargs`: the
    attention's. To be called before the cache is updated."""
    if cache is None:
        return length, 0
    query: Any = length
    if _BY_POSITIONS:
        query = kwargs.get("cache_position")
        if query is None:
            query = torch.arange(length, device=device) + seen_by(cache, layer)
    return cache.get_mask_sizes(query, layer)


def keep_deepstack(kwargs: dict, index: Tensor, valid: Tensor | None) -> dict:
    """A text model's arguments for a chunk of which only the tokens at `index` `[B, T]` are left, without those where
    `valid` is False: features that the first layers add to visual tokens (Qwen3-VL) are cut with them."""
    mask, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
    if mask is None or features is None:
        return kwargs
    left = torch.zeros_like(mask).scatter(1, index, True if valid is None else valid)
    kept = left[mask]
    mask = mask.gather(1, index)
    if valid is not None:
        mask = mask & valid
    return {**kwargs, "visual_pos_masks": mask, "deepstack_visual_embeds": [each[kept] for each in features]}


def cached_lengths(cache: Cache | None, layers: Iterable[int]) -> dict[int, int]:
    """How many tokens the layers of a cache have seen, without a device synchronisation: layers that count on the
    device (static ones) are left out; all are while a graph is compiled."""
    if torch.compiler.is_compiling():
        return {}
    lengths = {layer: 0 if cache is None else cache.get_seq_length(layer) for layer in layers}
    return {layer: length for layer, length in lengths.items() if isinstance(length, int)}


def check_cached(cache: Cache | None, output: Any, before: dict[int, int], chunk: int) -> None:
    """Raises `ValueError` if a layer of the cache, the one given to a pass or made in it, did not see the pass's `chunk`
    tokens. `before` is what [`cached_lengths`] said before it."""
    if cache is None:
        cache = find_cache(output) if isinstance(output, dict) else None
    after = {} if cache is None else cached_lengths(cache, before)
    for layer, seen in after.items():
        if seen != before[layer] + chunk:
            raise not_right(
                f"layer {layer} of the cache has seen {seen} tokens after a pass of {chunk} on top of {before[layer]}"
            )


# Outputs


def _features_in(output: Any) -> Any:
    """What `get_image_features` or `get_video_features` returned, without what stands around the features: an output
    object on 5.x; on 4.x a list, a tensor or (Qwen3-VL) a pair with the features of the first layers."""
    if hasattr(output, "pooler_output"):
        return output.pooler_output
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], (list, tuple)):
        return output[0]
    return output


def image_features(output: Any) -> list[Tensor]:
    """Features per image `[n, h]`, from what `get_image_features` returns; per video, of `get_video_features`."""
    features = _features_in(output)
    if not isinstance(features, (list, tuple)) and not (torch.is_tensor(features) and features.ndim == 3):
        raise not_right(f"get_image_features returns {type(output).__name__} without the features of the images")
    return list(features)


def with_image_features(output: Any, features: list[Tensor]) -> Any:
    """What `get_image_features` returned, with other features in it."""
    found = _features_in(output)
    new = torch.stack(features) if torch.is_tensor(found) else type(found)(features)
    if hasattr(output, "pooler_output"):
        output.pooler_output = new
        return output
    return new if found is output else (new, *output[1:])


def used_image_features(output: Any) -> Tensor | None:
    """The image features `[tokens, h]` in a model's output; `None` if there are none."""
    encoded = getattr(output, "image_outputs", None)  # 5.24; `image_hidden_states` becomes another thing there
    if encoded is not None:
        return torch.cat(list(image_features(encoded)))
    if "image_outputs" in getattr(output, "__dataclass_fields__", ()):
        return None
    features = getattr(output, "image_hidden_states", None)
    if features is None or torch.is_tensor(features):
        return features if features is None else features.flatten(0, -2)
    return torch.cat([each.flatten(0, -2) for each in image_features(features)])  # the encoder's output, up to 5.23


def set_used_image_features(output: Any, features: Tensor) -> None:
    """Put other image features `[tokens, h]` into a model's output; the encoder's own output stays as it is."""
    encoded = getattr(output, "image_outputs", None)
    if encoded is not None:
        output.image_outputs = with_image_features(copy.copy(encoded), [features])
    elif torch.is_tensor(output.image_hidden_states):
        output.image_hidden_states = features
    else:
        output.image_hidden_states = with_image_features(copy.copy(output.image_hidden_states), [features])


# The self-test

_checked: dict[tuple, ValueError | None] = {}
_checking = threading.RLock()
_running = threading.local()


def check_upstream(
    text: TextModel,
    tested: bool,
    follow_plans: Callable[[TextModel], None],
    plan_of_text: Callable[[int, int, int], Any],
    part: str = "",
) -> None:
    """Of an architecture that is not `tested`, and of each on a Transformers newer than the tested ones: a small model
    whose layers all follow a plan, in which every token is text, must give what the stock model gives, on a cache too.
    Random weights, float32, CPU; once per process. It needs no knowledge of the architecture: layers without rotary
    embedding, norms under other names, latent or shared keys differ or do not run.

    Args:
        text: the stock text model that is about to follow plans.
        tested: whether the tests run on its architecture.
        follow_plans: makes a text model do so.
        plan_of_text: makes the plan, from the number of layers, of rows and of tokens.
        part: of the layers that follow it, for what has been checked already.

    Raises:
        ValueError: it does not; names the installed version and the tested ones.
    """
    if (tested and not is_newer_than_tested()) or getattr(_running, "now", False):
        return
    model_class, implementation = stock_class(text), "eager" if text.config._attn_implementation == "eager" else "sdpa"
    key = (model_class, implementation, transformers.__version__, part)
    with _checking:
        if key not in _checked:
            _running.now = True
            try:
                _self_test(model_class, small_text_config(text.config), implementation, follow_plans, plan_of_text)
                _checked[key] = None
            except Exception as error:  # whatever upstream has become
                reason = " ".join(str(error).split()) or type(error).__name__
                ours = error if isinstance(error, ValueError) and reason.startswith("ShortV cannot run on") else None
                failure = f"{model_class.__name__} fails its self-test with {type(error).__name__}: {reason}"
                if tested:
                    _checked[key] = not_right(failure) if ours is None else ours
                else:
                    _checked[key] = ValueError(
                        f"ShortV cannot freeze tokens in {model_class.__name__}, whose layers compute something else than "
                        f"those that it knows ({failure if ours is None else reason})"
                    )
            finally:
                _running.now = False
    verdict = _checked[key]
    if verdict is not None:
        raise verdict


def small_text_config(text_config: PretrainedConfig) -> PretrainedConfig:
    """A copy with two heads, a narrow FFN, and as many of its first layers as hold every kind of layer."""
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    grouped = text_config.num_key_value_heads < text_config.num_attention_heads
    fields, depth = text_config.to_dict(), text_config.num_hidden_layers
    lists = {name: value for name, value in fields.items() if isinstance(value, list) and len(value) == depth}
    kinds = list(zip(*lists.values(), strict=True)) or [()]
    n_layers = max(kinds.index(kind) for kind in set(kinds)) + 1
    small = {
        **fields,
        "vocab_size": 16,
        "hidden_size": 2 * head_dim,
        "intermediate_size": 2 * head_dim,
        "num_attention_heads": 2,
        "num_key_value_heads": 1 if grouped else 2,
        "num_hidden_layers": n_layers,
        **{name: value[:n_layers] for name, value in lists.items()},
        **{name: None for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }
    if small.get("sliding_window"):
        small["sliding_window"] = 5
    return type(text_config).from_dict(small)


def _self_test(
    model_class: type[Any],
    config: PretrainedConfig,
    implementation: str,
    follow_plans: Callable[[TextModel], None],
    plan_of_text: Callable[[int, int, int], Any],
) -> None:
    rows, tokens, more = 2, 8, 3
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        model = model_class._from_config(config, attn_implementation=implementation, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():  # loading leaves them uninitialised
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        states = torch.randn(rows, tokens + more, config.hidden_size, generator=generator)
        padding = torch.ones(rows, tokens + more, dtype=torch.long)
        padding[1, :2] = 0
        found = []
        for planned in (False, True):
            if planned:
                follow_plans(model)
            cache = DynamicCache(config=config)
            for start, end in ((0, tokens), (tokens, tokens + more)):
                plan = {"plan": plan_of_text(config.num_hidden_layers, rows, end - start)} if planned else {}
                output = model(
                    inputs_embeds=states[:, start:end],
                    attention_mask=padding[:, :end],
                    **{CACHE: cache},
                    use_cache=True,
                    **plan,
                )
                found.append([output.last_hidden_state[padding[:, start:end].bool()]])
            layers: Any = cache.layers  # those that hold keys and values, of their several kinds
            found[-1] += [part for layer in layers for part in (layer.keys, layer.values)]
    dense, ours = found[:2], found[2:]
    for expected, actual in zip(sum(dense, []), sum(ours, []), strict=True):
        if (
            actual is None
            or expected.shape != actual.shape
            or not torch.allclose(actual, expected, atol=1e-4, rtol=1e-4)
        ):
            raise not_right(f"with a plan in which all tokens are text, {model_class.__name__} differs from stock")
