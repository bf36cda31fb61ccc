"""ShortV models: Hugging Face vision-language models with visual tokens frozen in the layers of `config.shortv_layers`.

Reading order: `decoder_layer.py` (the idea), `plan.py` (which tokens), then this file (where the plan is made).
Token reduction (`config.visual_reduction`): `reduction.py` (what a method is), `reduction_….py` (the methods), `stream.py`
(tokens leave the decoder), `vision.py` (features are cut before it), `tower.py` (patches are merged in the vision tower).

Upstream's constructors build upstream's parts; ShortV's forwards are then grafted on them (`decoder_layer.py`).
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from math import isqrt
from types import EllipsisType, MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForConditionalGeneration,
    Gemma3Model,
    GenerationMixin,
    InternVLForConditionalGeneration,
    InternVLModel,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.utils import logging

from .base_weights import BaseWeightsMixin
from .cache import is_shortened
from .configuration_shortv import (
    PARTS,
    ShortVGemma3Config,
    ShortVInternVLConfig,
    ShortVLlavaConfig,
    ShortVLlavaNextConfig,
    ShortVLlavaOnevisionConfig,
    ShortVQwen2_5_VLConfig,
    ShortVQwen2VLConfig,
    ShortVQwen3VLConfig,
    frozen_updates,
    validate_settings,
    validate_shortv_layers,
    validate_visual_reduction,
)
from .decoder_layer import ShortVAttentionMixin, ShortVDecoderLayerMixin, graft, refuse_own_forward
from .plan import Plan
from .reduction import ModelSizes, Reduction, TowerReduction, TowerSizes, is_dropped, parse_visual_reduction
from .rows import Rows
from .stream import Stream
from .tower import TowerMerging, listen_in_tower, pad
from .upstream import (
    TextModel,
    cached_lengths,
    check_cached,
    check_upstream,
    features_given,
    find_cache,
    image_features,
    outputs_of_layers,
    record_outputs,
    require_text_arguments,
    set_used_image_features,
    text_model,
    used_image_features,
    visual_token_ids,
    with_image_features,
)
from .vision import SmallerGrid, listen, reduced_features
from .windows import Length, Lengths, Windows, note


logger = logging.get_logger(__name__)
COPIED_TOO = (
    Rows,
    Stream,
)  # of a local directory, 4.57 copies what this file imports itself, not what its imports import


if TYPE_CHECKING:  # what the mixins are put before

    class _Model(PreTrainedModel):
        config: Any  # with the ShortV fields; which class it is depends on the family
        get_placeholder_mask: Callable[..., Any]

    class _Head(_Model, GenerationMixin):
        model: Any  # the ShortV model inside; its class too is the family's

    _TextModel = TextModel
else:
    _Model = _Head = _TextModel = object


class ShortVTextModelMixin(_TextModel):
    """Modifications: hands the plan of the pass to its layers. Outputs have zeros in place of tokens that were dropped."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        plan: Plan | None = None,
        **kwargs: Any,
    ) -> Any:
        cache = find_cache(kwargs)
        if plan is None:
            if not is_shortened(cache):
                return super().forward(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
            tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
            plan = Plan.of_a_step(tokens)
        if plan.needs_stream(cache):
            if args:
                raise TypeError("with visual_reduction, arguments other than input_ids are given by name")
            if inputs_embeds is None:
                input_ids, inputs_embeds = None, self.get_input_embeddings()(input_ids)
            plan, inputs_embeds, kwargs = plan.with_stream(inputs_embeds, kwargs)
        # While training with checkpointing, upstream's layers leave the cache alone, and say so.
        checked = () if self.training and self.gradient_checkpointing else range(len(self.layers))
        before = cached_lengths(cache, checked)
        output = super().forward(input_ids, *args, inputs_embeds=inputs_embeds, plan=plan, **kwargs)
        check_cached(cache, output, before, plan.length)
        return output if plan.stream is None else plan.stream.restore(output)


def _follow_plans(text: TextModel) -> None:
    """Make a stock text model one that follows plans."""
    graft(text, ShortVTextModelMixin)
    for layer in text.layers:
        graft(layer, ShortVDecoderLayerMixin)
        graft(layer.self_attn, ShortVAttentionMixin)


# Types of the text models that the tests run on; others are tried first (`upstream.check_upstream`).
TESTED_TEXT_MODELS = {
    "gemma3_text",
    "llama",
    "mistral",
    "qwen2",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_vl_text",
}


def check_text_model(text: TextModel, parts: Iterable[str] = ("",)) -> None:
    """Raises `ValueError` if plans would not be followed right in a stock text model, in whole layers or in `parts`."""
    require_text_arguments(type(text))
    tested = text.config.model_type in TESTED_TEXT_MODELS
    for part in parts:
        check_upstream(text, tested, _follow_plans, functools.partial(Plan.of_text, part=part), part)


class _Block(dict):
    """The settings of one `using` block, by the names of the config's fields. Blocks are told apart by identity."""

    __eq__, __hash__ = object.__eq__, object.__hash__  # type: ignore[assignment]  # dicts have no hash


# By the id of a config: the innermost block that is open in this thread or asyncio task. Compiled graphs cannot read a
# context variable, and need not while no block is open anywhere: `_OPEN` holds those that are. What a task has inherited
# from a block that has ended since does not count.
_USING: ContextVar[Mapping[int, _Block]] = ContextVar("settings in use", default=MappingProxyType({}))
_OPEN: list[_Block] = []


def check_images(pixel_values: Tensor | None) -> None:
    """Raises `ValueError` if `pixel_values` are of no image at all."""
    if pixel_values is not None and len(pixel_values) == 0:
        raise ValueError(
            f"pixel_values hold no image: their shape is {tuple(pixel_values.shape)}; without images, pass None"
        )


class ShortVSettingsMixin(_Model):
    """Modifications: what is frozen can be switched at run time."""

    @property
    def settings(self) -> tuple[list[int | str], dict | None]:
        """The frozen layers and the reduction in force here: the config's, unless inside [`using`]."""
        used = self._block() if _OPEN else {}
        layers = used.get("shortv_layers", self.config.shortv_layers)
        return layers, used.get("visual_reduction", self.config.visual_reduction)

    def _block(self) -> dict:
        block = _USING.get().get(id(self.config))
        return block if block in _OPEN else {}

    @contextmanager
    def using(
        self,
        *,
        shortv_layers: list[int | str] | EllipsisType = ...,
        visual_reduction: dict | None | EllipsisType = ...,
    ) -> Iterator["ShortVSettingsMixin"]:
        """Inside, the model freezes these layers and reduces by this method; what is not given stays. The config is not
        touched, and other threads that use the model are not either: a thread that is started inside must enter
        `using` itself. (A graph of a whole forward, `torch.compile(model)`, is made anew while a block is open.)

        Raises:
            ValueError: as [`set_shortv_layers`] and [`set_visual_reduction`].
        """
        used = _Block(self._block())
        if shortv_layers is not ...:
            used["shortv_layers"] = validate_shortv_layers(shortv_layers, self._n_layers)
        if visual_reduction is not ...:
            used["visual_reduction"] = validate_visual_reduction(visual_reduction, self.config)
        token = _USING.set({**_USING.get(), id(self.config): used})
        _OPEN.append(used)
        try:
            yield self
        finally:
            _OPEN.remove(used)
            _USING.reset(token)

    @property
    def _n_layers(self) -> int:
        return self.config.get_text_config().num_hidden_layers

    def set_shortv_layers(self, shortv_layers: list[int | str]) -> None:
        """Freeze visual tokens in these decoder layers from now on; `[]` is the dense model. No weight changes.

        Raises:
            ValueError: if an id is out of range, negative, duplicated or not an integer.
        """
        self.config.shortv_layers = validate_shortv_layers(shortv_layers, self._n_layers)

    def set_visual_reduction(self, visual_reduction: dict | None) -> None:
        """Switch the visual-token reduction method; `None` turns it off. No weight changes.

        Raises:
            ValueError: for an unknown method or option, or a value out of its range.
        """
        self.config.visual_reduction = validate_visual_reduction(visual_reduction, self.config)


def _encoder(kind: str, parents_method: Callable[..., Any]) -> Callable[..., Any]:
    """`get_image_features` or `get_video_features`, of the same signature: newer `generate` hands on only the arguments
    that it finds there, and what it does not hand on is lost without a word."""

    @functools.wraps(parents_method)
    def method(self: "ShortVModelMixin", *args: Any, **kwargs: Any) -> Any:
        # 5.24 hands the arguments of the whole forward on to the vision tower, our plan among them.
        kwargs = {name: value for name, value in kwargs.items() if name != "plan"}
        check_images(args[0] if args else kwargs.get("pixel_values", kwargs.get("pixel_values_videos")))
        if self.settings[1] is None:
            return parents_method(self, *args, **kwargs)
        return self._reduced(kind, functools.partial(parents_method, self, *args, **kwargs))

    return method


class ShortVModelMixin(ShortVSettingsMixin):
    """Modifications: `forward` finds the visual tokens and hands the text model a [`Plan`].

    With frozen layers, `hidden_states` of visual tokens repeat through a frozen layer, and the `attentions` that `eager`
    returns, `[batch, heads, sequence, keys]` as upstream's, hold zeros in their rows. Where a reduction method dropped a
    token, outputs keep their shapes and hold zeros: hidden states, attentions to and from it, and so its logits.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if ShortVModelMixin in cls.__bases__:
            parents_methods = super()
            for kind in ("image", "video"):
                name = f"get_{kind}_features"
                if hasattr(parents_methods, name):
                    setattr(cls, name, _encoder(kind, getattr(parents_methods, name)))

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        validate_settings(config)
        super().__init__(config, *args, **kwargs)
        self.graft()

    def graft(self) -> None:
        """Make the parts that upstream built follow plans."""
        text = text_model(self)
        check_text_model(text)
        _follow_plans(text)
        listen(self)
        listen_in_tower(self)
        parameters = inspect.signature(super().forward).parameters.values()
        self._positional = tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        visual_mask: Tensor | None = None,
        skip_padding: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As the parent's, plus:

        visual_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*):
            True at the positions that hold features of images or videos. Needed with `inputs_embeds` that already
            contain them; otherwise the positions of the placeholders are used. If given, it decides what is frozen, and
            what a method may drop in the decoder.
        skip_padding (`bool`, *optional*, defaults to `False`):
            Freeze padding as well, which changes no other token. `generate` asks for it: a batch of rows with and
            without images, or with images of different length, is mostly padding.

        Raises:
            ValueError: if placeholders and features do not match in number, `pixel_values` hold no image,
                `visual_mask` does not fit, or `visual_reduction` cannot work on such inputs.
        """
        layers, visual_reduction = self.settings
        if not layers and visual_reduction is None:
            return super().forward(input_ids, *args, **kwargs)
        kwargs = {**dict(zip(self._positional, (input_ids, *args), strict=False)), **kwargs}
        plan = self._plan(layers, visual_mask, skip_padding, kwargs)
        if plan is not None and plan.attention != plan.ffn:
            check_text_model(text_model(self), PARTS)
        if plan is None or plan.reduction is None:
            return super().forward(**kwargs, **({} if plan is None else {"plan": plan}))
        as_tuple = kwargs.pop("return_dict", None) is False
        with nullcontext() if plan.windows is None else plan.windows.lengths:
            output = super().forward(**kwargs, plan=plan)
        features = used_image_features(output)
        if features is not None:
            set_used_image_features(output, features[~is_dropped(features)])
        return output.to_tuple() if as_tuple else output

    def _plan(
        self, layers: list[int | str], visual_mask: Tensor | None, skip_padding: bool, kwargs: dict
    ) -> Plan | None:
        """The plan of a pass with the parent's arguments `kwargs`; `None` if it holds no visual token to plan for."""
        present = features_given(kwargs)
        for name in ("pixel_values", "pixel_values_videos"):
            check_images(kwargs.get(name))
        own_mask = visual_mask is not None
        visual_mask = self._visual_mask(kwargs, present, visual_mask)
        if visual_mask is None:
            return None
        reduction = self._active_reduction()
        padding = kwargs.get("attention_mask")
        if torch.compiler.is_compiling() and reduction is None:
            # A caller's own mask can leave image tokens out, which are text then.
            bound = visual_mask.shape[1] if own_mask else self._max_text_tokens(visual_mask, present, kwargs)
            return Plan.build(layers, visual_mask, padding if skip_padding else None, bound) if layers else None
        validate_settings(self.config)  # the list can have been assigned since
        if reduction is None:
            return Plan.build(layers, visual_mask, padding if skip_padding else None) if layers else None
        if reduction.cuts_images and not present and visual_mask.any():
            raise ValueError(
                f"{reduction.method} reduces images, and `inputs_embeds` hold their features already; pass "
                "`pixel_values`, or set visual_reduction to None"
            )
        if torch.is_tensor(padding) and padding.ndim == 2:
            padding = padding[:, -visual_mask.shape[1] :]
        else:
            padding = None
        windows = None
        if reduction.in_decoder is not None and reduction.in_decoder.per_image:
            windows = self._windows(visual_mask, present, kwargs)
        attention, ffn = frozen_updates(layers)
        dead = None if reduction.in_decoder is None else reduction.in_decoder.dead_layer
        if dead is not None and not outputs_of_layers(self, kwargs):
            attention, ffn = attention | {dead}, ffn | {dead}
        return Plan(attention, ffn, visual_mask, None, reduction, padding, skip_padding, windows)

    def _active_reduction(self, select_strategy: str | None = None) -> Reduction | None:
        """The options of the reduction in force, or `None` if it changes nothing: the dense code runs then.

        Raises:
            ValueError: they are not valid, or not with a call's own `select_strategy`.
        """
        _, options = self.settings
        if options is None:
            return None
        sizes = ModelSizes.of(self.config, select_strategy)
        reduction = parse_visual_reduction(options, sizes)
        return None if reduction is None or reduction.identity(sizes) else reduction

    def _reduced(self, kind: str, encode: functools.partial) -> Any:
        """What `encode()`, the parent's method for images or videos, returns. Under a method that cuts them, the features
        that it leaves out are marked: the lists keep their lengths, those of the placeholders in a prompt.

        Raises:
            ValueError: the call's `vision_feature_select_strategy` does not go with the method.
        """
        given = inspect.signature(encode.func).bind_partial(*encode.args, **encode.keywords).arguments
        given = {**given, **given.pop("kwargs", {})}
        reduction = self._active_reduction(given.get("vision_feature_select_strategy"))
        if reduction is None or not reduction.cuts_images:
            with Lengths():  # Qwen3-VL's encoder of videos calls that of images, which would note them too
                output = encode()
            note(kind, lambda: self._lengths(kind, image_features(output)))
            return output
        if given.get("return_dict") is not None:
            encode = functools.partial(encode, return_dict=True)
        if reduction.in_tower is not None:
            layer = given.get("vision_feature_layer")
            if layer not in (None, getattr(self.config, "vision_feature_layer", None)):
                raise ValueError(
                    f"{reduction.method} was checked for features of layer {self.config.vision_feature_layer}, and this "
                    f"call asks for those of {layer}; set vision_feature_layer in the config"
                )
            output, marked = self._merged_in_tower(reduction.in_tower, encode)
        else:
            outputs = []

            def features() -> list[Tensor]:
                outputs.append(encode())
                return image_features(outputs[0])

            grid = next((given[name] for name in ("image_grid_thw", "video_grid_thw") if name in given), None)
            assert reduction.on_images is not None  # it cuts images
            marked = reduced_features(
                self, reduction.on_images, features, image_sizes=given.get("image_sizes"), grid_thw=grid
            )
            output = outputs[0]
        note(kind, lambda: self._lengths(kind, marked))
        output = with_image_features(output, marked)
        return output.to_tuple() if given.get("return_dict") is False else output

    def _merged_in_tower(self, merging: TowerReduction, encode: functools.partial) -> tuple[Any, list[Tensor]]:
        """What `encode()` returns if patches are merged in the tower; and the features, of the lengths that they have
        without."""
        sizes = ModelSizes.of(self.config)
        tower = sizes.tower
        assert tower is not None  # the method's check
        with TowerMerging(self, merging, tower):
            if tower.patches is None:  # the tower itself fills up to the lengths
                output = encode()
                return output, image_features(output)
            side = isqrt(merging.left(tower.patches, tower.unit))
            grid = SmallerGrid(self, side, tower.patches)
            output = encode.func(grid.view, *encode.args[1:], **encode.keywords)
        features = image_features(output)
        lengths = grid.dense_lengths(features, sizes.patches)
        return output, [pad(each, n) for each, n in zip(features, lengths, strict=True)]

    def _lengths(self, kind: str, features: list[Tensor]) -> list[Length]:
        """Of images or videos in a prompt, from their features `[n, h]`; none where features may be of tiles, or of a row."""
        known = {name for each in MODELS for name in (each.config_class.model_type, each.config_class.base_model_type)}
        if self.config.model_type not in known or hasattr(self.config, "downsample_ratio"):
            return []
        newline, tower = getattr(self, "image_newline", None), TowerSizes.of(self.config)
        found = []
        for each in features:
            if newline is None or tower is None or tower.patches is None:
                found.append(Length(len(each), False))
                continue
            left = each[~is_dropped(each)]
            has_newline = torch.equal(left[-1], newline.to(left))
            if kind == "video":  # up to 5.18, the model adds it to what its encoder returns
                found.append(Length(len(each) + (not has_newline), True))
            else:  # after the rows of tiles there are more
                found.append(Length(len(each), has_newline and len(each) == tower.patches + 1))
        return found

    def _windows(self, visual_mask: Tensor, present: list[str], kwargs: dict) -> Windows:
        """What is known before the pass of the images in this chunk; the encoders say how long they are."""
        masks = {
            kind: self._placeholders([kind], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) for kind in present
        }
        windows = Windows(visual_mask, masks)
        for kind, output in (kwargs.get("mm_encoder_outputs") or {}).items():
            if kind in masks and output is not None:
                windows.lengths[kind] = self._lengths(kind, image_features(output))
        return windows

    # Where the visual tokens are

    def _placeholders(self, kinds: Iterable[str], input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Positions of the placeholders of these kinds, `[B, S]` bool; among embeddings, those equal to their own."""
        known = visual_token_ids(self.config)
        masks = []
        for kind in kinds:
            if kind in known and input_ids is not None:
                masks.append(input_ids == known[kind])
            elif kind in known and inputs_embeds is not None:
                token = torch.full((), known[kind], dtype=torch.long, device=inputs_embeds.device)
                masks.append((inputs_embeds == self.get_input_embeddings()(token)).all(-1))
        return functools.reduce(torch.logical_or, masks)

    def _visual_mask(self, kwargs: dict, present: list[str], visual_mask: Tensor | None) -> Tensor | None:
        """The positions that hold features in this chunk, `[B, S]` bool, or `None` if there are none."""
        input_ids, inputs_embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if visual_mask is not None:
            shape = (kwargs["input_ids"] if inputs_embeds is None else inputs_embeds).shape[:2]
            if visual_mask.shape != shape:
                raise ValueError(f"visual_mask has shape {tuple(visual_mask.shape)}; the inputs need {tuple(shape)}")
            return visual_mask.to(torch.bool)
        if present:
            return self._placeholders(present, input_ids, inputs_embeds)
        if not torch.compiler.is_compiling():
            self._warn_if_images_are_missing(input_ids, inputs_embeds, find_cache(kwargs))
        return None

    def _warn_if_images_are_missing(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: Cache | None
    ) -> None:
        """Prompts without features are text. Say so where the caller may have meant something else."""
        if input_ids is None:
            if inputs_embeds is not None and inputs_embeds.shape[1] > 1:
                logger.warning_once(
                    "`inputs_embeds` without `visual_mask`: every position counts as text and no token is frozen. "
                    "Pass `visual_mask` if the embeddings contain image features."
                )
        elif input_ids.shape[1] > 1 and (cache is None or cache.get_seq_length() == 0):
            if self._placeholders(("image", "video"), input_ids, None).any():
                logger.warning_once(
                    "The prompt holds image tokens, but no image features were passed: they count as text."
                )

    def _max_text_tokens(self, visual_mask: Tensor, present: list[str], kwargs: dict) -> int:
        """Upper bound of the text tokens per row that a compiled graph can know without a synchronisation: exact for one
        row of LLaVA-1.5, whose images all have as many tokens as the CLIP tower has patches."""
        batch_size, length = visual_mask.shape
        pixels, sizes = kwargs.get("pixel_values"), ModelSizes.of(self.config)
        if batch_size > 1 or present != ["image"] or pixels is None or pixels.ndim != 4:
            return length
        if sizes.patches is None or sizes.tiled or sizes.vision_type != "clip_vision_model":
            return length
        strategy = kwargs.get("vision_feature_select_strategy")
        has_cls = ModelSizes.of(self.config, strategy).has_cls_feature
        return length - pixels.shape[0] * (sizes.patches + has_cls)

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the parent's, with a check that no environment variable switches off."""
        if not torch.compiler.is_compiling():
            given = {**dict(zip(("image_features", "video_features"), args, strict=False)), **kwargs}
            for kind in ("image", "video"):
                features = given.get(f"{kind}_features")
                if torch.is_tensor(features):
                    self._check_placeholders(kind, input_ids, inputs_embeds, features)
        return super().get_placeholder_mask(input_ids, inputs_embeds, *args, **kwargs)

    def _check_placeholders(
        self, kind: str, input_ids: Tensor | None, inputs_embeds: Tensor, features: Tensor
    ) -> None:
        n_tokens = int(self._placeholders([kind], input_ids, inputs_embeds).sum())
        n_features = features.numel() // inputs_embeds.shape[-1]
        if n_tokens != n_features:
            raise ValueError(
                f"{kind} tokens and {kind} features do not match: the prompt holds {n_tokens} {kind} tokens (id "
                f"{visual_token_ids(self.config)[kind]}), the {kind}s give {n_features} features"
            )


class ShortVHeadMixin(ShortVSettingsMixin, _Head):
    """Modifications: `generate` takes `visual_mask` beside `inputs_embeds`, and refuses what a method cannot do."""

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        known = {k: v for k, v in model_kwargs.items() if k != "visual_mask"}
        super()._validate_model_kwargs(known)  # type: ignore[misc]  # upstream's `self` is a class for checkers only

    def _validate_generation_mode(
        self,
        generation_mode: GenerationMode,
        generation_config: GenerationConfig,
        generation_mode_kwargs: dict[str, Any],
    ) -> None:
        super()._validate_generation_mode(  # type: ignore[misc]  # as above
            generation_mode, generation_config, generation_mode_kwargs
        )
        reduction = self.model._active_reduction()
        if reduction is not None and reduction.looks_at_last_token:
            if generation_mode == GenerationMode.ASSISTED_GENERATION:
                raise ValueError(
                    f"{reduction.method} ranks visual tokens by attention in the prompt, mostly of its last token; assisted "
                    "decoding puts candidates after it. Use another method, or no assistant."
                )
            if generation_config.prefill_chunk_size is not None:
                raise ValueError(
                    f"{reduction.method} ranks visual tokens by attention in the prompt, mostly of its last token, which a chunk of "
                    f"it does not hold; prefill_chunk_size is {generation_config.prefill_chunk_size}, valid is None"
                )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        visual_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        tokens = inputs.get("inputs_embeds")
        tokens = inputs["input_ids"] if tokens is None else tokens
        if tokens.shape[1] > 1:
            inputs["skip_padding"] = True
        if visual_mask is not None:
            past = find_cache(inputs)
            start = 0 if past is None else int(past.get_seq_length())
            if start < visual_mask.shape[1]:
                chunk = visual_mask[:, start : start + tokens.shape[1]]
                # without a cache, the chunk grows by the generated tokens, which are text
                inputs["visual_mask"] = nn.functional.pad(chunk, (0, tokens.shape[1] - chunk.shape[1]))
        return inputs


class ShortVGenerationMixin(ShortVHeadMixin, BaseWeightsMixin):
    """Modifications: the model inside is the ShortV one, and weights can come from another repo (`base_weights.py`)."""

    base_class: type[ShortVModelMixin]

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        validate_settings(config)
        super().__init__(config, *args, **kwargs)
        self.model.__class__ = self.base_class
        self.model.config = config  # some families give it a copy; settings are one
        record_outputs(self.model)
        self.model.graft()


class ShortVLlavaModel(ShortVModelMixin, BaseWeightsMixin, LlavaModel):
    """[`LlavaModel`] that freezes visual tokens in `config.shortv_layers`."""

    config_class = ShortVLlavaConfig


class ShortVLlavaForConditionalGeneration(ShortVGenerationMixin, LlavaForConditionalGeneration):
    """[`LlavaForConditionalGeneration`] that freezes visual tokens in `config.shortv_layers`."""

    config_class, base_class = ShortVLlavaConfig, ShortVLlavaModel


class ShortVLlavaNextModel(ShortVModelMixin, BaseWeightsMixin, LlavaNextModel):
    """[`LlavaNextModel`] that freezes visual tokens in `config.shortv_layers`."""

    config_class = ShortVLlavaNextConfig


class ShortVLlavaNextForConditionalGeneration(ShortVGenerationMixin, LlavaNextForConditionalGeneration):
    """[`LlavaNextForConditionalGeneration`] that freezes visual tokens in `config.shortv_layers`."""

    config_class, base_class = ShortVLlavaNextConfig, ShortVLlavaNextModel


class ShortVLlavaOnevisionModel(ShortVModelMixin, BaseWeightsMixin, LlavaOnevisionModel):
    """[`LlavaOnevisionModel`] that freezes visual tokens in `config.shortv_layers`."""

    config_class = ShortVLlavaOnevisionConfig


class ShortVLlavaOnevisionForConditionalGeneration(ShortVGenerationMixin, LlavaOnevisionForConditionalGeneration):
    """[`LlavaOnevisionForConditionalGeneration`] that freezes visual tokens in `config.shortv_layers`."""

    config_class, base_class = ShortVLlavaOnevisionConfig, ShortVLlavaOnevisionModel


class ShortVQwen2VLModel(ShortVModelMixin, BaseWeightsMixin, Qwen2VLModel):
    """[`Qwen2VLModel`] that freezes visual tokens in `config.shortv_layers`."""

    config_class = ShortVQwen2VLConfig


class ShortVQwen2VLForConditionalGeneration(ShortVGenerationMixin, Qwen2VLForConditionalGeneration):
    """[`Qwen2VLForConditionalGeneration`] that freezes visual tokens in `config.shortv_layers`."""

    config_class, base_class = ShortVQwen2VLConfig, ShortVQwen2VLModel


class ShortVQwen2_5_VLModel(ShortVModelMixin, BaseWeightsMixin, Qwen2_5_VLModel):
    """[`Qwen2_5_VLModel`] that freezes visual tokens in `config.shortv_layers`."""

    config_class = ShortVQwen2_5_VLConfig


class ShortVQwen2_5_VLForConditionalGeneration(ShortVGenerationMixin, Qwen2_5_VLForConditionalGeneration):
    """[`Qwen2_5_VLForConditionalGeneration`] that freezes visual tokens in `config.shortv_layers`."""

    config_class, base_class = ShortVQwen2_5_VLConfig, ShortVQwen2_5_VLModel


class ShortVQwen3VLModel(ShortVModelMixin, BaseWeightsMixin, Qwen3VLModel):
    """[`Qwen3VLModel`] that freezes visual tokens in `config.shortv_layers`."""

    config_class = ShortVQwen3VLConfig


class ShortVQwen3VLForConditionalGeneration(ShortVGenerationMixin, Qwen3VLForConditionalGeneration):
    """[`Qwen3VLForConditionalGeneration`] that freezes visual tokens in `config.shortv_layers`."""

    config_class, base_class = ShortVQwen3VLConfig, ShortVQwen3VLModel


class ShortVInternVLModel(ShortVModelMixin, BaseWeightsMixin, InternVLModel):
    """[`InternVLModel`] that freezes visual tokens in `config.shortv_layers`."""

    config_class = ShortVInternVLConfig


class ShortVInternVLForConditionalGeneration(ShortVGenerationMixin, InternVLForConditionalGeneration):
    """[`InternVLForConditionalGeneration`] that freezes visual tokens in `config.shortv_layers`."""

    config_class, base_class = ShortVInternVLConfig, ShortVInternVLModel


class ShortVGemma3Model(ShortVModelMixin, BaseWeightsMixin, Gemma3Model):
    """[`Gemma3Model`] that freezes visual tokens in `config.shortv_layers`."""

    config_class = ShortVGemma3Config


class ShortVGemma3ForConditionalGeneration(ShortVGenerationMixin, Gemma3ForConditionalGeneration):
    """[`Gemma3ForConditionalGeneration`] that freezes visual tokens in `config.shortv_layers`."""

    config_class, base_class = ShortVGemma3Config, ShortVGemma3Model


MODELS = (
    ShortVLlavaForConditionalGeneration,
    ShortVLlavaNextForConditionalGeneration,
    ShortVLlavaOnevisionForConditionalGeneration,
    ShortVQwen2VLForConditionalGeneration,
    ShortVQwen2_5_VLForConditionalGeneration,
    ShortVQwen3VLForConditionalGeneration,
    ShortVInternVLForConditionalGeneration,
    ShortVGemma3ForConditionalGeneration,
)


def apply_shortv(
    model: PreTrainedModel, shortv_layers: list[int | str], visual_reduction: dict | None = None
) -> PreTrainedModel:
    """Freeze visual tokens in these layers of a loaded Transformers vision-language model, in place: also of families that
    have no ShortV class. The model keeps its class's name, its config gets the fields `shortv_layers` and
    `visual_reduction`, and it gains `set_shortv_layers`, `set_visual_reduction` and `using`. What `save_pretrained`
    writes is the stock model, to which this function is to be applied again.

    Of an architecture that the tests do not run on, a small copy with random weights is tried first: a plan in which
    every token is text must give what the stock layers give.

    Args:
        model: e.g. what `AutoModelForImageTextToText.from_pretrained` returned.
        shortv_layers: the decoder layers to freeze; `[]` for none yet.
        visual_reduction: as `config.visual_reduction`.

    Returns:
        The model.

    Raises:
        ValueError: it is no vision-language model, its layers do something else than this package knows of, or a
            setting is not valid.
    """
    base = getattr(model, "model", None)
    if (
        not isinstance(model, PreTrainedModel)
        or not isinstance(base, PreTrainedModel)
        or not visual_token_ids(model.config)
    ):
        raise ValueError(
            f"{type(model).__name__} is no vision-language model that this function knows how to change; adapters come "
            "after it"
        )
    shortv_layers = validate_shortv_layers(shortv_layers, model.config.get_text_config().num_hidden_layers)
    visual_reduction = validate_visual_reduction(visual_reduction, model.config)
    if isinstance(model, ShortVSettingsMixin):
        model.config.shortv_layers, model.config.visual_reduction = shortv_layers, visual_reduction
        return model
    text = text_model(base)
    check_text_model(text)
    for module in (model, base, text, *text.layers, *(layer.self_attn for layer in text.layers)):
        refuse_own_forward(module)  # before the first is changed
    graft(base, ShortVModelMixin)
    graft(model, ShortVHeadMixin)
    assert isinstance(base, ShortVModelMixin)  # from now on
    base.config = model.config
    model.config.shortv_layers, model.config.visual_reduction = shortv_layers, visual_reduction
    base.graft()
    return model


__all__ = [
    "ShortVGemma3ForConditionalGeneration",
    "ShortVGemma3Model",
    "ShortVInternVLForConditionalGeneration",
    "ShortVInternVLModel",
    "ShortVLlavaForConditionalGeneration",
    "ShortVLlavaModel",
    "ShortVLlavaNextForConditionalGeneration",
    "ShortVLlavaNextModel",
    "ShortVLlavaOnevisionForConditionalGeneration",
    "ShortVLlavaOnevisionModel",
    "ShortVQwen2VLForConditionalGeneration",
    "ShortVQwen2VLModel",
    "ShortVQwen2_5_VLForConditionalGeneration",
    "ShortVQwen2_5_VLModel",
    "ShortVQwen3VLForConditionalGeneration",
    "ShortVQwen3VLModel",
    "apply_shortv",
]
