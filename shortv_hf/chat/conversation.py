"""A conversation with a model about images and videos, on one cache. Works with ShortV repos and original checkpoints."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache, ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from ..cache import KeptLayer
from ..data.images import to_rgb
from ..data.inputs import encode_messages, to_device, visual_mask
from ..data.prompts import user_message
from ..data.video import Video
from ..upstream import CACHE


class _Stream(BaseStreamer):
    """Times the first token and hands new text to `on_text`."""

    def __init__(self, processor: ProcessorMixin, on_text: Callable[[str], None] | None):
        self.processor, self.on_text = processor, on_text
        self.tokens: list[int] = []
        self.printed, self.prompt_seen = "", False
        self.start = time.perf_counter()
        self.first_token: float | None = None

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
    layers: list[Any] = cache.layers  # of several classes
    try:
        for layer, before in zip(layers, lengths, strict=True):
            added = layer.get_seq_length() - before[0]
            if added:
                layer.crop(-added)
            if isinstance(layer, KeptLayer):
                layer.check_stored()
    except (ValueError, RuntimeError):
        return False
    return [_lengths(layer) for layer in layers] == lengths


TEXT_INPUTS = ("input_ids", "attention_mask")
ROW_PER_PICTURE = {"pixel_values", "image_sizes"}  # in families that need no more of a picture


@dataclass
class Conversation:
    """A chat that keeps its KV cache: a new turn computes its own tokens only."""

    model: Any
    processor: ProcessorMixin
    max_new_tokens: int = 256
    messages: list[dict] = field(default_factory=list)
    _images: list = field(default_factory=list)
    _videos: list = field(default_factory=list)
    _ids: torch.Tensor | None = None  # of the conversation so far, its last answer included; `[1, n]`
    _cache: DynamicCache | None = None
    _rope_deltas: torch.Tensor | None = None  # of the Qwens: how far positions lag behind the tokens of the cache
    _was_cut: bool = False  # whether this turn took tokens off the cache that it began with

    @torch.inference_mode()
    def ask(
        self,
        prompt: str,
        images: Sequence[Image.Image] = (),
        on_text: Callable[[str], None] | None = None,
        videos: Sequence[Video] = (),
    ) -> Answer:
        """Ask the next question, about `images` (Pillow's) and `videos` too if there are new ones. Greedy decoding.

        After an error or an interruption the conversation is as it was before this turn.

        Raises:
            ValueError: for new images in a later turn under a method that looks at the prompt's last token (FastV); a picture
                that has no RGB values (`images.to_rgb`); a prompt that is not valid UTF-8.
        """
        before = self._state()
        try:
            return self._turn(prompt, [to_rgb(image) for image in images], list(videos), on_text)
        except BaseException:
            self._restore(*before)
            raise

    def forget_cache(self) -> None:
        """The next turn computes the whole prompt: for other settings of the model, or to give memory back."""
        self._ids, self._cache = None, None

    def cache_bytes(self) -> int:
        """Of the keys and values that the cache holds."""
        layers: list[Any] = [] if self._cache is None else self._cache.layers  # of several classes
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized)

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
            self.forget_cache()

    def _turn(self, prompt: str, images: list, videos: list, on_text: Callable[[str], None] | None) -> Answer:
        messages = [*self.messages, user_message(prompt, images, self.processor, videos)]
        reduction = self.model.model._active_reduction()
        if (images or videos) and self.messages and reduction is not None and reduction.looks_at_last_token:
            raise ValueError(
                f"{reduction.method} chooses tokens at the end of a prompt; a new picture needs a new conversation"
            )
        self._was_cut = False
        n_known = len(self._images)
        self._images, self._videos = [*self._images, *images], [*self._videos, *videos]
        inputs = self._encode(messages)
        stream = _Stream(self.processor, on_text)
        pictures = None if videos else self._new_pictures(inputs, n_known)
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
        assert stream.first_token is not None  # `generate` makes a token at least
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
        return to_device(self.model, encode_messages(messages, self.processor, self._images, self._videos))

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
        if self._ids is not None and self._cache is not None:
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
