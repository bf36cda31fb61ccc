"""The tokens that are left in a pass: which stages they leave at, and what the layers' attention needs to know of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import KeptLayer, is_shortened
from .reduction import (
    Reduction,
    StreamReduction,
    TokenMap,
    is_dropped,
    last_row_attention,
    log_sums,
    query_blocks,
)
from .rows import Rows, Tokens, additive, mask_at, packed_sequences, within_window
from .upstream import Attention, argument, find_cache, keep_deepstack, sliding_window
from .vision import notice
from .windows import Windows


@dataclass
class Stage:
    """Tokens leave, or are merged into others, at the input of `layer`.

    Attributes:
        counts: how many tokens of any kind each row has from there on.
        stay: `[1 + groups]` long, how many visual tokens of each group stay; `None` where that is known already.
        looks: whether the attention of the layer before has to choose.
        map: where the tokens of the stage before went.
        chosen: those that are left, of the tokens of the stage before.
        kept: the same, of the chunk.
    """

    layer: int
    counts: list[int]
    stay: Tensor | None = None
    looks: bool = False
    map: TokenMap | None = None
    chosen: Rows | None = None
    kept: Rows | None = None


class Stream:
    """The tokens that are left in a pass, and what the layers' attention needs to know of them.

    Attributes:
        inputs_embeds: `[B, S, h]`, the text model's input: that of tokens which left before it is 0.
        stages: where tokens leave, by ascending layer. Each layer sees those of the last stage before it.
        groups: `[B, S]` long, by which the reduction ranks visual tokens; 0 for those that it does not touch.
        keys: by layer, the tokens that its attention sees, where the cache keeps a record or the layer does not see all.
        changed: layers that see something else than upstream knows.
        scores: by layer that tokens left at, what they were ranked by, `[B, Q]`.
    """

    def __init__(
        self,
        visual: Tensor,
        reduction: Reduction | None,
        padding: Tensor | None,
        windows: Windows | None,
        inputs_embeds: Tensor,
        kwargs: dict,
    ):
        notice(self)
        self.batch_size, self.length = inputs_embeds.shape[:2]
        self.device = device = inputs_embeds.device
        self.inputs_embeds = inputs_embeds
        self.cache = find_cache(kwargs)
        self.attention_mask: Any = kwargs.get("attention_mask")
        self.position_ids: Tensor | None = kwargs.get("position_ids")
        self.past = 0 if self.cache is None else int(self.cache.get_seq_length())
        self.stages: list[Stage] = []
        self.groups: Tensor | None = None
        self.keys: dict[int, Tokens] = {}
        self.changed: set[int] = set()
        self.scores: dict[int, Tensor] = {}
        self._reduction = None if reduction is None else reduction.in_decoder
        self._histories: dict[int, Any] = {}
        given = self.attention_mask
        two_dimensional = given if torch.is_tensor(given) and given.ndim == 2 else None
        self.padding_mask = padding if two_dimensional is None else two_dimensional[:, -self.length :]
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
            if reduction.cuts_images:
                real, shift = self._drop_marked(real, shift)
            self._real = real
            if self._reduction is not None:
                left = visual.to(device) & real
                groups = windows.groups(real) if windows is not None else _row_numbers(left)
                self._plan_to_drop(self._reduction, groups)
        slots = torch.arange(self.past, self.past + self.length, device=device).expand(self.batch_size, -1)
        self.chunk = Tokens(slots, slots if shift is None else slots - shift)
        self.has_gaps = shift is not None  # slots are not places
        if shift is not None:
            position_ids = slots[:1] if self.position_ids is None else self.position_ids
            self.position_ids = (position_ids - shift).clamp(min=0)

    # What leaves

    def _drop_marked(self, real: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Image features that the method left out: known before the first layer. Returns the tokens that are left, `[B,
        S]` bool, and by how much each token's position is lower, `[B, S or 1]`."""
        marked = is_dropped(self.inputs_embeds)
        left = real & ~marked
        *counts, n_marked = torch.cat([left.sum(1), marked.sum()[None]]).tolist()
        if n_marked == 0:
            return real, shift
        self.inputs_embeds = self.inputs_embeds.masked_fill(marked[..., None], 0)
        stage = Stage(0, counts)
        self._keep(stage, left)
        self.stages.append(stage)
        if not self.renumbers:
            return left, shift
        before, total = marked.long().cumsum(1), marked.sum(1)
        self.never_seen = total if shift is None else total + shift[:, 0]
        return left, before if shift is None else before + shift

    def _plan_to_drop(self, reduction: StreamReduction, groups: Tensor) -> None:
        """Tokens that leave in the middle of the stack: how many is known now, which ones perhaps later."""
        self.groups = groups
        flat, n_groups = groups.flatten(), 1 + int(groups.amax())
        row = torch.arange(self.batch_size, device=self.device).repeat_interleave(self.length)
        none = torch.zeros(n_groups, dtype=torch.long, device=self.device)
        parts = none.scatter_add(0, flat, torch.ones_like(flat)), none.scatter(0, flat, row), self._real.sum(1)
        numbers = torch.cat(parts).tolist()
        sizes, row_of, counts = numbers[1:n_groups], numbers[n_groups + 1 : 2 * n_groups], numbers[2 * n_groups :]
        for layer in reduction.layers:
            left = [reduction.count(v) for v in sizes]
            if left == sizes:
                continue
            for number, v, stay in zip(row_of, sizes, left, strict=True):
                counts[number] -= v - stay
            looks = reduction.needs_scores and any(left)
            stage = Stage(layer, list(counts), torch.tensor([0, *left], device=self.device), looks)
            self.stages.append(stage)
            sizes = left

    def _reduce(self, stage: Stage, scores: Tensor | None) -> None:
        """Let the method say where the tokens go that are left before a stage; `scores` `[B, Q]`."""
        assert self._reduction is not None and stage.stay is not None  # others are kept at once
        groups, real = self._at(stage.layer - 1, self.groups), self._at(stage.layer - 1, self._real)
        stage.map = self._reduction.reduce(scores, groups, stage.stay)
        self._keep(stage, stage.map.kept & real)

    def _keep(self, stage: Stage, keep: Tensor) -> None:
        width = max(*stage.counts, 1)
        stage.chosen = Rows.of(keep, width, exact=min(stage.counts) == width)
        before = self.rows(stage.layer - 1)
        stage.kept = stage.chosen if before is None else before.at(stage.chosen)

    def _at(self, layer: int, values: Any) -> Tensor:
        """Of `[B, S]`, those of the tokens that a layer sees, `[B, Q]`; 0 at fillers."""
        rows = self.rows(layer)
        if rows is None:
            return values
        values = values.gather(1, rows.index)
        return values if rows.valid is None else values * rows.valid

    def _refuse_packed_sequences(self) -> None:
        if self.cache is None and self.attention_mask is None:
            if packed_sequences(self.position_ids, self.batch_size) is not None:
                raise ValueError("visual_reduction does not work with sequences packed into one row; use a batch")

    def looks_in(self, layer: int) -> bool:
        """Whether this layer's attention decides which tokens stay."""
        return self._chooses_after(layer) is not None

    def _chooses_after(self, layer: int) -> Stage | None:
        return next((s for s in self.stages if s.looks and s.layer == layer + 1 and s.kept is None), None)

    def lookers(self, layer: int) -> Rows:
        """The tokens, of those that the layer sees, whose queries are to be scored: the last of each row, padding aside,
        or the visual ones."""
        assert self._reduction is not None  # see `looks_in`
        if self._reduction.scores_own_queries:
            visual = self._at(layer, self.groups) > 0
            return Rows.of(visual, max(int(visual.sum(1).amax()), 1))
        real = self._at(layer, self._real)
        last = torch.where(real, torch.arange(real.shape[1], device=real.device), -1).amax(1, keepdim=True)
        return Rows(last.clamp(min=0))

    @torch.no_grad()
    def choose(self, attention: Attention, lookers: Rows, query: Tensor, key: Tensor, kwargs: dict) -> None:
        """Rank visual tokens by the attention of this layer. Only the rows of the `lookers` are computed.

        Args:
            query: `[B, heads, T, d]`, of the lookers. key: `[B, kv_heads, K, d]`, that they attend to. kwargs: those that
                the layer was called with.

        Raises:
            ValueError: if the heads are spread over devices, each of which would choose for itself.
        """
        layer = attention.layer_idx
        stage, reduction = self._chooses_after(layer), self._reduction
        assert stage is not None and reduction is not None  # see `looks_in`
        if query.shape[1] != attention.config.num_attention_heads:
            raise ValueError(
                f"{reduction.method} does not work with tensor parallel attention: each device sees its own heads"
            )
        held, rows = self.held(layer), self.rows(layer)
        chunk = self.chunk if rows is None else self.chunk.at(rows)
        keys, queries = chunk if held is None else held.tokens, chunk.at(lookers)
        n, window = chunk.slots.shape[1], sliding_window(attention)

        def mask(part: slice) -> Tensor:
            asked = Tokens(queries.slots[:, part], queries.places[:, part])
            return self._mask(asked, keys, kwargs, window, key.device)

        if reduction.scores_own_queries:
            sums = [log_sums(query[:, :, part], key, mask(part), attention.scaling) for part in query_blocks(query)]
            scores = torch.cat(sums, dim=1).to(self.device)
            scores = lookers.spread(scores[..., None], n)[..., 0]
        else:
            scores = last_row_attention(query[:, :, 0], key, mask(slice(0, 1)), attention.scaling)[:, -n:]
        self.scores[stage.layer] = scores.to(self.device)
        self._reduce(stage, self.scores[stage.layer])

    # What the text model and its layers see

    def text_arguments(self, kwargs: dict) -> dict:
        """The text model's keyword arguments in this pass."""
        kwargs = {**kwargs, "position_ids": self.position_ids}
        kept = self.rows(0)
        return kwargs if kept is None else keep_deepstack(kwargs, kept.index, kept.valid)

    def stage(self, layer: int) -> int:
        """How many stages lie before a layer. Equal for layers that see the same tokens of the chunk."""
        return sum(stage.layer <= layer for stage in self.stages)

    def rows(self, layer: int) -> Rows | None:
        """The tokens of the chunk that a layer sees; `None` for all."""
        number = self.stage(layer)
        return self.stages[number - 1].kept if number else None

    def sees(self, layer: int) -> tuple:
        """Equal for layers that see the same queries and keys."""
        return self.stage(layer), self._histories.get(layer)

    def enter(self, layer: int, states: Tensor, kwargs: dict) -> Tensor:
        """The states `[B, S or Q, h]` that a layer sees; brings its cache up to date."""
        for stage in self.stages:
            if stage.layer == layer:
                if stage.kept is None:
                    assert not stage.looks  # the layer before would have chosen
                    self._reduce(stage, None)
                assert stage.chosen is not None
                states = stage.chosen.select(
                    states if stage.map is None else stage.map.to(states.device).apply(states)
                )
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
        if self.stages:
            while len(layers) <= layer:  # a cache without a config grows as it is used
                layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]  # such a cache has one
        if layer >= len(layers):
            return states
        shortened_before = isinstance(layers[layer], KeptLayer)
        if self.stages:
            layers[layer] = KeptLayer.of(layers[layer], self.past, self.batch_size, self.device)
        held = layers[layer]
        if not isinstance(held, KeptLayer):
            return states
        if layer == 0:
            held.never_seen = self.never_seen
        held.add(tokens, self.past + self.length, self.stage(layer), rows is not None and rows.valid is not None)
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
        if self.stages:
            output.last_hidden_state = self._spread(output.last_hidden_state, self.stages[-1].layer)
            if output.hidden_states is not None:
                before = enumerate(output.hidden_states[:-1])  # what goes into a layer is what the one before has made
                spread = tuple(self._spread(states, layer - 1) for layer, states in before)
                output.hidden_states = (*spread, output.last_hidden_state)
        if output.attentions is not None:
            output.attentions = tuple(
                self._spread_attention(weights, layer) for layer, weights in enumerate(output.attentions)
            )
        return output

    def _spread(self, states: Tensor, layer: int) -> Tensor:
        """`[B, …, Q, d]` of the tokens that a layer sees → `[B, …, S, d]`."""
        rows = self.rows(layer)
        return states if rows is None else rows.spread(states, self.length)

    def _spread_attention(self, weights: Tensor | None, layer: int) -> Tensor | None:
        """`[B, heads, Q, K]` → `[B, heads, S, past + S]`."""
        if weights is None or layer not in self.keys:
            return weights
        key_slots = self.keys[layer].slots.to(weights.device)[:, None, None]
        weights = weights.masked_fill(key_slots < 0, 0)
        wide = weights.new_zeros(*weights.shape[:3], self.past + self.length)
        wide = wide.scatter_add(3, key_slots.clamp(min=0).expand_as(weights), weights)
        return self._spread(wide, layer)


def _row_numbers(visual: Tensor) -> Tensor:
    """`[B, S]` long: where `visual` is True, the number of the row, from 1 on; 0 elsewhere."""
    return torch.arange(1, len(visual) + 1, device=visual.device)[:, None] * visual
