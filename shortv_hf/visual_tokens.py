"""The surgery on the decoder, shared by all reduction methods: tokens leave between layers, the rest goes on.

Shapes: B rows, S tokens in the chunk, Q of them in the layers after the reduction (rows that keep fewer are filled up
with tokens that nobody attends to), K keys. A *slot* is a token's place before anything was dropped (`visual_cache.py`).
"""

from dataclasses import dataclass, replace

import torch
from transformers.masking_utils import find_packed_sequence_indices
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .freeze_plan import FreezePlan, sliding_window
from .reduction import ImageReduction, Reduction, is_dropped, last_row_attention
from .upstream import argument, cache_name, find_cache, not_right
from .visual_cache import KeyRecorder, ReducedLayer, is_reduced


@dataclass
class VisualTokens:
    """What the multimodal model tells its text model about a chunk: `mask` `[B, S]`, True at visual tokens; the
    reduction; the ShortV layers, and whether they skip padding."""

    mask: torch.Tensor
    reduction: Reduction
    shortv_layers: list[int]
    skip_padding: bool


class TokenReduction:
    """One forward pass of the text model in which tokens are dropped, or whose cache lacks tokens dropped earlier.

    The text model (`modeling_shortv.py`) makes it, replaces its inputs by `inputs_embeds` and `position_ids`, and lets its layers `enter` it;
    afterwards it `restore`s the outputs. FastV's choice is made on the way, by `choose` in layer `first_layer - 1`.
    """

    def __init__(self, visual: VisualTokens | None, inputs_embeds, attention_mask, position_ids, cache):
        self.batch_size, self.length = inputs_embeds.shape[:2]
        self.visual, self.attention_mask, self.inputs_embeds = visual, attention_mask, inputs_embeds
        self.cache = cache
        self.past = 0 if cache is None else int(cache.get_seq_length())
        self.first_layer = None  # the first that sees fewer tokens; None if all see the same
        self.positions = self.valid = self.counts = None  # of the kept tokens in the chunk: [B, Q], [B, Q] or None
        self.no_padding = attention_mask is None
        self._shared, self._layer_keys = {}, {}  # the latter: slots and places of each layer's keys
        device = inputs_embeds.device
        # Tokens that never reached the model leave no gap in the positions.
        first = cache.layers[0] if is_reduced(cache) else None
        renumber = isinstance(first, ReducedLayer)
        self.dropped_images = torch.zeros(self.batch_size, dtype=torch.long, device=device)
        if renumber:
            self.dropped_images = first.dropped_images.to(device)
        shift = self.dropped_images[:, None]
        if visual is not None:
            self._refuse_packed_sequences(position_ids, cache)
            real = torch.ones(self.batch_size, self.length, dtype=torch.bool, device=device)
            if attention_mask is not None and attention_mask.ndim == 2:
                real = attention_mask[:, -self.length :].to(device=device, dtype=torch.bool)
                self.no_padding = bool((attention_mask != 0).all())
            if isinstance(visual.reduction, ImageReduction):
                marked = self._drop_marked(real)
                if marked is not None:
                    renumber, shift = True, shift + marked.long().cumsum(1)
            else:
                self._plan_to_drop(real)
        if renumber:
            if position_ids is None:
                position_ids = torch.arange(self.past, self.past + self.length, device=device)[None]
            position_ids = (position_ids - shift).clamp(min=0)
        self.position_ids = position_ids
        self._places = torch.arange(self.past, self.past + self.length, device=device) - shift  # [B, S]

    # What is dropped

    def _drop_marked(self, real):
        """Image features that the method left out: known before the first layer. Returns their mask `[B, S]`, or
        `None` if there are none."""
        marked = is_dropped(self.inputs_embeds)
        keep = real & ~marked
        *counts, n_marked = torch.cat([keep.sum(1), marked.sum()[None]]).tolist()
        if n_marked == 0:
            return None
        self.inputs_embeds = self.inputs_embeds.masked_fill(marked[..., None], 0)
        self.dropped_images = self.dropped_images + marked.sum(1)
        self.first_layer, self.counts = 0, counts
        self._keep(keep)
        return marked

    def _plan_to_drop(self, real):
        """Tokens that leave in the middle of the stack: how many is known now, which ones perhaps later."""
        visual = self.visual.mask.to(real.device) & real
        numbers, present = torch.stack([visual.sum(1), real.sum(1)]).tolist()
        ranks = [self.visual.reduction.count(v) for v in numbers]
        if ranks == numbers:
            return
        self.first_layer = self.visual.reduction.first_layer
        self.counts = [n - v + rank for v, n, rank in zip(numbers, present, ranks, strict=True)]
        self._ranks, self._candidates, self._real = torch.tensor(ranks, device=real.device), visual, real
        # The last token of each row, padding aside, is the one that looks.
        self._last = torch.where(real, torch.arange(self.length, device=real.device), -1).amax(1).clamp(min=0)
        if not any(ranks) or not self.visual.reduction.needs_scores:
            self._reduce(None)

    def _reduce(self, scores):
        tokens = self.visual.reduction.reduce(scores, self._candidates, self._ranks)
        self._keep(tokens.kept & self._real)

    def _keep(self, keep: torch.Tensor):
        """From the mask of kept tokens `[B, S]`: their positions in order, and fillers where a row has fewer."""
        width = max(*self.counts, 1)
        chosen = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        self.positions = chosen.sort(dim=1).values
        self.valid = None if min(self.counts) == width else keep.gather(1, self.positions)

    def _refuse_packed_sequences(self, position_ids, cache):
        if cache is None and self.attention_mask is None and position_ids is not None:
            if find_packed_sequence_indices(position_ids.expand(self.batch_size, -1)) is not None:
                raise ValueError("visual_reduction does not work with sequences packed into one row; use a batch")

    def chooses_after(self, layer: int) -> bool:
        """Whether this layer's attention decides which tokens stay."""
        return self.first_layer == layer + 1 and self.positions is None

    def choose(self, attention, hidden_states, position_embeddings, keys):
        """Rank visual tokens by the attention of each row's last token in this layer. Only that row is computed.

        Raises:
            ValueError: if the heads are spread over devices, each of which would choose for itself.
        """
        with torch.no_grad():
            last = self._last.to(keys.device)

            def last_row(states):
                return torch.take_along_dim(states, last[:, None, None], dim=1)

            query = attention.q_proj(last_row(hidden_states))
            if query.shape[-1] != attention.config.num_attention_heads * attention.head_dim:
                raise ValueError("fastv does not work with tensor parallel attention: each device sees its own heads")
            query = query.view(self.batch_size, 1, -1, attention.head_dim).transpose(1, 2)
            query, _ = apply_rotary_pos_emb(query, query, *(last_row(part) for part in position_embeddings))
            seen = self._layer_keys.get(attention.layer_idx)
            if seen is None:  # a layer that has seen all; a sliding one holds the last of it
                total, held = self.past + self.length, keys.shape[2]
                seen = 2 * (torch.arange(total - held, total, device=keys.device).expand(self.batch_size, -1),)
            looks = (last[:, None] + self.past, self._places.to(keys.device).gather(1, last[:, None]))
            mask = self._allowed(looks, seen, sliding_window(attention))
            scores = last_row_attention(query[:, :, 0], keys, mask, attention.scaling)[:, -self.length :]
            self.scores = scores.to(self._candidates.device)
            self._reduce(self.scores)

    # What the layers see

    def enter(self, attention, hidden_states, freeze_plan, kwargs):
        """A layer's `hidden_states`, plan and keyword arguments, as they are in the layers that see fewer tokens."""
        layer, cache = attention.layer_idx, find_cache(kwargs)
        reduced = self.first_layer is not None and layer >= self.first_layer
        if reduced and layer == self.first_layer:
            hidden_states = self._select(hidden_states)
        cached = self._cache_layer(cache, layer, reduced)
        freeze_plan = self._freeze_plan(freeze_plan, reduced, cached)
        if not reduced and cached is None:
            return hidden_states, freeze_plan, kwargs
        queries = keys = self._slots(reduced, hidden_states.device)
        if cached is not None:
            cached.add_slots(*queries, self.past + self.length, reduced, reduced and self.valid is not None)
            keys = tuple(part.to(hidden_states.device) for part in (cached.slots, cached.places))
        self._layer_keys[layer] = keys
        kwargs = dict(kwargs)
        for name in ("attention_mask", "position_ids"):
            argument(kwargs, name)  # it must be the one that is replaced
        kwargs["attention_mask"] = self._mask(attention, reduced, queries, keys, cached)
        kwargs["position_ids"] = None  # with gaps, FlashAttention would take them for packed sequences
        if reduced:
            rotary = argument(kwargs, "position_embeddings")
            kwargs["position_embeddings"] = tuple(self._select(part) for part in rotary)
        return hidden_states, freeze_plan, kwargs

    def _select(self, states):
        return torch.take_along_dim(states, self.positions.to(states.device)[..., None], dim=1)

    def _slots(self, reduced, device):
        """Slots and places of the chunk's tokens that a layer sees, `[B, S or Q]` each (`visual_cache.py`)."""
        places = self._places.to(device).expand(self.batch_size, -1)
        if not reduced:
            return torch.arange(self.past, self.past + self.length, device=device).expand(self.batch_size, -1), places
        positions = self.positions.to(device)
        slots = positions + self.past
        if self.valid is not None:
            slots = slots.masked_fill(~self.valid.to(device), -1)
        return slots, places.gather(1, positions)

    def _cache_layer(self, cache, layer, reduced):
        """The layer of the cache, made able to shrink if this pass shrinks it; `None` if it holds all tokens."""
        if cache is None:
            return None
        layers = cache.layers
        while reduced and len(layers) <= layer:  # a cache without a config grows as it is used
            layers.append(cache.layer_class_to_replicate())
        if reduced:
            device = self.positions.device
            layers[layer] = ReducedLayer.of(layers[layer], self.past, self.batch_size, device)
        if layer >= len(layers) or not isinstance(layers[layer], ReducedLayer):
            return None
        if layer == 0:
            layers[0].dropped_images = self.dropped_images
        return layers[layer]

    def _freeze_plan(self, given, reduced, cached):
        """The ShortV plan for the tokens that the layer sees. Plans share masks, layers whose caches differ do not."""
        history = None if cached is None else cached.history
        if ("plan", reduced, history) not in self._shared:
            if self.visual is None:
                plan = given
            elif ("plan", reduced) in self._shared:
                plan = self._shared["plan", reduced]
            else:
                plan = self._shared["plan", reduced] = self._build_freeze_plan(reduced)
            self._shared["plan", reduced, history] = None if plan is None else replace(plan, _shared={})
        return self._shared["plan", reduced, history]

    def _build_freeze_plan(self, reduced):
        if not self.visual.shortv_layers:
            return None
        mask, real = self.visual.mask, None
        if reduced:
            mask, real = mask.to(self.positions.device).gather(1, self.positions), self.valid
        elif self.visual.skip_padding and self.attention_mask is not None and self.attention_mask.ndim == 2:
            real = self.attention_mask[:, -self.length :]
        return FreezePlan.build(self.visual.shortv_layers, mask, real)

    def _mask(self, attention, reduced, queries, keys, cached):
        """The mask that the layer's attention implementation needs; `None` where plain causal attention is right."""
        implementation, window = attention.config._attn_implementation, sliding_window(attention)
        flash = "flash" in implementation
        if not flash and implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"visual_reduction does not work with attn_implementation={implementation!r}; use sdpa, eager or "
                "flash_attention_2"
            )
        if flash and window is not None:
            raise ValueError("visual_reduction with a sliding window needs attn_implementation sdpa or eager")
        (slots, _), (key_slots, _) = queries, keys
        key = ("mask", reduced, window, slots.device, None if cached is None else cached.history)
        if key not in self._shared:
            fillers = (reduced and self.valid is not None) or (cached is not None and cached.has_fillers)
            aligned = slots.shape[1] in (1, key_slots.shape[1])
            if self.no_padding and not fillers and aligned and window is None and implementation != "eager":
                mask = None
            elif flash:
                mask = key_slots >= 0
                if self.attention_mask is not None:
                    mask = mask & self._not_padding(key_slots)
            else:
                mask = self._allowed(queries, keys, window)
                if implementation == "eager" and mask.dtype == torch.bool:
                    dtype = self.inputs_embeds.dtype
                    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
                    mask = zeros.masked_fill(~mask, torch.finfo(dtype).min)
            self._shared[key] = mask
        return self._shared[key]

    def _not_padding(self, key_slots):
        padding_mask = self.attention_mask.to(device=key_slots.device, dtype=torch.bool)
        return padding_mask.gather(1, key_slots.clamp(min=0))

    def _allowed(self, query_slots, key_slots, window):
        """Which keys the queries attend to: `[B, 1, Q, K]` bool, or additive if the caller's mask is. Both arguments:
        slots and places, `[B, Q or K]` each."""
        (slots, places), (key_slots, key_places) = query_slots, key_slots
        queries, keys = slots[:, None, :, None], key_slots[:, None, None]
        given = self.attention_mask
        if given is not None and given.ndim == 4:
            given = given.to(slots.device).expand(self.batch_size, -1, -1, -1)
            given = torch.take_along_dim(given, (queries - self.past).clamp(min=0), dim=2)
            given = torch.take_along_dim(given, keys.clamp(min=0), dim=3)
            if given.dtype != torch.bool:
                return given.masked_fill((keys < 0) & (queries >= 0), torch.finfo(given.dtype).min)
            allowed = given & (keys >= 0)
        else:
            allowed = (keys <= queries) & (keys >= 0)
            if window is not None:
                allowed = allowed & (key_places[:, None, None] > places[:, None, :, None] - window)
            if given is not None:
                allowed = allowed & self._not_padding(key_slots)[:, None, None]
        return allowed | (queries < 0)  # a filler with no key at all could give NaN

    # What the caller sees

    def restore(self, output):
        """The text model's output with the caller's shapes: zeros where a token was dropped."""
        for layer in getattr(self.cache, "layers", ()):
            if isinstance(layer, ReducedLayer):
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

    def _spread(self, states):
        """`[B, Q, d]` → `[B, S, d]`."""
        if self.valid is not None:
            states = states.masked_fill(~self.valid.to(states.device)[..., None], 0)
        index = self.positions.to(states.device)[..., None].expand_as(states)
        return states.new_zeros(self.batch_size, self.length, states.shape[-1]).scatter(1, index, states)

    def _spread_attention(self, weights, layer):
        """`[B, heads, Q, K]` → `[B, heads, S, past + S]`."""
        if weights is None or layer not in self._layer_keys:
            return weights
        key_slots = self._layer_keys[layer][0].to(weights.device)[:, None, None]
        weights = weights.masked_fill(key_slots < 0, 0)
        wide = weights.new_zeros(*weights.shape[:3], self.past + self.length)
        wide = wide.scatter_add(3, key_slots.clamp(min=0).expand_as(weights), weights)
        if self.first_layer is None or layer < self.first_layer:
            return wide
        batch_size, heads, _, width = wide.shape
        return self._spread(wide.transpose(1, 2).flatten(2)).unflatten(2, (heads, width)).transpose(1, 2)


