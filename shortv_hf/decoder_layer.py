"""The ShortV decoder layer: visual tokens are frozen, only text tokens are computed (paper Section 3.1, Figure 4).

In a frozen layer
    hidden states of visual tokens pass through unchanged;
    K and V are computed for all tokens, and cached in natural order;
    Q, attention output, `o_proj`, `post_attention_layernorm` and the FFN are computed for text tokens only, which
    attend to exactly the keys that the causal mask allows them.

The cost falls from `2(t+v)(4h+3m)h + 4(t+v)²h` FLOPs (Eq. 3) to `2t(4h+3m)h + 4vh² + 4t(t+v)h` (Eq. 4).

Which tokens are text is in a [`FreezePlan`], which the model builds once per forward pass and hands to its layers. A
layer without a plan (a dense layer, a text-only prompt, every decoding step) is the parent class's forward. The
`Reduction…Mixin`s, which drop tokens between layers, are another matter: `visual_tokens.py`.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    repeat_kv,
    rotate_half,
)
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer

from .freeze_plan import FreezePlan
from .upstream import argument, find_cache, update_cache
from .visual_tokens import ReductionAttentionMixin, ReductionDecoderLayerMixin


class ShortVAttentionMixin:
    """Modifications: given a plan, only text tokens are queries. The submodules are called as the parent calls them,
    so quantized linears, adapters, tensor-parallel shards and hooks keep working."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args,
        freeze_plan: FreezePlan | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` `[B, S, h]` → attention output of the text tokens `[B, T, h]`, and with `eager` the
        attention weights `[B, heads, S, keys]`, which are 0 in the rows of frozen tokens."""
        if freeze_plan is None:
            return super().forward(hidden_states, *args, **kwargs)

        def heads(states):
            return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

        position_embeddings = argument(kwargs, "position_embeddings")
        query = heads(self.q_proj(freeze_plan.select_text(hidden_states)))
        key = heads(self.k_proj(hidden_states))
        value = heads(self.v_proj(hidden_states))
        key = apply_rotary(key, *position_embeddings)
        query = apply_rotary(query, *freeze_plan.text_position_embeddings(position_embeddings))

        cache = find_cache(kwargs)
        if cache is not None:
            key, value = update_cache(cache, key, value, self.layer_idx, kwargs)

        # SDPA with an explicit mask whatever the model's implementation: there are fewer queries than keys, and kernels
        # do not agree on how `is_causal` aligns the two. Eager is the one that returns attention weights.
        attend = self._attend_eager if self.config._attn_implementation == "eager" else self._attend_sdpa
        given_mask = argument(kwargs, "attention_mask")
        mask = freeze_plan.text_mask(self, given_mask, key, cache is not None, argument(kwargs, "position_ids"))
        output, weights = attend(query, key, value, mask, freeze_plan)
        return self.o_proj(output.reshape(*output.shape[:2], -1)), weights

    def _attend_sdpa(self, query, key, value, mask, freeze_plan):
        dropout = self.attention_dropout if self.training else 0.0
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, is_causal=False)

    def _attend_eager(self, query, key, value, mask, freeze_plan):
        key, value = (repeat_kv(states, self.num_key_value_groups) for states in (key, value))
        scores = query @ key.transpose(2, 3) * self.scaling + mask
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        weights = nn.functional.dropout(weights, self.attention_dropout, self.training)
        weights = freeze_plan.expand_rows(weights)  # before their use, so that gradients reach what is returned
        return (freeze_plan.select_rows(weights) @ value).transpose(1, 2), weights


class ShortVDecoderLayerMixin:
    """Modifications: given a plan that names this layer, visual tokens skip it."""

    def forward(
        self, hidden_states: torch.Tensor, *args, freeze_plan: FreezePlan | None = None, **kwargs
    ) -> torch.Tensor:
        """`hidden_states` `[B, S, h]` → `[B, S, h]`, out of place."""
        if freeze_plan is None or self.self_attn.layer_idx not in freeze_plan.layers:
            return super().forward(hidden_states, *args, **kwargs)

        text = freeze_plan.select_text(hidden_states)
        attention_output, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), freeze_plan=freeze_plan, **kwargs
        )
        text = text + attention_output
        text = text + self.mlp(self.post_attention_layernorm(text))
        return freeze_plan.write_text(hidden_states, text)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `states` `[B, heads, n, d]` with `cos` and `sin` `[B or 1, n, d]`; upstream's function takes
    queries and keys of one length."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return states * cos + rotate_half(states) * sin


class ShortVLlamaAttention(ReductionAttentionMixin, ShortVAttentionMixin, LlamaAttention): ...


class ShortVMistralAttention(ReductionAttentionMixin, ShortVAttentionMixin, MistralAttention): ...


class ShortVQwen2Attention(ReductionAttentionMixin, ShortVAttentionMixin, Qwen2Attention): ...


class ShortVLlamaDecoderLayer(ReductionDecoderLayerMixin, ShortVDecoderLayerMixin, LlamaDecoderLayer): ...


class ShortVMistralDecoderLayer(ReductionDecoderLayerMixin, ShortVDecoderLayerMixin, MistralDecoderLayer): ...


class ShortVQwen2DecoderLayer(ReductionDecoderLayerMixin, ShortVDecoderLayerMixin, Qwen2DecoderLayer): ...
