"""A cache layer that can hold fewer tokens than it has seen, and remembers which.

Slots and places: `rows.py`. Shapes: B rows, E entries that the layer holds. A cache from which tokens were dropped
consists of such layers only, so that upstream makes masks over all that was seen, whichever layer it asks for sizes.
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .rows import Tokens
from .upstream import not_right


class KeptLayer(DynamicLayer):
    """Modifications: `keys` and `values` hold the tokens that were kept; `tokens` says, per row, which they are.

    `get_seq_length` and `crop` count the tokens *seen*, as a sliding-window layer does, so that `generate`, positions
    and attention masks go on as without reduction. What is stored is `keys.shape[-2]`.

    Attributes:
        tokens: `[B, E]`; slots ascend, those of fillers in rows that keep fewer tokens than others are -1.
        seen: tokens that the layer has seen.
        never_seen: `[B]`, how many tokens of each row never reached the language model, where positions after them are
            lower by as much; `None` if none. Kept by layer 0 only.
        history: of each shortened chunk, the length at which it was added and the stage of its reduction. Layers of one
            cache with the same history hold the same tokens, so they can share a mask.
        has_fillers: some slot is -1.
    """

    tokens: Tokens
    seen: int
    never_seen: Tensor | None
    history: tuple[tuple[int, int], ...]
    has_fillers: bool

    @classmethod
    def of(cls, layer: Any, seen: int, batch_size: int, device: torch.device) -> "KeptLayer":
        """The content of `layer`, one of a cache's. Raises `ValueError` if the kind of layer cannot shrink."""
        if type(layer) is cls:
            return layer
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"visual_reduction shortens the cache; a cache of {type(layer).__name__} cannot be shortened, use a "
                "DynamicCache"
            )
        kept = cls()
        kept.keys, kept.values, kept.is_initialized = layer.keys, layer.values, layer.is_initialized
        for name in ("dtype", "device"):
            if hasattr(layer, name):
                setattr(kept, name, getattr(layer, name))
        held = layer.keys.shape[-2] if layer.is_initialized and layer.keys.numel() else 0
        slots = torch.arange(seen - held, seen, device=device).expand(batch_size, -1)
        kept.tokens, kept.seen, kept.never_seen = Tokens(slots, slots), seen, None
        kept.history, kept.has_fillers = (), False
        return kept

    @property
    def slots(self) -> Tensor:
        return self.tokens.slots

    def add(self, tokens: Tokens, seen: int, stage: int, has_fillers: bool) -> None:
        """Say what the next `update` adds: `tokens` `[B, Q]`, after which the layer has seen `seen`. `stage` is 0 if they
        are the whole chunk."""
        if stage:
            self.history += ((self.seen, stage),)
        new = tokens.to(self.slots.device)
        self._select(lambda held, added: torch.cat([held, added], dim=1), new)
        self.seen, self.has_fillers = seen, self.has_fillers or has_fillers

    def _select(self, select: Callable[..., Tensor], other: Tokens | None = None) -> None:
        more = ((), ()) if other is None else ((other.slots,), (other.places,))
        self.tokens = Tokens(select(self.tokens.slots, *more[0]), select(self.tokens.places, *more[1]))

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Length and offset of a mask over all that was seen. `query`: the number of queries, on 4.x their positions."""
        return self.seen + (query if isinstance(query, int) else query.shape[0]), 0

    def check_stored(self) -> None:
        """Raises `ValueError` if the pass did not store what [`add`] said it would."""
        held = self.keys.shape[-2] if self.is_initialized and self.keys is not None else 0
        if held != self.slots.shape[1]:
            raise not_right(f"a cache layer holds {held} tokens after a pass that should leave {self.slots.shape[1]}")

    def crop(self, length: int) -> None:
        """Remove the last `-length` tokens seen or, if positive, all but `length`. Raises `ValueError` if some of
        them were dropped: they cannot be counted off."""
        n = -length if length < 0 else max(self.seen - length, 0) if length > 0 else 0
        if n == 0:
            return
        # Slots ascend: if the last n entries of every row are among the last n slots, they are those slots.
        if self.history and not bool((self.slots[:, -n:] >= self.seen - n).all()):
            raise ValueError(f"cannot crop {n} of {self.seen} tokens: visual_reduction has dropped some of them")
        assert self.keys is not None and self.values is not None  # it has seen tokens
        self.keys, self.values = self.keys[..., :-n, :], self.values[..., :-n, :]
        self._select(lambda held: held[:, :-n])
        self.seen -= n

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False
        self._select(lambda held: held[:, :0])
        self.seen, self.history, self.has_fillers, self.never_seen = 0, (), False, None

    def _select_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        self._select(select)
        self.never_seen = None if self.never_seen is None else select(self.never_seen)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_rows(lambda rows: rows[indices.to(rows.device)])


def is_shortened(cache: Cache | None) -> TypeGuard[Cache]:
    """Whether some layer of the cache may hold fewer tokens than it has seen."""
    return any(isinstance(layer, KeptLayer) for layer in getattr(cache, "layers", ()))
