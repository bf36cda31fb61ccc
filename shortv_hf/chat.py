"""Answers of a model about images: one at a time, compared with the dense model, or in a conversation with its cache.

Used by `shortv chat`. Works with every model this package loads: ShortV repos and original LLaVA checkpoints.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor, DynamicCache, PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from .configuration_shortv import ShortVLlavaConfig, ShortVLlavaNextConfig
from .images import to_rgb
from .modeling_shortv import ShortVLlavaForConditionalGeneration, ShortVLlavaNextForConditionalGeneration
from .prompts import user_message
from .upstream import CACHE
from .visual_cache import ReducedLayer
from .visual_reduction import FastV


MODEL_CLASSES = (
    (ShortVLlavaConfig, ShortVLlavaForConditionalGeneration),
    (ShortVLlavaNextConfig, ShortVLlavaNextForConditionalGeneration),
)


def model_classes(model: str, **hub_kwargs) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """Config and model class for a ShortV repo or an original checkpoint (Hub id or directory); loads no weights.

    Raises:
        ValueError: if it is neither LLaVA-1.5 nor LLaVA-NeXT.
        OSError: if it cannot be found.
    """
    if str(model).startswith(("/", ".", "~")) and not Path(model).expanduser().exists():
        raise ValueError(f"no such directory: {model}")
    model_type = PretrainedConfig.get_config_dict(model, **hub_kwargs)[0].get("model_type")
    for config_class, model_class in MODEL_CLASSES:
        if model_type in (config_class.model_type, config_class.base_model_type):
            return config_class, model_class
    raise ValueError(f"{model} has model_type {model_type!r}; ShortV supports LLaVA-1.5 and LLaVA-NeXT")


def load(model: str, layers: list[int] | None = None, device: str = "cpu", dtype: str = "auto", **config_fields):
    """Model and processor, ready to answer.

    Args:
        model: Hub id or directory.
        layers: frozen layers instead of the config's.
        device: a torch device, or "auto" to spread the model over what there is.
        dtype: name of a torch dtype, or "auto" for the checkpoint's.
        config_fields: other fields instead of the config's, such as `visual_reduction`.

    Raises:
        ValueError, OSError: as `from_pretrained`, and for an unknown dtype or device.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}; use auto, float32, bfloat16 or float16")
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    _, model_class = model_classes(model)
    processor = AutoProcessor.from_pretrained(model)  # before the weights: it is what a directory may lack
    if layers is not None:
        config_fields["shortv_layers"] = layers
    loaded = model_class.from_pretrained(model, dtype=dtype, device_map=device, **config_fields)
    return loaded.eval(), processor


def demo_model() -> str:
    """The directory of the demonstration model that this repository carries, also in an installed package.

    Raises:
        ValueError: if the installation lacks it.
    """
    package = Path(__file__).parent
    for folder in (package / "demo", package.parent / "hub_configs" / "shortv-shapes-demo"):
        if (folder / "model.safetensors").is_file():
            return str(folder)
    raise ValueError("this installation lacks the demonstration model; name another one with --model")


@contextmanager
def frozen_layers(model: PreTrainedModel, layers: list[int]) -> Iterator[PreTrainedModel]:
    """The model with other frozen layers, for a while."""
    before = model.config.shortv_layers
    model.set_shortv_layers(layers)
    try:
        yield model
    finally:
        model.set_shortv_layers(before)


@contextmanager
def token_reduction(model: PreTrainedModel, options: dict | None) -> Iterator[PreTrainedModel]:
    """The model with another `visual_reduction`, for a while."""
    before = model.config.visual_reduction
    model.set_visual_reduction(options)
    try:
        yield model
    finally:
        model.set_visual_reduction(before)


