"""The frozen decoder layer on vLLM: visual tokens write K and V, and only text tokens are computed.

Grafted on the layers of vLLM's Llama, Mistral and Qwen2, which hold the same modules under the same names. A step without
scheduled visual tokens is their own forward, compiled as they are.

Shapes: n scheduled tokens, T of them text, h hidden size; positions `[n]`, or `[3, n]` with M-RoPE.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.mistral import MistralAttention
from vllm.model_executor.models.qwen2 import Qwen2Attention

from .backend import shortv_backend
from .text_runs import TextRuns, text_rows


ATTENTIONS = (LlamaAttention, MistralAttention, Qwen2Attention)


if TYPE_CHECKING:  # vLLM's modules, which the mixins are put before
    _Module = Any
else:
    _Module = nn.Module


@dataclass
class Text:
    """The text tokens of a step.

    Attributes:
        index: `[T]`, their rows among the scheduled tokens.
        counts: False if a visual token stands in for them, and nothing of what is computed may stay.
        all_queries: the step has more runs than the backend has room for; attention then runs for all tokens, with the
            dense metadata.
        metadata: attention metadata by layer, of frozen layers that for text queries.
    """

    index: Tensor
    counts: bool
    all_queries: bool
    metadata: dict[str, Any]

    @classmethod
    def of(cls, is_visual: np.ndarray, metadata: dict[str, Any], frozen: list[str], device: torch.device) -> "Text":
        """The text tokens among those of `is_visual` `[n]`; `frozen` names the layers with frozen attention."""
        rows, counts = text_rows(is_visual)
        all_queries = False
        if frozen:
            builder, common = metadata[frozen[0]].shortv_source
            runs = TextRuns.of(rows, common.query_start_loc_cpu[: common.num_reqs + 1].numpy())
            all_queries = len(runs) > builder.max_sequences
            if not all_queries:
                text_metadata = builder.build(0, runs.queries(common))
                metadata = {**metadata, **dict.fromkeys(frozen, text_metadata)}
        index = torch.from_numpy(rows).to(device, non_blocking=True)
        return cls(index, counts, all_queries, metadata)

    def write(self, states: Tensor, new: Tensor) -> Tensor:
        """`states` `[n, h]` with `new` `[T, h]` in the rows of text tokens."""
        return states.index_copy(0, self.index, new) if self.counts else states


@dataclass
class Step:
    """What the layers know of the step: its text tokens, or `None` if all scheduled tokens are text."""

    text: Text | None = None


class FrozenAttention(_Module):
    """Modifications: Q has a projection apart from K and V, and runs for text tokens alone."""

    step: Step

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """`[n, h]` → `[T, h]`, or `[n, h]` where all tokens are text."""
        text = self.step.text
        kv, _ = self.kv_proj(hidden_states)
        k, v = kv.split([self.kv_size, self.kv_size], dim=-1)
        if text is None or text.all_queries:
            q, _ = self.query_proj(hidden_states)
            q, k = self.rotary_emb(positions, q, k)
            attended = self.attn(q, k, v)
            return self.o_proj(attended if text is None else attended[text.index])[0]
        q, _ = self.query_proj(hidden_states[text.index])
        q, k = self._rotate(positions[..., text.index], q), self._rotate(positions, k)
        return self.o_proj(self.attn(q, k, v))[0]

    def _rotate(self, positions: Tensor, states: Tensor) -> Tensor:
        # Rotary embeddings with sections take no query alone: a head of zeros stands in for the key.
        return self.rotary_emb(positions, states, states.new_zeros(len(states), self.head_dim))[0]


class FrozenLayer(_Module):
    """Modifications: rows of visual tokens pass through, by the attention, the FFN or both."""

    step: Step
    freezes_attention: bool
    freezes_ffn: bool

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **kwargs: Any) -> Any:
        """The stream is `hidden_states + residual`, `[n, h]` each: rows that pass through get `hidden_states` of zero."""
        text = self.step.text
        if text is None:
            return super().forward(positions, hidden_states, residual, **kwargs)
        if residual is None:
            residual, normed = hidden_states, self.input_layernorm(hidden_states)
        else:
            normed, residual = self.input_layernorm(hidden_states, residual)
        update = self.self_attn(positions=positions, hidden_states=normed)
        if self.freezes_attention:
            update = text.write(torch.zeros_like(normed), update)
        if not self.freezes_ffn:
            normed, residual = self.post_attention_layernorm(update, residual)
            return self.mlp(normed), residual
        normed, text_residual = self.post_attention_layernorm(update[text.index], residual[text.index])
        return text.write(update, self.mlp(normed)), text.write(residual, text_residual)


@functools.cache
def grafted(ours: type, stock: type) -> type:
    """`stock` with the forward of `ours` before its own."""
    return type(f"ShortV{stock.__name__}", (ours, stock), {})


def graft(layer: Any, step: Step, attention: bool, ffn: bool) -> str | None:
    """Freeze visual tokens in a decoder layer whose weights are not loaded yet.

    Returns:
        The name of its attention in vLLM's metadata if that is frozen.

    Raises:
        ValueError: its attention computes something that the frozen one does not know.
    """
    layer.__class__ = grafted(FrozenLayer, layer.__class__)
    layer.step, layer.freezes_attention, layer.freezes_ffn = step, attention, ffn
    if not attention:
        return None
    stock = layer.self_attn
    if (
        type(stock) not in ATTENTIONS
        or getattr(stock, "qk_norm", False)
        or getattr(stock, "do_llama_4_scaling", False)
    ):
        raise ValueError(
            f"ShortV on vLLM does not know this {type(stock).__name__}: it normalises or scales Q by itself"
        )
    _split_projection(stock)
    stock.__class__ = grafted(FrozenAttention, stock.__class__)
    stock.step = step
    stock.attn.attn_backend = shortv_backend(stock.attn.attn_backend)
    return stock.attn.layer_name


def _split_projection(attention: Any) -> None:
    """Q apart from K and V. Kernels for CPUs repack weights and quantized ones cannot be sliced: the projection that vLLM
    fuses is no option for two numbers of tokens."""
    fused = attention.qkv_proj
    kv_size = fused.total_num_kv_heads * fused.head_size
    shared = {"bias": fused.has_bias, "quant_config": fused.quant_config}
    # `prefix` is what quantization looks the layer up by: the checkpoint's names.
    prefix = fused.prefix.removesuffix("qkv_proj")
    attention.query_proj = ColumnParallelLinear(
        fused.input_size, fused.total_num_heads * fused.head_size, prefix=f"{prefix}q_proj", **shared
    )
    attention.kv_proj = MergedColumnParallelLinear(
        fused.input_size, [kv_size, kv_size], prefix=f"{prefix}kv_proj", **shared
    )
    del attention.qkv_proj
