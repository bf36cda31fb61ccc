"""A cache layer that holds fewer tokens than it has seen, and remembers which.

A *slot* is a token's place in the sequence as the caller sees it, before anything was dropped: the index in
`attention_mask`. Shapes: B rows, E entries that the layer holds.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .upstream import not_right


class ReducedLayer(DynamicLayer):
    """Modifications: `keys` and `values` hold the tokens that were kept; `slots` says, per row, which they are.

    `get_seq_length` and `crop` count the tokens *seen*, as a sliding-window layer does, so that `generate`, positions
    and attention masks go on as without reduction. What is stored is `keys.shape[-2]`.

    Attributes:
        slots: `[B, E]`, ascending; -1 for fillers in rows that keep fewer tokens than others.
        places: `[B, E]`, the slots less the tokens before them that never reached the language model; a sliding window
            is measured in them.
        seen: tokens that the layer has seen.
        dropped_images: `[B]`, how many tokens of each row never reached the language model; positions after them are
            lower by as much. Kept by layer 0 only.
        history: the lengths at which reduced chunks were added. Layers of one cache with the same history hold the same
            slots, so they can share a mask.
        has_fillers: some slot is -1.
    """

    @classmethod
    def of(cls, layer: DynamicLayer, seen: int, batch_size: int, device: torch.device) -> "ReducedLayer":
        """A dynamic layer's content. Raises `ValueError` if the kind of layer cannot shrink."""
        if type(layer) is cls:
            return layer
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"visual_reduction shortens the cache; a cache of {type(layer).__name__} cannot be shortened, use a "
                "DynamicCache"
            )
        reduced = cls()
        reduced.keys, reduced.values, reduced.is_initialized = layer.keys, layer.values, layer.is_initialized
        for name in ("dtype", "device"):
            if hasattr(layer, name):
                setattr(reduced, name, getattr(layer, name))
        held = layer.keys.shape[-2] if layer.is_initialized and layer.keys.numel() else 0
        reduced.slots = torch.arange(seen - held, seen, device=device).expand(batch_size, -1)
        reduced.places = reduced.slots
        reduced.seen, reduced.history, reduced.has_fillers = seen, (), False
        reduced.dropped_images = torch.zeros(batch_size, dtype=torch.long, device=device)
        return reduced

    def add_slots(self, slots: torch.Tensor, places: torch.Tensor, seen: int, reduced: bool, has_fillers: bool):
        """Say what the next `update` adds: `slots` and `places` `[B, Q]`, after which the layer has seen `seen` tokens."""
        if reduced:
            self.history += (self.seen,)
        self.slots = torch.cat([self.slots, slots.to(self.slots.device)], dim=1)
        self.places = torch.cat([self.places, places.to(self.places.device)], dim=1)
        self.seen, self.has_fillers = seen, self.has_fillers or has_fillers

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query) -> tuple[int, int]:
        """Length and offset of a mask over all that was seen. `query`: the number of queries, on 4.x their positions."""
        return self.seen + (query if isinstance(query, int) else query.shape[0]), 0

    def check_stored(self):
        """Raises `ValueError` if the pass did not store what [`add_slots`] said it would."""
        held = self.keys.shape[-2] if self.is_initialized else 0
        if held != self.slots.shape[1]:
            raise not_right(f"a cache layer holds {held} tokens after a pass that should leave {self.slots.shape[1]}")

    def crop(self, length: int):
        """Remove the last `-length` tokens seen or, if positive, all but `length`. Raises `ValueError` if some of
        them were dropped: they cannot be counted off."""
        n = -length if length < 0 else max(self.seen - length, 0) if length > 0 else 0
        if n == 0:
            return
        # Slots ascend: if the last n entries of every row are among the last n slots, they are those slots.
        if self.history and not bool((self.slots[:, -n:] >= self.seen - n).all()):
            raise ValueError(f"cannot crop {n} of {self.seen} tokens: visual_reduction has dropped some of them")
        self.keys, self.values = self.keys[..., :-n, :], self.values[..., :-n, :]
        self.slots, self.places, self.seen = self.slots[:, :-n], self.places[:, :-n], self.seen - n

    def reset(self):
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False
        self.slots, self.places = self.slots[:, :0], self.places[:, :0]
        self.seen, self.history, self.has_fillers = 0, (), False
        self.dropped_images = torch.zeros_like(self.dropped_images)

    def _select_rows(self, select):
        self.slots, self.places = select(self.slots), select(self.places)
        self.dropped_images = select(self.dropped_images)

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._select_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int):
        super().batch_repeat_interleave(repeats)
        self._select_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._select_rows(lambda rows: rows[indices.to(rows.device)])


def is_reduced(cache: Cache | None) -> bool:
    """Whether some layer of the cache holds fewer tokens than it has seen."""
    return any(isinstance(layer, ReducedLayer) for layer in getattr(cache, "layers", ()))


class KeyRecorder(Cache):
    """Stands in for a cache in one attention call: hands on to it, and keeps the keys `[B, kv_heads, T, d]` that the
    attention sees. A `Cache`, since that is how arguments are told apart (`upstream.py`); it has no layers of its own."""

    layers = ()

    def __init__(self, cache: Cache | None):
        self.cache, self.keys = cache, None

    def update(self, key, value, layer_idx, *args, **kwargs):
        if self.cache is not None:
            key, value = self.cache.update(key, value, layer_idx, *args, **kwargs)
        self.keys = key
        return key, value