class _Stream(BaseStreamer):
    """Times the first token and hands new text to `on_text`."""

    def __init__(self, processor: ProcessorMixin, on_text: Callable[[str], None] | None):
        self.processor, self.on_text = processor, on_text
        self.tokens, self.printed, self.prompt_seen = [], "", False
        self.start, self.first_token = time.perf_counter(), None

    def put(self, value):
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        if self.first_token is None:
            self.first_token = time.perf_counter() - self.start
        self.tokens += value.flatten().tolist()
        if self.on_text is not None:
            text = self.processor.decode(self.tokens, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # half of a character
                self.on_text(text[len(self.printed) :])
                self.printed = text

    def end(self):
        pass


@dataclass
class Answer:
    """What the model said.

    Attributes:
        text: the answer.
        token_ids: its tokens.
        time_to_first_token: seconds, vision tower and prefill included.
        time_per_output_token: seconds per token after the first; `None` for one token.
        prompt_tokens: length of the prompt, visual tokens included.
        visual_tokens: how many of them hold image features.
    """

    text: str
    token_ids: list[int]
    time_to_first_token: float
    time_per_output_token: float | None
    prompt_tokens: int
    visual_tokens: int


def _lengths(layer) -> tuple[int, ...]:
    """Of a cache's layer: tokens seen, keys and values held."""
    if not layer.is_initialized:
        return 0, 0, 0
    return layer.get_seq_length(), layer.keys.shape[-2], layer.values.shape[-2]


def _crop(cache: DynamicCache, lengths: list[tuple[int, ...]]) -> bool:
    """Take off what was added to the layers of a cache since they had these `lengths`. Returns whether that worked."""
    try:
        for layer, before in zip(cache.layers, lengths, strict=True):
            added = layer.get_seq_length() - before[0]
            if added:
                layer.crop(-added)
            if isinstance(layer, ReducedLayer):
                layer.check_stored()
    except (ValueError, RuntimeError):
        return False
    return [_lengths(layer) for layer in cache.layers] == lengths


@dataclass
class Conversation:
    """A chat that keeps its KV cache: a new turn computes its own tokens only."""

    model: PreTrainedModel
    processor: ProcessorMixin
    max_new_tokens: int = 256
    messages: list[dict] = field(default_factory=list)
    _images: list = field(default_factory=list)
    _text: str = ""
    _ids: torch.Tensor | None = None
    _cache: DynamicCache | None = None

    @torch.inference_mode()
    def ask(self, prompt: str, images: list = (), on_text: Callable[[str], None] | None = None) -> Answer:
        """Ask the next question, about `images` (Pillow's) too if there are new ones. Greedy decoding.

        After an error or an interruption the conversation is as it was before this turn.

        Raises:
            ValueError: for new images in a later turn while FastV is on; a picture that has no RGB values
                (`images.to_rgb`); a prompt that is not valid UTF-8.
        """
        before = self._state()
        try:
            return self._turn(prompt, [to_rgb(image) for image in images], on_text)
        except BaseException:
            self._restore(*before)
            raise

    def _state(self) -> tuple[dict, list[tuple[int, ...]]]:
        """What a turn may change: the fields, and the lengths of the cache's layers."""
        fields = {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}
        return fields, [] if self._cache is None else [_lengths(layer) for layer in self._cache.layers]

    def _restore(self, fields: dict, lengths: list[tuple[int, ...]]):
        """Back to a state. A cache that cannot be cropped (a window has slid on, tokens were dropped, the turn broke off
        within a layer) is given up, and with it what is known of its tokens: the next turn computes the whole prompt."""
        vars(self).update(fields)
        if self._cache is not None and not _crop(self._cache, lengths):
            self._text, self._ids, self._cache = "", None, None

    def _turn(self, prompt: str, images: list, on_text: Callable[[str], None] | None) -> Answer:
        messages = [*self.messages, user_message(prompt, images, self.processor)]
        if images and self.messages and isinstance(self.model.model._active_reduction(), FastV):
            raise ValueError("fastv chooses tokens at the end of a prompt; a new picture needs a new conversation")
        self._images += images
        inputs = self._encode(messages, images)
        stream = _Stream(self.processor, on_text)
        n_cached = self._cache.get_seq_length()
        new = inputs["input_ids"][:, n_cached:]
        if n_cached and "pixel_values" in inputs:  # a later image: `generate` would not hand it on
            chunk = {**inputs, "input_ids": new[:, :-1], "attention_mask": inputs["attention_mask"][:, :-1]}
            self.model(**chunk, **{CACHE: self._cache}, logits_to_keep=1)
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        output = self.model.generate(
            **inputs,
            **{CACHE: self._cache},
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            streamer=stream,
        )
        total = time.perf_counter() - stream.start
        token_ids = stream.tokens
        answer = self.processor.decode(token_ids, skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        # The end token is the template's to write. The answer's last token is known, but not in the cache yet.
        end = self.model.generation_config.eos_token_id
        ended = token_ids[-1] in (end if isinstance(end, list) else [end])
        self._ids = output[:, :-1] if ended else output
        # What the template makes of the conversation up to the end of this answer
        text = self.processor.apply_chat_template(self.messages, add_generation_prompt=False)
        self._text = text[: text.rindex(answer) + len(answer)]
        if not answer:
            self._text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return Answer(
            text=answer,
            token_ids=token_ids,
            time_to_first_token=stream.first_token,
            time_per_output_token=(total - stream.first_token) / (len(token_ids) - 1) if len(token_ids) > 1 else None,
            prompt_tokens=inputs["input_ids"].shape[1],
            visual_tokens=int((inputs["input_ids"] == self.model.config.image_token_id).sum()),
        )

    def _encode(self, messages: list[dict], images: list) -> dict:
        """Model inputs for the whole conversation. Tokens that are in the cache are not made again: the answer's text
        can be cut into other tokens than the model chose. Pixels are those of new images, with the cache they go on."""
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        known = self._ids if self._ids is not None and text.startswith(self._text) else None
        if known is None:  # the first turn, or a template that rewrites earlier ones
            self._cache, images = DynamicCache(config=self.model.config), self._images or images
        else:
            text = text[len(self._text) :]
        options = {"images": images} if images else {}
        if known is not None:
            options["add_special_tokens"] = False
        inputs = dict(self.processor(text=text, return_tensors="pt", **options).to(self.model.device))
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        if known is not None:
            inputs["input_ids"] = torch.cat([known, inputs["input_ids"]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return inputs


@torch.inference_mode()
def count_prefill_flops(model: PreTrainedModel, processor: ProcessorMixin, prompt: str, images: list = ()) -> int:
    """FLOPs of the language model's layers in one prefill, counted by `torch.utils.flop_counter`."""
    images = [to_rgb(image) for image in images]
    inputs = Conversation(model, processor)._encode([user_message(prompt, images, processor)], images)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it cannot see fused CPU attention
        model.model(**inputs, use_cache=False)
    counts = counter.get_flop_counts()
    return sum(sum(counts[name].values()) for name in counts if name.endswith("language_model"))


def compare(
    model: PreTrainedModel, processor: ProcessorMixin, prompt: str, images: list, max_new_tokens: int, repeats: int = 3
) -> dict:
    """The same question to the dense model and to the model as it is set (ShortV layers, token reduction): answers, median
    time to first token, counted FLOPs.

    The two are asked in turn, `repeats` times each after one round that warms up.
    """
    variants = {"dense": ([], None), "shortv": (list(model.config.shortv_layers), model.config.visual_reduction)}
    answers = {name: [] for name in variants}
    for _ in range(repeats + 1):
        for name, (layers, reduction) in variants.items():
            with frozen_layers(model, layers), token_reduction(model, reduction):
                answers[name].append(Conversation(model, processor, max_new_tokens).ask(prompt, images))
    result = {}
    for name, (layers, reduction) in variants.items():
        times = sorted(answer.time_to_first_token for answer in answers[name][1:])
        with frozen_layers(model, layers), token_reduction(model, reduction):
            flops = count_prefill_flops(model, processor, prompt, images)
        result[name] = {
            "answer": answers[name][-1].text,
            "time_to_first_token_s": times[len(times) // 2],
            "prefill_flops": flops,
            "shortv_layers": layers,
            "visual_reduction": reduction,
        }
    last = answers["shortv"][-1]
    result["prompt_tokens"], result["visual_tokens"] = last.prompt_tokens, last.visual_tokens
    result["answers_agree"] = answers["dense"][-1].token_ids == last.token_ids
    return result
