"""ShortV models: Hugging Face LLaVA-1.5 and LLaVA-NeXT with visual tokens frozen in the layers of `config.shortv_layers`.

Reading order: `decoder_layer.py` (the idea), `freeze_plan.py` (which tokens), then this file (where the plan is made).
Token reduction (`config.visual_reduction`): `reduction.py` (what a method is), `visual_tokens.py` (tokens leave the
decoder), `vision.py` (features are cut before it).
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import EllipsisType, MappingProxyType

import torch
from torch import nn
from transformers import (
    AutoModel,
    LlamaModel,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    MistralModel,
    Qwen2Model,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging

from .base_weights import BaseWeightsMixin
from .configuration_shortv import (
    ShortVLlavaConfig,
    ShortVLlavaNextConfig,
    validate_shortv_layers,
    validate_visual_reduction,
)
from .decoder_layer import (
    ShortVLlamaAttention,
    ShortVLlamaDecoderLayer,
    ShortVMistralAttention,
    ShortVMistralDecoderLayer,
    ShortVQwen2Attention,
    ShortVQwen2DecoderLayer,
)
from .freeze_plan import FreezePlan
from .reduction import ImageReduction, ModelSizes, Reduction, is_dropped, parse_visual_reduction
from .upstream import (
    cached_lengths,
    check_cached,
    check_upstream,
    find_cache,
    image_features,
    require_text_arguments,
    set_used_image_features,
    used_image_features,
    with_image_features,
)
from .vision import listen, reduced_features
from .visual_cache import is_reduced
from .visual_tokens import TokenReduction, VisualTokens


logger = logging.get_logger(__name__)


class ShortVTextModelMixin:
    """Modifications: the decoder layers and their attention are the ShortV classes. The parent builds them, so the
    parts and their initialisation are its own; a ShortV layer adds no parameter, only a forward. `visual_tokens` says
    which tokens a reduction method may drop; outputs have zeros in their place."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.__class__ = self.decoder_layer_class
            layer.self_attn.__class__ = self.attention_class

    def forward(self, input_ids=None, *args, inputs_embeds=None, visual_tokens: VisualTokens | None = None, **kwargs):
        cache, plan, reduction = find_cache(kwargs), kwargs.get("freeze_plan"), None
        if visual_tokens is not None or is_reduced(cache):
            if args:
                raise TypeError("with visual_reduction, arguments other than input_ids are given by name")
            if inputs_embeds is None:
                input_ids, inputs_embeds = None, self.embed_tokens(input_ids)
            given = kwargs.get("attention_mask"), kwargs.get("position_ids")
            reduction = TokenReduction(visual_tokens, inputs_embeds, *given, cache)
            inputs_embeds, kwargs["position_ids"] = reduction.inputs_embeds, reduction.position_ids
            kwargs["reduction"] = reduction
        if plan is None and reduction is None:
            return super().forward(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        # While training with checkpointing, upstream's layers leave the cache alone, and say so.
        checked = () if self.training and self.gradient_checkpointing else range(len(self.layers))
        before = cached_lengths(cache, checked)
        output = super().forward(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        check_cached(cache, output, before, reduction.length if plan is None else plan.chunk_length)
        return output if reduction is None else reduction.restore(output)


class ShortVLlamaModel(ShortVTextModelMixin, LlamaModel):
    decoder_layer_class = ShortVLlamaDecoderLayer
    attention_class = ShortVLlamaAttention
    _no_split_modules = ["ShortVLlamaDecoderLayer"]


class ShortVMistralModel(ShortVTextModelMixin, MistralModel):
    decoder_layer_class = ShortVMistralDecoderLayer
    attention_class = ShortVMistralAttention
    _no_split_modules = ["ShortVMistralDecoderLayer"]


class ShortVQwen2Model(ShortVTextModelMixin, Qwen2Model):
    decoder_layer_class = ShortVQwen2DecoderLayer
    attention_class = ShortVQwen2Attention
    _no_split_modules = ["ShortVQwen2DecoderLayer"]


TEXT_MODELS = {"llama": ShortVLlamaModel, "mistral": ShortVMistralModel, "qwen2": ShortVQwen2Model}


def build_text_model(text_config) -> nn.Module:
    """The ShortV text model for `text_config`. Raises `ValueError` if its architecture is not supported."""
    if text_config.model_type not in TEXT_MODELS:
        raise ValueError(
            f"text_config.model_type is {text_config.model_type!r}; ShortV supports {', '.join(sorted(TEXT_MODELS))}"
        )
    model_class = TEXT_MODELS[text_config.model_type]
    require_text_arguments(model_class)
    check_upstream(model_class, text_config, FreezePlan.of_text)
    return model_class._from_config(text_config)


def without_ours(kwargs: dict) -> dict:
    """Arguments for the vision tower: 5.24 hands it those of the whole forward, our plans among them."""
    return {name: value for name, value in kwargs.items() if name not in ("freeze_plan", "visual_tokens")}


class _Block(dict):
    """The settings of one `using` block, by the names of the config's fields. Blocks are told apart by identity."""

    __eq__, __hash__ = object.__eq__, object.__hash__


# By the id of a config: the innermost block that is open in this thread or asyncio task. Compiled graphs cannot read a
# context variable, and need not while no block is open anywhere: `_OPEN` holds those that are. What a task has inherited
# from a block that has ended since does not count.
_USING: ContextVar[dict[int, _Block]] = ContextVar("settings in use", default=MappingProxyType({}))
_OPEN: list[_Block] = []


def with_signature_of(parents_method):
    """`inspect.signature` of the method is the parent's: newer `generate` hands on only the arguments that it finds
    there, and what it does not hand on is lost without a word."""

    def decorate(method):
        method.__signature__ = inspect.signature(parents_method)
        return method

    return decorate


def check_images(pixel_values: torch.Tensor | None):
    """Raises `ValueError` if `pixel_values` are of no image at all."""
    if pixel_values is not None and len(pixel_values) == 0:
        raise ValueError(
            f"pixel_values hold no image: their shape is {tuple(pixel_values.shape)}; without images, pass None"
        )


class ShortVSettingsMixin:
    """Modifications: what is frozen can be switched at run time."""

    @property
    def settings(self) -> tuple[list[int], dict | None]:
        """The frozen layers and the reduction in force here: the config's, unless inside [`using`]."""
        used = self._block() if _OPEN else {}
        layers = used.get("shortv_layers", self.config.shortv_layers)
        return layers, used.get("visual_reduction", self.config.visual_reduction)

    def _block(self) -> dict:
        block = _USING.get().get(id(self.config))
        return block if block in _OPEN else {}

    @contextmanager
    def using(
        self, *, shortv_layers: list[int] | EllipsisType = ..., visual_reduction: dict | None | EllipsisType = ...
    ) -> Iterator["ShortVSettingsMixin"]:
        """Inside, the model freezes these layers and reduces by this method; what is not given stays. The config is not
        touched, and other threads that use the model are not either: a thread that is started inside must enter
        `using` itself. (A graph of a whole forward, `torch.compile(model)`, is made anew while a block is open.)

        Raises:
            ValueError: as [`set_shortv_layers`] and [`set_visual_reduction`].
        """
        used = _Block(self._block())
        if shortv_layers is not ...:
            n_layers = self.config.text_config.num_hidden_layers
            used["shortv_layers"] = validate_shortv_layers(shortv_layers, n_layers)
        if visual_reduction is not ...:
            used["visual_reduction"] = validate_visual_reduction(visual_reduction, self.config)
        token = _USING.set({**_USING.get(), id(self.config): used})
        _OPEN.append(used)
        try:
            yield self
        finally:
            _OPEN.remove(used)
            _USING.reset(token)

    def set_shortv_layers(self, shortv_layers: list[int]):
        """Freeze visual tokens in these decoder layers from now on; `[]` is the dense model. No weight changes.

        Raises:
            ValueError: if an id is out of range, negative, duplicated or not an integer.
        """
        n_layers = self.config.text_config.num_hidden_layers
        self.config.shortv_layers = validate_shortv_layers(shortv_layers, n_layers)

    def set_visual_reduction(self, visual_reduction: dict | None):
        """Switch the visual-token reduction method; `None` turns it off. No weight changes.

        Raises:
            ValueError: for an unknown method or option, or a value out of its range.
        """
        self.config.visual_reduction = validate_visual_reduction(visual_reduction, self.config)


class ShortVModelMixin(ShortVSettingsMixin):
    """Modifications: `forward` finds the visual tokens and hands the text model a [`FreezePlan`] or, if a method reduces
    them, [`VisualTokens`].

    With frozen layers, `hidden_states` of visual tokens repeat through a frozen layer, and the `attentions` that `eager`
    returns, `[batch, heads, sequence, keys]` as upstream's, hold zeros in their rows. Where a reduction method dropped a
    token, outputs keep their shapes and hold zeros: hidden states, attentions to and from it, and so its logits.
    """

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        *args,
        inputs_embeds: torch.FloatTensor | None = None,
        visual_mask: torch.Tensor | None = None,
        skip_padding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """As the parent's, plus:

        visual_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*):
            True at the positions that hold image features. Needed with `inputs_embeds` that already contain them;
            otherwise the positions of the image token are used. If given, it decides what is frozen, and what FastV and
            VTW may drop.
        skip_padding (`bool`, *optional*, defaults to `False`):
            Freeze padding as well, which changes no other token. `generate` asks for it: a batch of rows with and
            without images, or with images of different length, is mostly padding.

        Raises:
            ValueError: if image tokens and image features do not match in number, `pixel_values` hold no image,
                `visual_mask` does not fit, or `visual_reduction` cannot work on such inputs.
        """
        layers, visual_reduction = self.settings
        if layers or visual_reduction is not None:
            check_images(pixel_values)
            features = pixel_values is not None or (kwargs.get("mm_encoder_outputs") or {}).get("image") is not None
            visual_mask = self._get_visual_mask(input_ids, inputs_embeds, features, find_cache(kwargs), visual_mask)
            reduction = None if visual_mask is None else self._active_reduction()
            if reduction is not None:
                if isinstance(reduction, ImageReduction) and not features and visual_mask.any():
                    raise ValueError(
                        f"{reduction.method} reduces images, and `inputs_embeds` hold their features already; pass "
                        "`pixel_values`, or set visual_reduction to None"
                    )
                self.config.validate_shortv()  # the list can have been assigned since
                tokens = VisualTokens(visual_mask, reduction, layers, skip_padding)
                kwargs = {**kwargs, "visual_tokens": tokens}
            elif visual_mask is not None and layers:
                padding_mask = kwargs.get("attention_mask") if skip_padding else None
                plan = self._build_plan(layers, visual_mask, padding_mask, pixel_values, kwargs)
                kwargs = kwargs if plan is None else {**kwargs, "freeze_plan": plan}
        if "visual_tokens" not in kwargs:
            return super().forward(input_ids, pixel_values, *args, inputs_embeds=inputs_embeds, **kwargs)
        as_tuple = kwargs.pop("return_dict", None) is False
        output = super().forward(input_ids, pixel_values, *args, inputs_embeds=inputs_embeds, **kwargs)
        features = used_image_features(output)
        if features is not None:
            set_used_image_features(output, features[~is_dropped(features)])
        return output.to_tuple() if as_tuple else output

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
        return None if reduction.identity(sizes) else reduction

    def _reduce_image_features(self, get_features: partial, image_sizes=None, return_dict=None):
        """What `get_features()`, the parent's method, returns; under an [`ImageReduction`] with the features that it
        leaves out marked (`vision.py`). The lists keep their lengths, those of the image tokens in a prompt.

        Raises:
            ValueError: there are no images, or the call's `vision_feature_select_strategy` does not go with the method.
        """
        pixel_values, *others = get_features.args
        check_images(pixel_values)
        strategy = get_features.keywords.get("vision_feature_select_strategy")
        if strategy is None:  # or given without its name
            strategy = next((value for value in others if isinstance(value, str)), None)
        reduction = self._active_reduction(strategy)
        if not isinstance(reduction, ImageReduction):
            return get_features() if return_dict is None else get_features(return_dict=return_dict)
        outputs = []

        def features():
            outputs.append(get_features() if return_dict is None else get_features(return_dict=True))
            return image_features(outputs[0])

        marked = reduced_features(self, reduction, features, image_sizes=image_sizes)
        output = with_image_features(outputs[0], marked)
        return output.to_tuple() if return_dict is False else output

    def _build_plan(self, layers, visual_mask, padding_mask, pixel_values, kwargs):
        if torch.compiler.is_compiling():
            bound = self._max_text_tokens(visual_mask, pixel_values, kwargs)
            return FreezePlan.build(layers, visual_mask, padding_mask, bound)
        self.config.validate_shortv()  # the list can have been assigned since
        return FreezePlan.build(layers, visual_mask, padding_mask)

    def _image_token_mask(self, input_ids, inputs_embeds):
        """Positions of the image token, `[B, S]` bool; among embeddings, those equal to its own."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _get_visual_mask(self, input_ids, inputs_embeds, has_features, cache, visual_mask):
        """The positions that hold image features in this chunk, `[B, S]` bool, or `None` if there are none."""
        if visual_mask is not None:
            shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
            if visual_mask.shape != shape:
                raise ValueError(f"visual_mask has shape {tuple(visual_mask.shape)}; the inputs need {tuple(shape)}")
            return visual_mask.to(torch.bool)
        if has_features:
            return self._image_token_mask(input_ids, inputs_embeds)
        if not torch.compiler.is_compiling():
            self._warn_if_images_are_missing(input_ids, inputs_embeds, cache)
        return None

    def _warn_if_images_are_missing(self, input_ids, inputs_embeds, cache):
        """Prompts without image features are text. Say so where the caller may have meant something else."""
        if input_ids is None:
            if inputs_embeds is not None and inputs_embeds.shape[1] > 1:
                logger.warning_once(
                    "`inputs_embeds` without `visual_mask`: every position counts as text and no token is frozen. "
                    "Pass `visual_mask` if the embeddings contain image features."
                )
        elif input_ids.shape[1] > 1 and (cache is None or cache.get_seq_length() == 0):
            if (input_ids == self.config.image_token_id).any():
                logger.warning_once(
                    "The prompt holds image tokens, but no image features were passed: they count as text."
                )

    def _max_text_tokens(self, visual_mask, pixel_values, kwargs) -> int:
        """Upper bound of the text tokens per row that a compiled graph can know without a synchronisation: exact for
        one row of LLaVA-1.5, whose images all have as many tokens as the CLIP tower has patches."""
        batch_size, length = visual_mask.shape
        vision = self.config.vision_config
        if (
            batch_size > 1
            or pixel_values is None
            or pixel_values.ndim != 4
            or vision.model_type != "clip_vision_model"
        ):
            return length
        per_image = (vision.image_size // vision.patch_size) ** 2
        strategy = kwargs.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        return length - pixel_values.shape[0] * (per_image + (strategy == "full"))

    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        """As the parent's, with a check that no environment variable switches off."""
        if not torch.compiler.is_compiling():
            n_tokens = int(self._image_token_mask(input_ids, inputs_embeds).sum())
            n_features = image_features.numel() // image_features.shape[-1]
            if n_tokens != n_features:
                raise ValueError(
                    f"image tokens and image features do not match: the prompt holds {n_tokens} image tokens (id "
                    f"{self.config.image_token_id}), the images give {n_features} features"
                )
        return super().get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=image_features)


class ShortVGenerationMixin(ShortVSettingsMixin, BaseWeightsMixin):
    """Modifications: weights can come from another repo (`base_weights.py`), and `generate` takes `visual_mask` beside
    `inputs_embeds`."""

    def _validate_model_kwargs(self, model_kwargs):
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k != "visual_mask"})

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        reduction = self.model._active_reduction()
        if reduction is not None and reduction.looks_at_last_token:
            if generation_mode == GenerationMode.ASSISTED_GENERATION:
                raise ValueError(
                    f"{reduction.method} ranks visual tokens by the attention of the prompt's last token; assisted decoding puts "
                    "candidates after it. Use another method, or no assistant."
                )
            if generation_config.prefill_chunk_size is not None:
                raise ValueError(
                    f"{reduction.method} ranks visual tokens by the attention of the prompt's last token, which a chunk of the prompt "
                    f"does not hold; prefill_chunk_size is {generation_config.prefill_chunk_size}, valid is None"
                )

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, visual_mask=None, **kwargs):
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


