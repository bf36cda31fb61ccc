"""FLOPs of the language model's prefill, by the paper's equations (Section 3.2, Eq. 3-5), with token reduction too.

As in the paper: attention blocks and FFNs of the decoder layers; a multiplication and an addition count as two; the
attention matrix is counted in full, causal or not; embeddings, norms, head and vision tower are left out.

The paper writes the attention projections as 4h² per token. Here they follow the text config: with grouped-query
attention, K and V are smaller. For the paper's models (no grouping) the two are the same.

A reduction method changes v: from layer k on to what FastV or VTW keep, in all layers to what methods before the language
model keep; ShortV layers freeze what is left. The cost of ranking tokens by one row of attention is left out: at most
4(t+v)h + 2h² for each layer that tokens leave at; by log-sum-exp (iLLaVA's `"lse"`), every visual token's row is one:
2v(t+v)h + 2vh².

Merging inside a vision tower makes that cheaper too: [`tower_flops`].
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..configuration_shortv import frozen_updates
from ..reduction import ModelSizes, Reduction, parse_visual_reduction, tokens_per_image


@dataclass(frozen=True)
class LayerShape:
    """Widths of a decoder layer: hidden size h, FFN size m, and the output widths of the Q and the K (= V) projection."""

    hidden_size: int
    intermediate_size: int
    query_size: int
    key_value_size: int


def layer_shape(config=None, *, h: int | None = None, m: int | None = None) -> LayerShape:
    """The widths from a text config (or a LLaVA config, whose text config is used), or from `h` and `m`.

    Raises:
        ValueError: if neither a config nor both of `h` and `m` are given.
    """
    if config is None:
        if h is None or m is None:
            raise ValueError(f"pass a text config, or both h and m; got h={h}, m={m}")
        return LayerShape(h, m, h, h)
    text_config = config.get_text_config()
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    key_value_heads = getattr(text_config, "num_key_value_heads", None) or heads
    return LayerShape(
        text_config.hidden_size, text_config.intermediate_size, heads * head_dim, key_value_heads * head_dim
    )


def layer_flops(
    t: int,
    v: int,
    config=None,
    *,
    frozen: bool = False,
    attention_frozen: bool = False,
    ffn_frozen: bool = False,
    h: int | None = None,
    m: int | None = None,
):
    """FLOPs of one decoder layer in the prefill of `t` text and `v` visual tokens.

    With q tokens that are queries and f that pass the FFN: `4qh² + 4(t+v)h² + 4q(t+v)h + 6fhm`. Dense, all do (Eq. 3):
    `2(t+v)(4h+3m)h + 4(t+v)²h`. `frozen=True`, a ShortV layer, only text (Eq. 4): `2t(4h+3m)h + 4vh² + 4t(t+v)h`. Or one of
    the two, `attention_frozen` or `ffn_frozen`.
    """
    _check_counts(t, v)
    shape = layer_shape(config, h=h, m=m)
    n = t + v
    queries = t if frozen or attention_frozen else n
    fed = t if frozen or ffn_frozen else n
    query_and_output = 4 * queries * shape.hidden_size * shape.query_size
    key_and_value = 4 * n * shape.hidden_size * shape.key_value_size
    attention = 4 * queries * n * shape.query_size
    ffn = 6 * fed * shape.hidden_size * shape.intermediate_size
    return query_and_output + key_and_value + attention + ffn


def visual_tokens_of(config) -> int:
    """Visual tokens of one picture; of models that cut it into tiles those of an overview and 2 x 2 tiles, as in the paper's
    tables (newline tokens not counted); of models that keep its size those of 896 x 896 pixels."""
    patches, vision = tokens_per_image(config), config.vision_config
    if patches is None:
        merged = getattr(vision, "spatial_merge_size", 1)
        patches = (getattr(vision, "image_size", 896) // (vision.patch_size * merged)) ** 2
    return (5 if getattr(config, "image_grid_pinpoints", None) else 1) * patches


def kept_visual_tokens(v: int, visual_reduction: dict | None, config=None, *, kept: int | None = None) -> int:
    """How many of `v` visual tokens a method leaves in the last layer.

    Some methods (PruMerge) keep as many as an image asks for, and in some families (LLaVA-NeXT) the tokens of an image
    depend on its shape: there the caller says how many are `kept` before the decoder.

    Raises:
        ValueError: for a bad method or option, if `kept` is needed and missing, or if it is not in 0..v.
    """
    steps = _steps(_parse(visual_reduction, v, config), v, config, kept)
    return steps[-1][1] if steps else v


def visual_tokens_by_layer(
    v: int, n_layers: int, visual_reduction: dict | None, config=None, *, kept: int | None = None
) -> list[int]:
    """How many of `v` visual tokens each of `n_layers` decoder layers sees. Arguments and errors as in
    [`kept_visual_tokens`]."""
    steps = _steps(_parse(visual_reduction, v, config, n_layers), v, config, kept)
    return [next((left for first, left in reversed(steps) if layer >= first), v) for layer in range(n_layers)]


def _parse(visual_reduction: dict | None, v: int, config=None, n_layers: int | None = None) -> Reduction | None:
    return parse_visual_reduction(visual_reduction, _sizes(v, config, n_layers))


def _sizes(v: int, config=None, n_layers: int | None = None) -> ModelSizes:
    """The sizes to check options against; where there is no vision config, those of one image of `v` tokens."""
    if hasattr(config, "vision_config"):
        return ModelSizes.of(config)
    n_layers = n_layers or (10**6 if config is None else config.get_text_config().num_hidden_layers)
    return ModelSizes(n_layers, 24, "clip_vision_model", v, False, False)


def _steps(reduction: Reduction | None, v: int, config, kept: int | None) -> list[tuple[int, int]]:
    """From which layers on how many of `v` visual tokens are left."""
    if kept is not None and (reduction is None or not reduction.cuts_images):
        method = "no method" if reduction is None else reduction.method
        raise ValueError(f"kept is {kept}; with {method}, the options say how many visual tokens stay")
    if kept is not None and not 0 <= kept <= v:
        raise ValueError(f"kept is {kept}; of {v} visual tokens, the valid range is 0 to {v}")
    if reduction is None:
        return []
    steps = reduction.steps(v, _sizes(v, config), kept)
    if steps is None:
        raise ValueError(
            f"how many of {v} visual tokens {reduction.method} keeps depends on the image: say how many are kept before the decoder (--kept)"
        )
    return steps


def prefill_flops(
    t: int,
    v: int,
    config=None,
    *,
    N: int | None = None,
    h: int | None = None,
    m: int | None = None,
    L: int | None = None,
    shortv_layers: Sequence[int | str] | None = None,
    visual_reduction: dict | None = None,
    kept: int | None = None,
):
    """FLOPs of the whole prefill with ShortV layers and token reduction (numerator of Eq. 5).

    Args:
        t, v: text and visual tokens before any reduction.
        config: a ShortV, LLaVA or text config. Its `shortv_layers` and `visual_reduction` count unless one of `N`,
            `shortv_layers` and `visual_reduction` is given.
        N: number of ShortV layers, where it does not matter which.
        h, m, L: hidden size, FFN size and number of layers instead of the config's.
        shortv_layers, visual_reduction: instead of the config's.
        kept: visual tokens that reach the decoder, where the options do not say ([`kept_visual_tokens`]).

    Raises:
        ValueError: if N is not in 0..L, if a method drops tokens in the middle of the stack and N does not say which
            layers are frozen, or for bad options.
    """
    if L is None:
        if config is None:
            raise ValueError("pass a config, or L with h and m")
        L = config.get_text_config().num_hidden_layers
    if N is None and shortv_layers is None and visual_reduction is None:
        shortv_layers = getattr(config, "shortv_layers", ())
        visual_reduction = getattr(config, "visual_reduction", None)
    if N is not None and shortv_layers is not None:
        raise ValueError("pass N or shortv_layers, not both")
    N = 0 if N is None else N
    if not 0 <= N <= L:
        raise ValueError(f"N is {N}; the model has {L} layers, so the valid range is 0 to {L}")
    if shortv_layers is None and N and visual_reduction is not None:
        reduction = _parse(visual_reduction, v, config, L)
        if reduction is not None and reduction.in_decoder is not None:
            raise ValueError(
                f"{reduction.method} drops tokens at layer {reduction.in_decoder.layers[0]}: pass shortv_layers instead of "
                f"N = {N}"
            )
    counts = visual_tokens_by_layer(v, L, visual_reduction, config, kept=kept)
    attention, ffn = frozen_updates_in(
        range(N) if shortv_layers is None else shortv_layers, visual_reduction, v, config, L
    )
    return sum(
        layer_flops(t, count, config, attention_frozen=i in attention, ffn_frozen=i in ffn, h=h, m=m)
        for i, count in enumerate(counts)
    )


def frozen_updates_in(
    shortv_layers: Iterable[int | str], visual_reduction: dict | None, v: int, config, n_layers: int
) -> tuple[frozenset[int], frozenset[int]]:
    """Ids of the layers whose attention, and of those whose FFN, leaves visual tokens as they are, by the settings or
    because nobody reads what they would make of them (VTW's layer before its `k`)."""
    attention, ffn = frozen_updates(shortv_layers)
    reduction = _parse(visual_reduction, v, config, n_layers)
    dead = None if reduction is None or reduction.in_decoder is None else reduction.in_decoder.dead_layer
    return (attention, ffn) if dead is None else (attention | {dead}, ffn | {dead})


def flops_ratio(t: int, v: int, config=None, *, h=None, m=None, L=None, **reduced) -> float:
    """FLOPs over those of the dense model (Eq. 5), between 0 and 1. Arguments as in [`prefill_flops`]."""
    sparse = prefill_flops(t, v, config, h=h, m=m, L=L, **reduced)
    return sparse / prefill_flops(t, v, config, N=0, h=h, m=m, L=L)


def _check_counts(t: int, v: int):
    if t < 0 or v < 0 or t + v == 0:
        raise ValueError(f"t = {t} text and v = {v} visual tokens: both must be 0 or more, and not both 0")


def tower_flops(pictures: Sequence[int], config, visual_reduction: dict | None = None) -> int:
    """FLOPs of the layers of a vision tower, for pictures (images, tiles, frames) of so many patches.

    A layer of n tokens, C channels and an FFN of m: `8nC² + 4n²C + 4nCm`. One that merges r patches spares the FFN for
    them, and takes `4nC² + 2n²C` for scores (where Q, K and V are one projection, `6nC² + 2n²C`).

    Args:
        config: of the vision-language model; a CLIP, SigLIP or InternVL tower, or Qwen2-VL's.
        visual_reduction: its method may merge in the tower; others change nothing here.

    Raises:
        ValueError: for bad options, or another tower.
    """
    vision, sizes = config.vision_config, ModelSizes.of(config)
    if sizes.tower is None:
        raise ValueError(f"the FLOPs of a {vision.model_type!r} tower are not known")
    qwen = not hasattr(vision, "intermediate_size")
    width = vision.embed_dim if qwen else vision.hidden_size
    ffn = int(width * vision.mlp_ratio) if qwen else vision.intermediate_size
    reduction = parse_visual_reduction(visual_reduction, sizes)
    merging = None if reduction is None else reduction.in_tower
    total = 0
    for patches in pictures:
        others = sizes.tower.others
        for layer in range(sizes.vision_layers):
            n = patches + others
            total += 8 * n * width**2 + 4 * n**2 * width
            if merging is not None and layer in merging.layers:
                total += (6 if qwen else 4) * n * width**2 + 2 * n**2 * width
                patches -= merging.removed(patches, sizes.tower.unit)
            total += 4 * (patches + others) * width * ffn
    return total
