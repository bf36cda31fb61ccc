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

from .cache import KeptLayer, is_shortened
from .reduction import ImageReduction, Reduction, StreamReduction, TokenMap, is_dropped, last_row_attention
from .rows import Rows, Tokens, additive, mask_at, packed_sequences, within_window
from .upstream import (
    Attention,
    argument,
    find_cache,
    keep_deepstack,
    kind_of,
    mask_sizes,
    rotary_tables,
    seen_by,
    sliding_window,
)


@dataclass
class Plan:
    """Which tokens of a chunk are frozen, and where.

    Attributes:
        layers: ids of the layers that freeze visual tokens.
        visual: `[B, S]` bool, the tokens that hold features of images and videos.
        text: the tokens that a frozen layer computes; `None` until a pass with a stream has made it.
        reduction: the method that drops or merges tokens, if any.
        padding: `[B, S]`, 0 at padding; `None` if unknown.
        skip_padding: whether frozen layers leave padding out too.
        stream: the tokens that are left, in the pass of a `reduction` or on a cache that one has shortened.
    """

    layers: frozenset[int]
    visual: Tensor
    text: Rows | None = None
    reduction: Reduction | None = None
    padding: Tensor | None = None
    skip_padding: bool = False
    stream: "Stream | None" = None
    _shared: dict = field(default_factory=dict)  # what is equal in many layers, computed by the first that asks

    @classmethod
    def build(
        cls,
        layers: Iterable[int],
        visual: Tensor,
        attention_mask: Tensor | None = None,
        max_text_tokens: int | None = None,
    ) -> "Plan | None":
        """The plan that freezes the tokens where `visual` `[B, S]` is True; `None` if the chunk holds none.

        With a 2D `attention_mask` `[B, S]`, padding is left out like visual tokens are: a row without an image, padded
        to the length of one with, then costs little. Without one, or with a mask of another shape, padding counts as
        text, which costs time and changes no other token.

        `max_text_tokens` is an upper bound of T for callers that must not synchronise (compiled graphs).
        """
        text = ~visual
        if torch.is_tensor(attention_mask) and attention_mask.shape == visual.shape:
            text = text & attention_mask.to(device=text.device, dtype=torch.bool)
        if max_text_tokens is not None:
            return cls(frozenset(layers), visual, Rows.of(text, max_text_tokens))
        *counts, n_visual = torch.cat([text.sum(1), visual.sum()[None]]).tolist()
        if n_visual == 0:
            return None
        # Of a batch, not even where the counts agree: whether they do would decide which compiled graph fits.
        exact = len(counts) == 1 and counts[0] > 0
        # No query at all would need its own path through every kernel.
        return cls(frozenset(layers), visual, Rows.of(text, max(*counts, 1), exact))

    @classmethod
    def of_text(cls, n_layers: int, rows: int, tokens: int, device: torch.device | str = "cpu") -> "Plan":
        """The plan that freezes nothing: `tokens` text tokens in each of `rows` rows, which all layers compute by it."""
        index = torch.arange(tokens, device=device).expand(rows, -1)
        return cls(frozenset(range(n_layers)), torch.zeros_like(index, dtype=torch.bool), Rows(index))

    @classmethod
    def of_a_step(cls, tokens: Tensor) -> "Plan":
        """The plan of a chunk of text `[B, S]` or `[B, S, h]`, for a pass on a cache from which tokens were dropped."""
        return cls(frozenset(), torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device))

    @property
    def length(self) -> int:
        """S, read off a tensor: compiled graphs are specialised to an int, not to a shape."""
        return self.visual.shape[1]

    # In the text model

    def needs_stream(self, cache: Cache | None) -> bool:
        return self.reduction is not None or is_shortened(cache)

    def with_stream(self, states: Tensor, kwargs: dict) -> tuple["Plan", Tensor, dict]:
        """The plan for a pass with embeddings `states` `[B, S, h]`, and the inputs of the text model in that pass."""
        stream = Stream(self, states, kwargs)
        plan = replace(self, stream=stream, text=None, _shared={})
        return plan, stream.inputs_embeds, stream.text_arguments(kwargs)

    # In a layer

    def enter(self, attention: Attention, states: Tensor, kwargs: dict) -> tuple[Tensor, dict, Rows | None]:
        """A layer's states and keyword arguments in this pass, and the tokens that it computes: `None` for all."""
        layer = attention.layer_idx
        frozen = layer in self.layers
        if self.stream is None:
            return states, kwargs, self.text if frozen else None
        states = self.stream.enter(layer, states, kwargs)
        rows = self._text_in_stream(self.stream, layer) if frozen else None
        return states, self._stream_arguments(self.stream, attention, kwargs, rows), rows

    def _text_in_stream(self, stream: "Stream", layer: int) -> Rows | None:
        """The text tokens among those that the layer sees."""
        rows = stream.rows(layer)
        key = "text", rows is not None
        if key not in self._shared:
            visual, real = self.visual, None
            if rows is not None:
                visual, real = visual.to(rows.index.device).gather(1, rows.index), rows.valid
            elif self.skip_padding:
                real = stream.padding_mask
            plan = Plan.build(self.layers, visual, real)
            self._shared[key] = None if plan is None else plan.text
        return self._shared[key]

    def _stream_arguments(self, stream: "Stream", attention: Attention, kwargs: dict, rows: Rows | None) -> dict:
        layer = attention.layer_idx
        if layer not in stream.changed:  # all tokens, on a cache that holds all: upstream's arguments are right
            return kwargs
        kwargs = {**kwargs, "position_ids": None}  # with gaps, FlashAttention would take them for packed sequences
        kept = stream.rows(layer)
        if kept is not None:
            for name, tables in rotary_tables(kwargs).items():
                key = "stream", name, *kind_of(attention), tables[0].device
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


