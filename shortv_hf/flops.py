"""FLOPs of the language model's prefill, by the paper's equations (Section 3.2, Eq. 3-5).

As in the paper: attention blocks and FFNs of the decoder layers; a multiplication and an addition count as two; the
attention matrix is counted in full, causal or not; embeddings, norms, head and vision tower are left out.

The paper writes the attention projections as 4h² per token. Here they follow the text config: with grouped-query
attention, K and V are smaller. For the paper's models (no grouping) the two are the same.
"""

from dataclasses import dataclass


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


def layer_flops(t: int, v: int, config=None, *, frozen: bool = False, h: int | None = None, m: int | None = None):
    """FLOPs of one decoder layer in the prefill of `t` text and `v` visual tokens.

    Dense (Eq. 3): `2(t+v)(4h+3m)h + 4(t+v)²h`. `frozen=True`, a ShortV layer (Eq. 4): `2t(4h+3m)h + 4vh² + 4t(t+v)h`.
    """
    _check_counts(t, v)
    shape = layer_shape(config, h=h, m=m)
    n = t + v
    computed = t if frozen else n  # tokens that are queries and pass the FFN
    query_and_output = 4 * computed * shape.hidden_size * shape.query_size
    key_and_value = 4 * n * shape.hidden_size * shape.key_value_size
    attention = 4 * computed * n * shape.query_size
    ffn = 6 * computed * shape.hidden_size * shape.intermediate_size
    return query_and_output + key_and_value + attention + ffn


def prefill_flops(
    t: int,
    v: int,
    config=None,
    *,
    N: int | None = None,
    h: int | None = None,
    m: int | None = None,
    L: int | None = None,
):
    """FLOPs of the whole prefill, N of the L layers being ShortV layers (numerator of Eq. 5).

    N is that of a ShortV config unless given, and 0 where there is none; L comes from the config unless given.
    Raises `ValueError` if N is not in 0..L.
    """
    if L is None:
        if config is None:
            raise ValueError("pass a config, or L with h and m")
        L = config.get_text_config().num_hidden_layers
    if N is None:
        N = len(getattr(config, "shortv_layers", ()))
    if not 0 <= N <= L:
        raise ValueError(f"N is {N}; the model has {L} layers, so the valid range is 0 to {L}")
    dense = layer_flops(t, v, config, h=h, m=m)
    return (L - N) * dense + N * layer_flops(t, v, config, frozen=True, h=h, m=m)


def flops_ratio(t: int, v: int, config=None, *, N: int | None = None, h=None, m=None, L=None) -> float:
    """FLOPs of ShortV over those of the dense model (Eq. 5), between 0 and 1. N as in [`prefill_flops`]."""
    sparse = prefill_flops(t, v, config, N=N, h=h, m=m, L=L)
    return sparse / prefill_flops(t, v, config, N=0, h=h, m=m, L=L)


def _check_counts(t: int, v: int):
    if t < 0 or v < 0 or t + v == 0:
        raise ValueError(f"t = {t} text and v = {v} visual tokens: both must be 0 or more, and not both 0")