class ShortVLlavaModel(ShortVModelMixin, BaseWeightsMixin, LlavaModel):
    """[`LlavaModel`] whose text model freezes visual tokens in `config.shortv_layers`."""

    config_class = ShortVLlavaConfig
    _keys_to_ignore_on_load_unexpected = [r"lm_head"]

    def __init__(self, config: ShortVLlavaConfig):
        config.validate_shortv()
        super(LlavaModel, self).__init__(config)  # the parent's parts, with another text model
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = build_text_model(config.text_config)
        listen(self)
        self.post_init()

    @with_signature_of(LlavaModel.get_image_features)
    def get_image_features(self, pixel_values, *args, return_dict=None, **kwargs):
        """As the parent's; a method that cuts image features marks those it leaves out."""
        get_features = partial(super().get_image_features, pixel_values, *args, **without_ours(kwargs))
        return self._reduce_image_features(get_features, return_dict=return_dict)


class ShortVLlavaForConditionalGeneration(ShortVGenerationMixin, LlavaForConditionalGeneration):
    """[`LlavaForConditionalGeneration`] whose text model freezes visual tokens in `config.shortv_layers`."""

    config_class = ShortVLlavaConfig

    def __init__(self, config: ShortVLlavaConfig):
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = ShortVLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


class ShortVLlavaNextModel(ShortVModelMixin, BaseWeightsMixin, LlavaNextModel):
    """[`LlavaNextModel`] whose text model freezes visual tokens, `image_newline` included, in `config.shortv_layers`."""

    config_class = ShortVLlavaNextConfig
    _keys_to_ignore_on_load_unexpected = [r"lm_head"]

    def __init__(self, config: ShortVLlavaNextConfig):
        config.validate_shortv()
        super(LlavaNextModel, self).__init__(config)  # the parent's parts, with another text model
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaNextMultiModalProjector(config)
        embed_std = 1 / math.sqrt(config.text_config.hidden_size)
        self.image_newline = nn.Parameter(torch.randn(config.text_config.hidden_size, dtype=self.dtype) * embed_std)
        self.vocab_size = config.text_config.vocab_size
        self.language_model = build_text_model(config.text_config)
        listen(self)
        self.post_init()

    @with_signature_of(LlavaNextModel.get_image_features)
    def get_image_features(self, pixel_values, image_sizes, *args, return_dict=None, **kwargs):
        """As the parent's; a method that cuts image features marks those it leaves out."""
        get_features = partial(super().get_image_features, pixel_values, image_sizes, *args, **without_ours(kwargs))
        return self._reduce_image_features(get_features, image_sizes, return_dict)


class ShortVLlavaNextForConditionalGeneration(ShortVGenerationMixin, LlavaNextForConditionalGeneration):
    """[`LlavaNextForConditionalGeneration`] whose text model freezes visual tokens in `config.shortv_layers`."""

    config_class = ShortVLlavaNextConfig

    def __init__(self, config: ShortVLlavaNextConfig):
        super(LlavaNextForConditionalGeneration, self).__init__(config)
        self.model = ShortVLlavaNextModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


__all__ = [
    "ShortVLlavaForConditionalGeneration",
    "ShortVLlavaModel",
    "ShortVLlavaNextForConditionalGeneration",
    "ShortVLlavaNextModel",
]
