"""One forward pass of the text model: which tokens are in the stream, and which of them each layer computes.

*Frozen*: in the stream, not computed. *Dropped*: not in the stream. *Merged*: the stream changes, with weights. Padding
that is skipped is frozen too.

A [`Plan`] is made once per pass and handed to the layers as `plan`. Freezing alone costs one host synchronisation (the
number of text tokens decides the shapes); the layers then read the plan without any. Shapes: B rows, S tokens in the
chunk, Q of them left in the stream, T computed in a frozen layer, K keys.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .cache import is_shortened
from .configuration_shortv import frozen_updates
from .reduction import Reduction
from .rows import Rows, Tokens, additive, mask_at, packed_sequences
from .stream import Stream
from .upstream import Attention, argument, find_cache, kind_of, mask_sizes, rotary_tables, seen_by, sliding_window
from .windows import Windows


@dataclass
class Plan:
    """Which tokens of a chunk are frozen, and where.

    Attributes:
        attention: ids of the layers whose attention leaves visual tokens as they are.
        ffn: of those whose FFN does. A layer in both is frozen.
        visual: `[B, S]` bool, the tokens that hold features of images and videos.
        text: the tokens that a frozen layer computes; `None` until a pass with a stream has made it.
        reduction: the method that drops or merges tokens, if any.
        padding: `[B, S]`, 0 at padding; `None` if unknown.
        skip_padding: whether frozen layers leave padding out too.
        windows: the images that the visual tokens are of, where the method asks.
        stream: the tokens that are left, in the pass of a `reduction` or on a cache that one has shortened.
    """

    attention: frozenset[int]
    ffn: frozenset[int]
    visual: Tensor
    text: Rows | None = None
    reduction: Reduction | None = None
    padding: Tensor | None = None
    skip_padding: bool = False
    windows: Windows | None = None
    stream: Stream | None = None
    _shared: dict = field(default_factory=dict)  # what is equal in many layers, computed by the first that asks

    @classmethod
    def build(
        cls,
        layers: Iterable[int | str],
        visual: Tensor,
        attention_mask: Tensor | None = None,
        max_text_tokens: int | None = None,
    ) -> "Plan | None":
        """The plan that freezes the tokens where `visual` `[B, S]` is True, in `layers` or parts of them (the config's
        `shortv_layers`); `None` if the chunk holds none.

        With a 2D `attention_mask` `[B, S]`, padding is left out like visual tokens are: a row without an image, padded
        to the length of one with, then costs little. Without one, or with a mask of another shape, padding counts as
        text, which costs time and changes no other token.

        `max_text_tokens` is an upper bound of T for callers that must not synchronise (compiled graphs).
        """
        text = ~visual
        if torch.is_tensor(attention_mask) and attention_mask.shape == visual.shape:
            text = text & attention_mask.to(device=text.device, dtype=torch.bool)
        if max_text_tokens is not None:
            return cls(*frozen_updates(layers), visual, Rows.of(text, max_text_tokens))
        *counts, n_visual = torch.cat([text.sum(1), visual.sum()[None]]).tolist()
        if n_visual == 0:
            return None
        # Of a batch, not even where the counts agree: whether they do would decide which compiled graph fits.
        exact = len(counts) == 1 and counts[0] > 0
        # No query at all would need its own path through every kernel.
        return cls(*frozen_updates(layers), visual, Rows.of(text, max(*counts, 1), exact))

    @classmethod
    def of_text(cls, n_layers: int, rows: int, tokens: int, part: str = "") -> "Plan":
        """The plan that freezes nothing: `tokens` text tokens in each of `rows` rows, which all layers compute by it, or
        their `part` ("self_attn" or "mlp") alone."""
        index = torch.arange(tokens).expand(rows, -1)
        layers = [f"{layer}.{part}" if part else layer for layer in range(n_layers)]
        return cls(*frozen_updates(layers), torch.zeros_like(index, dtype=torch.bool), Rows(index))

    @classmethod
    def of_a_step(cls, tokens: Tensor) -> "Plan":
        """The plan of a chunk of text `[B, S]` or `[B, S, h]`, for a pass on a cache from which tokens were dropped."""
        return cls(frozenset(), frozenset(), torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device))

    @property
    def length(self) -> int:
        """S, read off a tensor: compiled graphs are specialised to an int, not to a shape."""
        return self.visual.shape[1]

    # In the text model

    def needs_stream(self, cache: Cache | None) -> bool:
        return self.reduction is not None or is_shortened(cache)

    def with_stream(self, states: Tensor, kwargs: dict) -> tuple["Plan", Tensor, dict]:
        """The plan for a pass with embeddings `states` `[B, S, h]`, and the inputs of the text model in that pass."""
        stream = Stream(self.visual, self.reduction, self.padding, self.windows, states, kwargs)
        plan = replace(self, stream=stream, text=None, _shared={})
        return plan, stream.inputs_embeds, stream.text_arguments(kwargs)

    # In a layer

    def enter(
        self, attention: Attention, states: Tensor, kwargs: dict
    ) -> tuple[Tensor, dict, Rows | None, Rows | None]:
        """A layer's states and keyword arguments in this pass, and the tokens that its attention and its FFN compute: each
        `None` for all."""
        layer = attention.layer_idx
        frozen = layer in self.attention, layer in self.ffn
        if self.stream is not None:
            states = self.stream.enter(layer, states, kwargs)
        text = self._text(layer) if any(frozen) else None
        attending, feeding = (text if each else None for each in frozen)
        if self.stream is not None:
            kwargs = self._stream_arguments(self.stream, attention, kwargs, attending)
        return states, kwargs, attending, feeding

    def _text(self, layer: int) -> Rows | None:
        return self.text if self.stream is None else self._text_in_stream(self.stream, layer)

    def _text_in_stream(self, stream: Stream, layer: int) -> Rows | None:
        """The text tokens among those that the layer sees."""
        rows = stream.rows(layer)
        key = "text", stream.stage(layer)
        if key not in self._shared:
            visual, real = self.visual, None
            if rows is not None:
                visual, real = visual.to(rows.index.device).gather(1, rows.index), rows.valid
            elif self.skip_padding:
                real = stream.padding_mask
            plan = Plan.build((), visual, real)
            self._shared[key] = None if plan is None else plan.text
        return self._shared[key]

    def _stream_arguments(self, stream: Stream, attention: Attention, kwargs: dict, rows: Rows | None) -> dict:
        layer = attention.layer_idx
        if layer not in stream.changed:  # all tokens, on a cache that holds all: upstream's arguments are right
            return kwargs
        kwargs = {**kwargs, "position_ids": None}  # with gaps, FlashAttention would take them for packed sequences
        kept = stream.rows(layer)
        if kept is not None:
            for name, tables in rotary_tables(kwargs).items():
                key = "stream", name, stream.stage(layer), *kind_of(attention), tables[0].device
                kwargs[name] = self._share(key, partial(_rows_of_tables, kept, tables))
        if rows is None:
            key = "stream mask", *kind_of(attention), *stream.sees(layer), stream.keys[layer].slots.device
            kwargs["attention_mask"] = self._share(key, lambda: stream.stock_mask(attention, kwargs))
        return kwargs

    def _share(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    # In the attention of a frozen layer

    def rotary(self, attention: Attention, rows: Rows, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin of the tokens that are computed. Some models have other tables in layers with a window."""
        sees = () if self.stream is None else self.stream.sees(attention.layer_idx)
        key = "rotary", *kind_of(attention), *sees, tables[0].device
        return self._share(key, partial(_rows_of_tables, rows, tables))

    def mask(self, attention: Attention, rows: Rows, kwargs: dict, states: Tensor) -> Tensor:
        """What those tokens attend to, `[B, 1, T, K]`: bool, or additive for eager and for a custom additive mask. To
        be called before the cache is updated. `states` `[B, S or Q, h]` are all tokens of the layer."""
        sees = () if self.stream is None else self.stream.sees(attention.layer_idx)
        key = "mask", *kind_of(attention), *sees, states.device
        return self._share(key, lambda: self._mask(attention, rows, kwargs, states))

    def _mask(self, attention: Attention, rows: Rows, kwargs: dict, states: Tensor) -> Tensor:
        layer, window, device = attention.layer_idx, sliding_window(attention), states.device
        implementation = attention.config._attn_implementation
        if self.stream is not None and layer in self.stream.keys:
            mask = self.stream.mask(layer, window, kwargs, rows, device)
        else:
            cache, given = find_cache(kwargs), argument(kwargs, "attention_mask")
            past: int | Tensor = 0
            packed: Tensor | None = None
            n_keys, first = mask_sizes(cache, layer, self.length, kwargs, device)
            if (torch.is_tensor(given) and given.ndim == 4) or hasattr(given, "mask_mod"):
                first = 0  # it speaks of the chunk's tokens and of the keys by number
            else:
                past = seen_by(cache, layer)
                if given is None and cache is None and implementation != "sdpa":
                    packed = packed_sequences(kwargs.get("position_ids"), len(states))
            queries = Tokens.range(past, self.length, device).at(rows)
            keys = Tokens.range(first, n_keys, device)
            mask = mask_at(given, queries, keys, past=past, every_key=True, window=window, packed=packed)
        return additive(mask, states.dtype) if implementation == "eager" else mask


def _rows_of_tables(rows: Rows, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = tables
    return rows.select(cos), rows.select(sin)
