"""Some tokens of a chunk: their rows of states and of rotary tables, and what they attend to.

Shapes: B rows of the batch, S tokens in the chunk, T of them selected in the row with the most, K keys. A *slot* is a
token's place in the sequence as the caller sees it: the index in `attention_mask`. Its *place* is that less the tokens
before it that never reached the language model; a sliding window is measured in places.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices


@dataclass
class Rows:
    """T tokens of each row of a chunk.

    Attributes:
        index: `[B, T]`, ascending. Rows with fewer than T are filled up with others of their tokens: all are distinct, so
            that gradients are right.
        valid: `[B, T]` bool, False at the fillers; `None` if there are none.
    """

    index: Tensor
    valid: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor, width: int, exact: bool = False) -> "Rows":
        """The tokens where `mask` `[B, S]` is True: at most `width` in a row, in each row if `exact`."""
        # Not a view: a compiled text model would guard on its strides, hence on S.
        index = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :width].sort(dim=1).values
        return cls(index, None if exact else mask.gather(1, index))

    def at(self, rows: "Rows") -> "Rows":
        """Those of these tokens that `rows` select. Fillers are not to be selected but as fillers."""
        return Rows(self.index.gather(1, rows.index), rows.valid)

    def _to(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Layers can live on several devices."""
        return self.index.to(device), None if self.valid is None else self.valid.to(device)

    def select(self, states: Tensor) -> Tensor:
        """`[B or 1, S, d]` → `[B, T, d]`; `[3, B or 1, S, d]`, the rotary tables of some models, → `[3, B, T, d]`."""
        index, _ = self._to(states.device)
        states = states.expand(*states.shape[:-3], len(index), -1, -1)
        return states.gather(-2, index[..., None].expand(*states.shape[:-3], -1, -1, states.shape[-1]))

    def write(self, states: Tensor, new: Tensor) -> Tensor:
        """A copy of `states` `[B, S, d]` with `new` `[B, T, d]` at the tokens' places."""
        index, valid = self._to(states.device)
        at = index[..., None].expand_as(new)
        if valid is not None:
            new = torch.where(valid[..., None], new, states.gather(1, at))
        return states.to(new.dtype).scatter(1, at, new)  # a layer may have promoted them

    def spread(self, new: Tensor, length: int) -> Tensor:
        """`[B, …, T, d]` → `[B, …, length, d]`, zeros where no token is."""
        index, valid = self._to(new.device)
        shape = len(new), *[1] * (new.ndim - 3), index.shape[1], 1
        if valid is not None:
            new = new.masked_fill(~valid.view(shape), 0)
        zeros = new.new_zeros(*new.shape[:-2], length, new.shape[-1])
        return zeros.scatter(-2, index.view(shape).expand_as(new), new)


@dataclass
class Tokens:
    """Slots and places of queries or keys, `[B or 1, n]` each; a slot of -1 is a filler, which nobody attends to."""

    slots: Tensor
    places: Tensor

    @classmethod
    def range(cls, start: int | Tensor, n: int, device: torch.device) -> "Tokens":
        """n tokens in a row."""
        slots = (torch.arange(n, device=device) + start)[None]
        return cls(slots, slots)

    def to(self, device: torch.device) -> "Tokens":
        return Tokens(self.slots.to(device), self.places.to(device))

    def at(self, rows: Rows) -> "Tokens":
        """Those of a chunk that `rows` select."""
        index, valid = rows._to(self.slots.device)
        slots, places = (part.expand(len(index), -1).gather(1, index) for part in (self.slots, self.places))
        return Tokens(slots if valid is None else slots.masked_fill(~valid, -1), places)


def mask_at(
    given: Any,
    queries: Tokens,
    keys: Tokens,
    *,
    past: int | Tensor = 0,
    first: int = 0,
    every_key: bool = False,
    window: int | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """What the `queries` attend to, `[B, 1, Q, K]`; never an `[S, S]` mask. A bool mask, or an additive one if `given` is.

    Args:
        given: what the caller's or upstream's mask says of the chunk. A 4D mask: its entries are taken. A flex-attention
            `BlockMask`: its function is evaluated. A 2D padding mask, or `None`: the causal rule.
        past: the slot of the chunk's first token, which is the first row of a 4D mask.
        first: the slot of a 4D mask's first column.
        every_key: the columns of `given` are the `keys` one by one instead.
        window: how many places back a query sees, by the causal rule.
        packed: `[B or 1, S]`, the number of the sequence that each token of an uncached chunk belongs to.
    """
    slots, key_slots = queries.slots[:, None, :, None], keys.slots[:, None, None]
    row = (slots - past).clamp(min=0)
    n_rows, n_keys = len(queries.slots), key_slots.shape[-1]
    if hasattr(given, "mask_mod"):
        batch = torch.arange(n_rows, device=row.device)[:, None, None, None]
        column = torch.arange(n_keys, device=row.device) if every_key else key_slots.clamp(min=0)
        return given.mask_mod(batch, torch.zeros_like(batch), row, column) & (key_slots >= 0) | (slots < 0)
    if torch.is_tensor(given) and given.ndim == 4:
        given = given.to(row.device).expand(n_rows, -1, -1, -1)
        given = given.gather(2, row.expand(-1, given.shape[1], -1, given.shape[-1]))
        if every_key:
            given = given[..., :n_keys]
        else:
            given = torch.take_along_dim(given, (key_slots - first).clamp(min=0), dim=3)
            if given.dtype != torch.bool:
                return given.masked_fill((key_slots < first) & (slots >= 0), torch.finfo(given.dtype).min)
        if given.dtype != torch.bool:
            return given
        allowed = given if every_key else given & (key_slots >= first)
    else:
        allowed = (key_slots <= slots) & (key_slots >= 0)
        if window is not None:
            allowed = allowed & (keys.places[:, None, None] > queries.places[:, None, :, None] - window)
        if given is not None:
            real = given.to(device=row.device, dtype=torch.bool)
            real = real[:, -n_keys:] if every_key else real.gather(1, keys.slots.clamp(min=0).expand(n_rows, -1))
            allowed = allowed & real[:, None, None]
        if packed is not None:
            packed = packed.to(row.device).expand(n_rows, -1)
            allowed = allowed & (packed.gather(1, row[:, 0, :, 0])[:, None, :, None] == packed[:, None, None])
    return allowed | (slots < 0)  # a filler with no key at all could give NaN


def within_window(mask: Tensor, queries: Tokens, keys: Tokens, window: int) -> Tensor:
    """A mask `[B, 1, Q, K]` without the keys that are `window` places back or more."""
    far = keys.places[:, None, None] <= queries.places[:, None, :, None] - window
    far = far & (queries.slots >= 0)[:, None, :, None]
    return mask & ~far if mask.dtype == torch.bool else mask.masked_fill(far, torch.finfo(mask.dtype).min)


def packed_sequences(position_ids: Tensor | None, n_rows: int) -> Tensor | None:
    """The number of the sequence that each token belongs to, `[n_rows, S]`; `None` unless the positions, `[B or 1, S]`,
    start anew within a row."""
    if position_ids is None or position_ids.ndim != 2:
        return None
    return find_packed_sequence_indices(position_ids.expand(n_rows, -1))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as eager attention wants it."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
