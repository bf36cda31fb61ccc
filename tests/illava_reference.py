"""The deliberately simple reference for iLLaVA: one row, no cache, the stock Hugging Face model in eager, plain loops.

In the decoder nothing leaves: before layer k the merged value is written at its token's place, and from there on nobody
attends to the tokens that went into it. In a vision tower, layer after layer is computed by hand from its weights.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import floor
from typing import NamedTuple

import torch
from torch import Tensor

from shortv_hf.upstream import family_of


class Merge(NamedTuple):
    """Before layer `k` the tokens `members`, lowest last, become one at the place of the first, by `weights`."""

    k: int
    members: list[int]
    weights: list[float]


@contextmanager
def merging(layers, merges: list[Merge]) -> Iterator[None]:
    """Inside, these decoder layers merge. Eager attention, one row, no cache."""

    def before(merge: Merge, layer: int) -> Callable:
        def hook(module, args, kwargs):
            states = args[0] if args else kwargs["hidden_states"]
            if layer == merge.k:
                value = sum(w * states[0, i] for w, i in zip(merge.weights, merge.members, strict=True))
                states = states.clone()
                states[0, merge.members[0]] = value
            mask = kwargs["attention_mask"].clone()
            mask[..., merge.members[1:]] = torch.finfo(mask.dtype).min
            kwargs = {**kwargs, "attention_mask": mask}
            return (states, *args[1:]), {name: v for name, v in kwargs.items() if name != "hidden_states"}

        return hook

    with ExitStack() as stack:
        for merge in merges:
            for number, layer in enumerate(layers):
                if number >= merge.k:
                    handle = layer.register_forward_pre_hook(before(merge, number), with_kwargs=True)
                    stack.callback(handle.remove)
        yield


def merges_in_decoder(
    attentions_of: Callable, layers, windows: list[list[int]], options: dict, last: int
) -> list[Merge]:
    """What iLLaVA merges in the `windows` (positions of the tokens of each image): `attentions_of()` runs the stock model
    on the prompt, whose last token is at `last`, and returns its attention weights."""
    merges, windows = [], [list(window) for window in windows]
    for k in sorted(options["llm_k"]):
        gone = {i for merge in merges for i in merge.members[1:]}
        last = max(i for i in range(last + 1) if i not in gone)
        with merging(layers, merges):
            scores = attentions_of()[k - 1][0, :, last].mean(0).tolist()
        for number, window in enumerate(windows):
            n = len(window)
            gone = round(n * (1 - options["llm_r"])) if options["llm_r"] <= 1 else options["llm_r"]
            gone = min(gone, n - 1)
            if gone <= 0:
                continue
            order = sorted(window, key=lambda i: -scores[i])
            members = order[n - gone - 1 :]
            total = sum(range(1, gone + 2))
            merges.append(Merge(k, members, [(i + 1) / total for i in range(gone + 1)]))
            windows[number] = sorted(order[: n - gone])
    return merges


# A tower: layers by hand. States `[n, C]` of one picture, the first `others` of them no patches.


def clip_like(layer, states: Tensor):
    """Attention output and attention weights `[heads, n, n]` of a CLIP, SigLIP or InternVL layer."""
    attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
    normed = layer.layer_norm1(states) if hasattr(layer, "layer_norm1") else layer.layernorm_before(states)
    parts = [proj(normed) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)]
    if hasattr(attention, "q_norm"):
        parts[:2] = attention.q_norm(parts[0]), attention.k_norm(parts[1])
    query, key, value = (part.view(len(states), attention.num_heads, -1).transpose(0, 1) for part in parts)
    logits = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    out = (logits.softmax(-1) @ value).transpose(0, 1).flatten(1)
    projected = attention.out_proj(out) if hasattr(attention, "out_proj") else attention.projection_layer(out)
    return projected, logits


def qwen_like(layer, states: Tensor, cos: Tensor, sin: Tensor):
    """The same of a Qwen2-VL layer, with the rotary tables `[n, d]` of the patches."""
    attention = layer.attn
    query, key, value = (
        attention.qkv(layer.norm1(states)).view(len(states), 3, attention.num_heads, -1).permute(1, 0, 2, 3)
    )
    query, key = family_of(attention).apply_rotary_pos_emb_vision(query, key, cos, sin)
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    logits = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    return attention.proj((logits.softmax(-1) @ value).transpose(0, 1).flatten(1)), logits


def second_half(layer, states: Tensor) -> Tensor:
    """What a layer does after its attention."""
    if hasattr(layer, "layernorm_after"):
        return states + layer.lambda_2 * layer.mlp(layer.layernorm_after(states))
    norm = layer.layer_norm2 if hasattr(layer, "layer_norm2") else layer.norm2
    return states + layer.mlp(norm(states))


def tower_states(layers, states: Tensor, options: dict, *, others: int = 0, unit: int = 1, tables=None):
    """One picture through the `layers` of a tower. Returns the states `[m, C]` of what is left, and which patches."""
    left = list(range(len(states) - others))
    for number, layer in enumerate(layers):
        if tables is None:
            update, logits = clip_like(layer, states)
            update = update * getattr(layer, "lambda_1", 1.0)
        else:
            update, logits = qwen_like(layer, states, *tables)
        states = states + update
        if number in options["vit_k"]:
            if options.get("score") == "lse":
                scores = logits.logsumexp(-1).mean(0)
            else:
                scores = logits.softmax(-1).mean(0).mean(0)
            scores, n = scores[others:].tolist(), len(left)
            r = floor(options["vit_r"] * n) if options["vit_r"] < 1 else int(options["vit_r"])
            r = r // unit * unit
            if r:
                order = sorted(range(n), key=lambda i: scores[i])[: r + 1]
                weights = range(r + 1, 0, -1)
                value = sum(w * states[others + i] for w, i in zip(weights, order, strict=True)) / sum(weights)
                states = states.clone()
                states[others + order[-1]] = value
                kept = [i for i in range(n) if i not in order[:-1]]
                states = states[[*range(others), *(others + i for i in kept)]]
                left = [left[i] for i in kept]
                if tables is not None:
                    tables = [table[kept] for table in tables]
        states = second_half(layer, states)
    return states, left