class ReductionAttentionMixin:
    """Modifications: the attention that decides which tokens stay also hands its keys over."""

    def forward(self, hidden_states, *args, reduction: TokenReduction | None = None, **kwargs):
        if reduction is None:
            return super().forward(hidden_states, *args, **kwargs)
        recorder = KeyRecorder(find_cache(kwargs))
        output = super().forward(hidden_states, *args, **{**kwargs, cache_name(kwargs): recorder})
        if recorder.keys is None:
            raise not_right(f"{type(self).__name__} stores no keys in the cache `{cache_name(kwargs)}`")
        reduction.choose(self, hidden_states, argument(kwargs, "position_embeddings"), recorder.keys)
        return output


class ReductionDecoderLayerMixin:
    """Modifications: given a reduction, the layer sees the tokens that are left."""

    def forward(self, hidden_states, *args, freeze_plan=None, reduction: TokenReduction | None = None, **kwargs):
        if reduction is None:
            return super().forward(hidden_states, *args, freeze_plan=freeze_plan, **kwargs)
        hidden_states, freeze_plan, kwargs = reduction.enter(self.self_attn, hidden_states, freeze_plan, kwargs)
        if reduction.chooses_after(self.self_attn.layer_idx):
            kwargs["reduction"] = reduction
        return super().forward(hidden_states, *args, freeze_plan=freeze_plan, **kwargs)
