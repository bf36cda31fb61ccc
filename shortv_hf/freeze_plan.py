"""Which tokens of a forward pass are frozen, and what the frozen layers need to compute the others.

Built once per forward pass, with one host synchronisation (the number of text tokens decides the shapes); the layers
then read it without any (FlashAttention without a cache: one more, for packed sequences). Shapes: B rows, S tokens in
the chunk, T text tokens in the row that has the most.
"""

from dataclasses import dataclass, field

import torch
from transformers.masking_utils import find_packed_sequence_indices


@dataclass
class FreezePlan:
    """Text positions of a chunk, and the operations on them.

    Attributes:
        layers: ids of the layers that freeze visual tokens.
        text_positions: `[B, T]`, the positions of each row's text tokens in order. Rows with fewer than T are filled
            with other positions of the row, which are computed and not written back.
        is_text: `[B, T]` bool, False at the fillers; `None` for a single row, which has none.
        visual_mask: `[B, S]` bool, the positions that hold image features.
    """

    layers: frozenset[int]
    text_positions: torch.Tensor
    is_text: torch.Tensor | None
    visual_mask: torch.Tensor
    _shared: dict = field(default_factory=dict)  # what is equal in all layers, computed by the first that asks

    @classmethod
    def build(
        cls,
        layers: list[int],
        visual_mask: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        max_text_tokens: int | None = None,
    ) -> "FreezePlan | None":
        """Plan for a chunk with `visual_mask` `[B, S]` bool, or `None` if the chunk holds no visual token.

        With a 2D `attention_mask` `[B, S]`, padding is left out like visual tokens are: a row without an image, padded
        to the length of one with, then costs little. Without one, or with a mask of another shape, padding counts as
        text, which costs time and changes no other token.

        `max_text_tokens` is an upper bound of T for callers that must not synchronise (compiled graphs).
        """
        is_text = ~visual_mask
        if torch.is_tensor(attention_mask) and attention_mask.shape == visual_mask.shape:
            is_text = is_text & attention_mask.to(device=is_text.device, dtype=torch.bool)
        exact = False
        if max_text_tokens is None:
            *counts, n_visual = torch.cat([is_text.sum(1), visual_mask.sum()[None]]).tolist()
            if n_visual == 0:
                return None
            max_text_tokens = max(*counts, 1)  # no query at all would need its own path through every kernel
            # Of a batch, not even where the counts agree: whether they do would decide which compiled graph fits.
            exact = len(counts) == 1 and counts[0] > 0
        # Stable: text tokens first, in order. Fillers are then distinct positions, so that gradients are right.
        positions = (~is_text).to(torch.uint8).argsort(dim=1, stable=True)[:, :max_text_tokens]
        # Not a view: a compiled text model would guard on its strides, hence on S.
        positions = positions.clone(memory_format=torch.contiguous_format)
        return cls(
            layers=frozenset(layers),
            text_positions=positions,
            is_text=None if exact else is_text.gather(1, positions),
            visual_mask=visual_mask,
        )

    @classmethod
    def of_text(cls, n_layers: int, rows: int, tokens: int) -> "FreezePlan":
        """The plan that freezes nothing: `tokens` text tokens in each of `rows` rows, which all layers compute by it."""
        positions = torch.arange(tokens).expand(rows, -1)
        return cls(frozenset(range(n_layers)), positions, None, torch.zeros(rows, tokens, dtype=torch.bool))

    @property
    def chunk_length(self) -> int:
        """S, read off a tensor: compiled graphs are specialised to an int, not to a shape."""
        return self.visual_mask.shape[1]

    def _positions(self, device: torch.device) -> torch.Tensor:
        return self.text_positions.to(device)  # layers can live on several devices

    def select_text(self, states: torch.Tensor) -> torch.Tensor:
        """Rows of the text tokens: `[B or 1, S, d]` → `[B, T, d]`."""
        index = self._positions(states.device)[..., None].expand(-1, -1, states.shape[-1])
        return states.expand(index.shape[0], -1, -1).gather(1, index)

    def write_text(self, states: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """A copy of `states` `[B, S, d]` with `text` `[B, T, d]` at the text positions."""
        index = self._positions(states.device)[..., None].expand_as(text)
        if self.is_text is not None:
            text = torch.where(self.is_text.to(states.device)[..., None], text, states.gather(1, index))
        return states.to(text.dtype).scatter(1, index, text)  # a layer may have promoted the text

    def text_position_embeddings(self, position_embeddings: tuple[torch.Tensor, torch.Tensor]):
        """Rotary cos and sin of the text tokens, `[B, T, head_dim]` each."""
        key = ("rotary", position_embeddings[0].device)
        if key not in self._shared:
            self._shared[key] = tuple(self.select_text(part) for part in position_embeddings)
        return self._shared[key]

    def expand_rows(self, weights: torch.Tensor) -> torch.Tensor:
        """Attention weights `[B, heads, T, keys]` → `[B, heads, S, keys]`, 0 for tokens that did not attend."""
        if self.is_text is not None:
            weights = weights * self.is_text.to(weights.device)[:, None, :, None]
        full = weights.new_zeros(*weights.shape[:2], self.chunk_length, weights.shape[-1])
        return full.scatter(2, self._positions(weights.device)[:, None, :, None].expand_as(weights), weights)

    def select_rows(self, weights: torch.Tensor) -> torch.Tensor:
        """Rows of the text tokens: `[B, heads, S, keys]` → `[B, heads, T, keys]`."""
        index = self._positions(weights.device)[:, None, :, None]
        return weights.gather(2, index.expand(-1, weights.shape[1], -1, weights.shape[-1]))

    def text_mask(self, attention, attention_mask, key, cached, position_ids) -> torch.Tensor:
        """The rows of the causal mask at the text positions, `[B, 1, T, keys]`; never an `[S, S]` mask.

        Args:
            attention: the attention module (its window and implementation).
            attention_mask: what the parent's mask creation made for this layer: a 4D mask (its rows are taken), a
                flex-attention `BlockMask` (its function is evaluated at the rows), `None` (plain causal) or the 2D
                padding mask (FlashAttention).
            key: the layer's key states after the cache update, `[B, kv_heads, keys, head_dim]`.
            cached: whether there is a cache.
            position_ids: `[B or 1, S]`, to tell packed sequences apart where the mask does not.

        Returns:
            A bool mask, or an additive one for `eager` and for a custom additive mask.
        """
        window = sliding_window(attention)
        shared_key = ("mask", window, key.device)
        if shared_key not in self._shared:
            mask = self._build_text_mask(attention, attention_mask, key, cached, position_ids, window)
            if attention.config._attn_implementation == "eager" and mask.dtype == torch.bool:
                additive = torch.zeros(mask.shape, dtype=key.dtype, device=key.device)
                mask = additive.masked_fill(~mask, torch.finfo(key.dtype).min)
            self._shared[shared_key] = mask
        return self._shared[shared_key]

    def _build_text_mask(self, attention, attention_mask, key, cached, position_ids, window):
        n_keys, device = key.shape[2], key.device
        queries = self._positions(device)[:, None, :, None]
        if torch.is_tensor(attention_mask) and attention_mask.ndim == 4:
            rows = attention_mask[..., :n_keys].expand(queries.shape[0], -1, self.chunk_length, -1)
            rows = rows.gather(2, queries.expand(-1, rows.shape[1], -1, n_keys))
        elif hasattr(attention_mask, "mask_mod"):  # BlockMask
            row_ids = torch.arange(queries.shape[0], device=device)[:, None, None, None]
            keys = torch.arange(n_keys, device=device)
            rows = attention_mask.mask_mod(row_ids, torch.zeros_like(row_ids), queries, keys)
        else:
            # Without a mask, SDPA means that the keys start with the chunk (a static cache is longer), except for a
            # chunk of one token, which sees all keys. FlashAttention aligns the chunk with the last keys.
            sdpa = attention.config._attn_implementation == "sdpa"
            offset = 0 if sdpa and self.chunk_length > 1 else n_keys - self.chunk_length
            keys = torch.arange(n_keys, device=device)
            rows = keys <= queries + offset
            if window is not None:
                rows = rows & (keys > queries + offset - window)
            if attention_mask is not None:
                rows = rows & attention_mask[:, None, None, -n_keys:].to(device=device, dtype=torch.bool)
            elif not sdpa and not cached and position_ids is not None:
                sequence = find_packed_sequence_indices(position_ids)
                if sequence is not None:
                    sequence = sequence.to(device).expand(queries.shape[0], -1)
                    rows = rows & (
                        sequence.gather(1, queries[:, 0, :, 0])[:, None, :, None] == sequence[:, None, None]
                    )
        if self.is_text is not None and rows.dtype == torch.bool:
            rows = rows | ~self.is_text.to(device)[:, None, :, None]  # a filler with no key at all could give NaN
        return rows


def sliding_window(attention) -> int | None:
    """The attention window of a layer: Qwen2 keeps it on the module, Mistral in the config, Llama has none."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None)
