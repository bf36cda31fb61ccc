"""Answers of a model about images: one at a time, compared with the dense model, or in a conversation with its cache.

Used by `shortv chat`. Works with every model this package loads: ShortV repos and original checkpoints.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils.hub import cached_file

from .cache import KeptLayer
from .images import to_rgb
from .model_card import is_hub_id
from .modeling_shortv import MODELS, apply_shortv
from .prompts import user_message
from .upstream import CACHE, visual_token_ids


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


def visual_mask(config: PretrainedConfig, input_ids: torch.Tensor) -> torch.Tensor:
    """Where `input_ids` hold placeholders of images and videos, bool of the same shape."""
    return torch.isin(input_ids, torch.tensor(list(visual_token_ids(config).values()), device=input_ids.device))


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
    try:
        if found(model) is not None or base is None or base == model:
            return AutoProcessor.from_pretrained(model)
        return AutoProcessor.from_pretrained(base, revision=config.base_model_revision)
    except (OSError, ValueError) as error:
        where = model if base is None or base == model else f"{model} or its base {base}"
        raise ValueError(f"no processor can be loaded from {where}: {' '.join(str(error).split())}") from error


def load(model: str, layers: list[int] | None = None, device: str = "auto", dtype: str = "auto", **config_fields):
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
    package = Path(__file__).parent
    for folder in (package / "demo", package.parent / "hub_configs" / "shortv-shapes-demo"):
        if (folder / "model.safetensors").is_file():
            return str(folder)
    raise ValueError("this installation lacks the demonstration model; name another one with --model")


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
            if isinstance(layer, KeptLayer):
                layer.check_stored()
    except (ValueError, RuntimeError):
        return False
    return [_lengths(layer) for layer in cache.layers] == lengths


TEXT_INPUTS = ("input_ids", "attention_mask")
ROW_PER_PICTURE = {"pixel_values", "image_sizes"}  # in families that need no more of a picture


@dataclass
class Conversation:
    """A chat that keeps its KV cache: a new turn computes its own tokens only."""

    model: PreTrainedModel
    processor: ProcessorMixin
    max_new_tokens: int = 256
    messages: list[dict] = field(default_factory=list)
    _images: list = field(default_factory=list)
    _ids: torch.Tensor | None = None  # of the conversation so far, its last answer included; `[1, n]`
    _cache: DynamicCache | None = None
    _rope_deltas: torch.Tensor | None = None  # of the Qwens: how far positions lag behind the tokens of the cache
    _was_cut: bool = False  # whether this turn took tokens off the cache that it began with

    @torch.inference_mode()
    def ask(self, prompt: str, images: list = (), on_text: Callable[[str], None] | None = None) -> Answer:
        """Ask the next question, about `images` (Pillow's) too if there are new ones. Greedy decoding.

        After an error or an interruption the conversation is as it was before this turn.

        Raises:
            ValueError: for new images in a later turn under a method that looks at the prompt's last token (FastV); a picture
                that has no RGB values (`images.to_rgb`); a prompt that is not valid UTF-8.
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
        within a layer), or of which this turn had cut tokens off, is given up, and with it what is known of its tokens:
        the next turn computes the whole prompt."""
        was_cut = self._was_cut
        vars(self).update(fields)
        if self._cache is not None and (was_cut or not _crop(self._cache, lengths)):
            self._ids, self._cache = None, None

    def _turn(self, prompt: str, images: list, on_text: Callable[[str], None] | None) -> Answer:
        messages = [*self.messages, user_message(prompt, images, self.processor)]
        reduction = self.model.model._active_reduction()
        if images and self.messages and reduction is not None and reduction.looks_at_last_token:
            raise ValueError(
                f"{reduction.method} chooses tokens at the end of a prompt; a new picture needs a new conversation"
            )
        self._was_cut = False
        n_known, self._images = len(self._images), [*self._images, *images]
        inputs = self._encode(messages)
        stream = _Stream(self.processor, on_text)
        pictures = self._new_pictures(inputs, n_known)
        n_cached = self._start() if pictures is None else self._resume(inputs["input_ids"])
        if n_cached and hasattr(self.model.model, "rope_deltas"):  # they can be of another conversation by now
            self.model.model.rope_deltas = self._rope_deltas
        if n_cached and pictures:  # a later image: `generate` would not hand it on
            chunk = {
                "input_ids": inputs["input_ids"][:, n_cached:-1],
                "attention_mask": inputs["attention_mask"][:, :-1],
            }
            self.model(**chunk, **pictures, **{CACHE: self._cache}, logits_to_keep=1)
        if n_cached:
            inputs = {name: inputs[name] for name in TEXT_INPUTS}
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
        self._ids, self._rope_deltas = output, getattr(self.model.model, "rope_deltas", None)
        return Answer(
            text=answer,
            token_ids=token_ids,
            time_to_first_token=stream.first_token,
            time_per_output_token=(total - stream.first_token) / (len(token_ids) - 1) if len(token_ids) > 1 else None,
            prompt_tokens=inputs["input_ids"].shape[1],
            visual_tokens=int(visual_mask(self.model.config, inputs["input_ids"]).sum()),
        )

    def _encode(self, messages: list[dict]) -> dict:
        """Model inputs for the whole conversation. The tokens of a text are not those of its parts one after the other, so
        it is always cut into tokens as a whole."""
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        options = {"images": self._images} if self._images else {}
        return self._to_model(self.processor(text=text, return_tensors="pt", **options))

    def _to_model(self, inputs) -> dict:
        inputs = dict(inputs.to(self.model.device))
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def _new_pictures(self, inputs: dict, n_known: int) -> dict | None:
        """Of the inputs of the whole prompt, those of the pictures behind the first `n_known`: `{}` if there are none.

        `None` if they cannot be told apart, or mean nothing without the pictures before: grids, types of tokens and
        numbers of tiles are those of whole prompts, and positions follow from them.
        """
        if n_known == len(self._images):
            return {}
        pictures = {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}
        if not pictures.keys() <= ROW_PER_PICTURE or any(len(each) != len(self._images) for each in pictures.values()):
            return None
        return {name: value[n_known:] for name, value in pictures.items()}

    def _start(self) -> int:
        """Begin with an empty cache; returns how many tokens it holds."""
        self._cache = DynamicCache(config=self.model.config)
        return 0

    def _resume(self, ids: torch.Tensor) -> int:
        """Make the cache hold a beginning of `ids` `[1, n]`, and return how long it is: what they have in common with the
        last turn, if that has all images of it; else nothing."""
        if self._ids is not None:
            n = min(self._cache.get_seq_length(), ids.shape[1] - 1)
            same = (self._ids[0, :n] == ids[0, :n]).long().cumprod(0)
            common = int(same.sum())
            if not visual_mask(self.model.config, self._ids[0, common:]).any():
                try:
                    if common < self._cache.get_seq_length():  # a template can rewrite, a text be cut otherwise
                        self._was_cut = True
                        self._cache.crop(common - self._cache.get_seq_length())
                    return common
                except (RuntimeError, ValueError):  # a sliding window or a reduction has dropped what would be needed
                    pass
        return self._start()


@torch.inference_mode()
def count_prefill_flops(model: PreTrainedModel, processor: ProcessorMixin, prompt: str, images: list = ()) -> int:
    """FLOPs of the language model's layers in one prefill, counted by `torch.utils.flop_counter`."""
    images = [to_rgb(image) for image in images]
    inputs = Conversation(model, processor, _images=images)._encode([user_message(prompt, images, processor)])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it cannot see fused CPU attention
        model.model(**inputs, use_cache=False)
    counts = counter.get_flop_counts()
    return sum(sum(counts[name].values()) for name in counts if name.endswith("language_model"))