class Stream:
    """The tokens that are left in a pass, and what the layers' attention needs to know of them.

    Attributes:
        inputs_embeds: `[B, S, h]`, the text model's input: that of tokens which an image method left out is 0.
        first_layer: the first layer that sees fewer tokens; `None` if all see the same.
        keys: by layer, the tokens that its attention sees, where the cache keeps a record or the layer does not see all.
        changed: layers that see something else than upstream knows.
        scores: `[B, S]`, by which tokens were ranked.
    """

    def __init__(self, plan: Plan, inputs_embeds: Tensor, kwargs: dict):
        visual, reduction = plan.visual, plan.reduction
        self.batch_size, self.length = inputs_embeds.shape[:2]
        self.device = device = inputs_embeds.device
        self.inputs_embeds = inputs_embeds
        self.cache = find_cache(kwargs)
        self.attention_mask: Any = kwargs.get("attention_mask")
        self.position_ids: Tensor | None = kwargs.get("position_ids")
        self.past = 0 if self.cache is None else int(self.cache.get_seq_length())
        self.first_layer: int | None = None
        self.map: TokenMap | None = None
        self.kept: Rows | None = None
        self.keys: dict[int, Tokens] = {}
        self.changed: set[int] = set()
        self.scores: Tensor | None = None
        # for the attention that ranks tokens
        self._waiting: tuple[StreamReduction, Tensor, Tensor, Tensor, list[int]] | None = None
        self._histories: dict[int, Any] = {}
        given = self.attention_mask
        two_dimensional = given if torch.is_tensor(given) and given.ndim == 2 else None
        self.padding_mask = plan.padding if two_dimensional is None else two_dimensional[:, -self.length :]
        self.no_padding = self.attention_mask is None
        # Positions on a grid stay as they are; in a row, tokens that never reached the model leave no gap.
        self.renumbers = self.position_ids is None or self.position_ids.ndim == 2
        held = self.cache.layers[0] if is_shortened(self.cache) else None
        never_seen = held.never_seen if isinstance(held, KeptLayer) else None
        shift = None if never_seen is None else never_seen.to(device)[:, None]
        self.never_seen = never_seen
        if reduction is not None:
            self._refuse_packed_sequences()
            real = torch.ones(self.batch_size, self.length, dtype=torch.bool, device=device)
            if self.padding_mask is not None:
                real = self.padding_mask.to(device=device, dtype=torch.bool)
            if two_dimensional is not None:
                self.no_padding = bool((two_dimensional != 0).all())
            if isinstance(reduction, ImageReduction):
                shift = self._drop_marked(real, shift)
            elif isinstance(reduction, StreamReduction):
                self._plan_to_drop(reduction, visual.to(device) & real, real)
        slots = torch.arange(self.past, self.past + self.length, device=device).expand(self.batch_size, -1)
        self.chunk = Tokens(slots, slots if shift is None else slots - shift)
        self.has_gaps = shift is not None  # slots are not places
        if shift is not None:
            position_ids = slots[:1] if self.position_ids is None else self.position_ids
            self.position_ids = (position_ids - shift).clamp(min=0)

    # What leaves

    def _drop_marked(self, real: Tensor, shift: Tensor | None) -> Tensor | None:
        """Image features that the method left out: known before the first layer. Returns by how much each token's
        position is lower, `[B, S or 1]`."""
        marked = is_dropped(self.inputs_embeds)
        keep = real & ~marked
        *counts, n_marked = torch.cat([keep.sum(1), marked.sum()[None]]).tolist()
        if n_marked == 0:
            return shift
        self.inputs_embeds = self.inputs_embeds.masked_fill(marked[..., None], 0)
        self.first_layer = 0
        self._keep(keep, counts)
        if not self.renumbers:
            return shift
        before, total = marked.long().cumsum(1), marked.sum(1)
        self.never_seen = total if shift is None else total + shift[:, 0]
        return before if shift is None else before + shift

    def _plan_to_drop(self, reduction: StreamReduction, visual: Tensor, real: Tensor) -> None:
        """Tokens that leave in the middle of the stack: how many is known now, which ones perhaps later."""
        numbers, present = torch.stack([visual.sum(1), real.sum(1)]).tolist()
        left = [reduction.count(v) for v in numbers]
        if left == numbers:
            return
        self.first_layer = reduction.k
        counts = [n - v + stay for v, n, stay in zip(numbers, present, left, strict=True)]
        stay = torch.tensor(left, device=self.device)
        if not any(left):
            self._keep(real & ~visual, counts)
        elif reduction.needs_scores:
            self._waiting = reduction, visual, real, stay, counts
            # The last token of each row, padding aside, is the one that looks.
            last = torch.where(real, torch.arange(self.length, device=self.device), -1).amax(1, keepdim=True)
            self.last = Rows(last.clamp(min=0))
        else:
            self._reduce(reduction, None, visual, real, stay, counts)

    def _reduce(
        self,
        reduction: StreamReduction,
        scores: Tensor | None,
        visual: Tensor,
        real: Tensor,
        stay: Tensor,
        counts: list[int],
    ) -> None:
        self.map = reduction.reduce(scores, visual, stay)
        self._keep(self.map.kept & real, counts)

    def _keep(self, keep: Tensor, counts: list[int]) -> None:
        width = max(*counts, 1)
        self.kept = Rows.of(keep, width, exact=min(counts) == width)

    def _refuse_packed_sequences(self) -> None:
        if self.cache is None and self.attention_mask is None:
            if packed_sequences(self.position_ids, self.batch_size) is not None:
                raise ValueError("visual_reduction does not work with sequences packed into one row; use a batch")

    def looks_in(self, layer: int) -> bool:
        """Whether this layer's attention decides which tokens stay."""
        return self._waiting is not None and self.first_layer == layer + 1 and self.kept is None

    @torch.no_grad()
    def choose(self, attention: Attention, query: Tensor, key: Tensor, kwargs: dict) -> None:
        """Rank visual tokens by the attention of each row's last token in this layer. Only that row is computed.

        Args:
            query: `[B, heads, 1, d]`, of that token. key: `[B, kv_heads, K, d]`, that it attends to. kwargs: the attention's.

        Raises:
            ValueError: if the heads are spread over devices, each of which would choose for itself.
        """
        assert self._waiting is not None  # see `looks_in`
        reduction, visual, real, stay, counts = self._waiting
        if query.shape[1] != attention.config.num_attention_heads:
            raise ValueError(
                f"{reduction.method} does not work with tensor parallel attention: each device sees its own heads"
            )
        held = self.held(attention.layer_idx)
        keys = self.chunk if held is None else held.tokens
        mask = self._mask(self.chunk.at(self.last), keys, kwargs, sliding_window(attention), key.device)
        scores = last_row_attention(query[:, :, 0], key, mask, attention.scaling)[:, -self.length :]
        self.scores = scores.to(self.device)
        self._reduce(reduction, self.scores, visual, real, stay, counts)

    # What the text model and its layers see

    def text_arguments(self, kwargs: dict) -> dict:
        """The text model's keyword arguments in this pass."""
        kwargs = {**kwargs, "position_ids": self.position_ids}
        kept = self.rows(0)
        return kwargs if kept is None else keep_deepstack(kwargs, kept.index, kept.valid)

    def rows(self, layer: int) -> Rows | None:
        """The tokens of the chunk that a layer sees; `None` for all."""
        return self.kept if self.first_layer is not None and layer >= self.first_layer else None

    def sees(self, layer: int) -> tuple:
        """Equal for layers that see the same queries and keys."""
        return self.rows(layer) is not None, self._histories.get(layer)

    def enter(self, layer: int, states: Tensor, kwargs: dict) -> Tensor:
        """The states `[B, S or Q, h]` that a layer sees; brings its cache up to date."""
        if layer == self.first_layer:
            if self.map is not None:
                states = self.map.apply(states)
            assert self.kept is not None  # the layer before has chosen, if it was not known before
            states = self.kept.select(states)
        cache, rows = find_cache(kwargs), self.rows(layer)
        self.cache = cache  # the text model makes one where none was given
        tokens = self.chunk.to(states.device)
        tokens = tokens if rows is None else tokens.at(rows)
        if rows is not None:
            self.keys[layer] = tokens
            self.changed.add(layer)
        if cache is None:
            return states
        layers: Any = cache.layers
        if self.first_layer is not None:
            while len(layers) <= layer:  # a cache without a config grows as it is used
                layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]  # such a cache has one
        if layer >= len(layers):
            return states
        shortened_before = isinstance(layers[layer], KeptLayer)
        if self.first_layer is not None:
            layers[layer] = KeptLayer.of(layers[layer], self.past, self.batch_size, self.device)
        held = layers[layer]
        if not isinstance(held, KeptLayer):
            return states
        if layer == 0:
            held.never_seen = self.never_seen
        held.add(tokens, self.past + self.length, rows is not None, rows is not None and rows.valid is not None)
        self._histories[layer] = held.history
        self.keys[layer] = held.tokens.to(states.device)
        if shortened_before:
            self.changed.add(layer)
        return states

    def _given(self, kwargs: dict) -> Any:
        """The mask that the chunk came with; of models that make one for each kind of layer, this layer's."""
        return argument(kwargs, "attention_mask") if isinstance(self.attention_mask, dict) else self.attention_mask

    def mask(self, layer: int, window: int | None, kwargs: dict, rows: Rows | None, device: torch.device) -> Tensor:
        """What the layer's tokens, or `rows` of them, attend to: `[B, 1, Q or T, K]`."""
        queries = self.chunk.to(device)
        for part in (self.rows(layer), rows):
            queries = queries if part is None else queries.at(part)
        return self._mask(queries, self.keys[layer], kwargs, window, device)

    def _mask(self, queries: Tokens, keys: Tokens, kwargs: dict, window: int | None, device: torch.device) -> Tensor:
        given, first = self._given(kwargs), 0
        queries, keys = queries.to(device), keys.to(device)
        places = window if self.has_gaps and isinstance(self.attention_mask, dict) else None
        if places is not None:  # upstream's window is one of slots: one of places, within what is seen without any
            given = self.attention_mask.get("full_attention", given)
        if torch.is_tensor(given) and given.ndim == 4:  # that of a cache with a window starts behind what it has lost
            first = max(self.past + self.length - given.shape[-1], 0)
        mask = mask_at(given, queries, keys, past=self.past, first=first, window=window)
        return mask if places is None else within_window(mask, queries, keys, places)

    def stock_mask(self, attention: Attention, kwargs: dict) -> Tensor | None:
        """The mask that the stock attention needs; `None` where plain causal attention is right."""
        implementation, window, layer = (
            attention.config._attn_implementation,
            sliding_window(attention),
            attention.layer_idx,
        )
        flash = "flash" in implementation
        if not flash and implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"visual_reduction does not work with attn_implementation={implementation!r}; use sdpa, eager or "
                "flash_attention_2"
            )
        if flash and window is not None:
            raise ValueError("visual_reduction with a sliding window needs attn_implementation sdpa or eager")
        keys, rows = self.keys[layer], self.rows(layer)
        held = self.held(layer)
        fillers = (rows is not None and rows.valid is not None) or (held is not None and held.has_fillers)
        queries = self.length if rows is None else rows.index.shape[1]
        aligned = queries in (1, keys.slots.shape[1])
        if self.no_padding and not fillers and aligned and window is None and implementation != "eager":
            return None
        if flash:
            mask = keys.slots >= 0
            if self.attention_mask is not None:
                padding = self.attention_mask.to(device=mask.device, dtype=torch.bool)
                mask = mask & padding.gather(1, keys.slots.clamp(min=0))
            return mask
        mask = self.mask(layer, window, kwargs, None, keys.slots.device)
        return additive(mask, self.inputs_embeds.dtype) if implementation == "eager" else mask

    def held(self, layer: int) -> KeptLayer | None:
        """The layer of the cache, if it keeps a record."""
        layers = getattr(self.cache, "layers", ())
        return layers[layer] if layer < len(layers) and isinstance(layers[layer], KeptLayer) else None

    # What the caller sees

    def restore(self, output: Any) -> Any:
        """The text model's output with the caller's shapes: zeros where a token was dropped."""
        for layer in getattr(self.cache, "layers", ()):
            if isinstance(layer, KeptLayer):
                layer.check_stored()
        first = self.first_layer
        if first is not None:
            output.last_hidden_state = self._spread(output.last_hidden_state)
            if output.hidden_states is not None:
                states = output.hidden_states
                output.hidden_states = (*states[: first + 1], *map(self._spread, states[first + 1 : -1]))
                output.hidden_states += (output.last_hidden_state,)
        if output.attentions is not None:
            output.attentions = tuple(
                self._spread_attention(weights, layer) for layer, weights in enumerate(output.attentions)
            )
        return output

    def _spread(self, states: Tensor) -> Tensor:
        """`[B, Q, d]` → `[B, S, d]`."""
        assert self.kept is not None  # some layer sees fewer tokens
        return self.kept.spread(states, self.length)

    def _spread_attention(self, weights: Tensor | None, layer: int) -> Tensor | None:
        """`[B, heads, Q, K]` → `[B, heads, S, past + S]`."""
        if weights is None or layer not in self.keys:
            return weights
        key_slots = self.keys[layer].slots.to(weights.device)[:, None, None]
        weights = weights.masked_fill(key_slots < 0, 0)
        wide = weights.new_zeros(*weights.shape[:3], self.past + self.length)
        wide = wide.scatter_add(3, key_slots.clamp(min=0).expand_as(weights), weights)
        return wide if self.rows(layer) is None else self._spread(wide)