MIN_ROUNDS, MAX_ROUNDS, MAX_SECONDS, SETTLED = 5, 40, 20.0, 0.1


def compare(model: PreTrainedModel, processor: ProcessorMixin, prompt: str, images: list, max_new_tokens: int) -> dict:
    """The same question to the dense model and to the model as it is set (ShortV layers, token reduction): answers,
    time to first token, counted FLOPs.

    The answers come first and warm up. Then the two are timed in turn, in rounds, until the quartiles of the speed-up
    (dense over ours within a round) are within a tenth of its median, for at most 40 rounds or 20 seconds.

    Returns:
        By "dense" and "shortv": `answer`, median `time_to_first_token_s`, `prefill_flops`, settings. Beside them
        `speed_up` (median), `speed_up_quartiles`, `rounds`, and whether they `settled`: a small model on a busy machine
        does not, and its speed-up says nothing.
    """
    variants = {"dense": ([], None), "shortv": model.settings}
    result, answers, times = {}, {}, {name: [] for name in variants}

    def ask(name, n_tokens):
        layers, reduction = variants[name]
        with model.using(shortv_layers=layers, visual_reduction=reduction):
            return Conversation(model, processor, n_tokens).ask(prompt, images)

    for name, (layers, reduction) in variants.items():
        answers[name] = ask(name, max_new_tokens)
        with model.using(shortv_layers=layers, visual_reduction=reduction):
            flops = count_prefill_flops(model, processor, prompt, images)
        settings = {"shortv_layers": list(layers), "visual_reduction": reduction}
        result[name] = {"answer": answers[name].text, "prefill_flops": flops, **settings}
    start, settled = time.perf_counter(), False
    while not settled and len(times["dense"]) < MAX_ROUNDS and time.perf_counter() - start < MAX_SECONDS:
        for name in variants:
            times[name].append(ask(name, 1).time_to_first_token)
        ratios = [dense / ours for dense, ours in zip(times["dense"], times["shortv"], strict=True)]
        if len(ratios) >= MIN_ROUNDS:
            low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
            settled = high - low <= SETTLED * median
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    for name in variants:
        result[name]["time_to_first_token_s"] = statistics.median(times[name])
    result |= {"speed_up": median, "speed_up_quartiles": [low, high], "rounds": len(ratios), "settled": settled}
    last = answers["shortv"]
    result["prompt_tokens"], result["visual_tokens"] = last.prompt_tokens, last.visual_tokens
    result["answers_agree"] = answers["dense"].token_ids == last.token_ids
    return result
