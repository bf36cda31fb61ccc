"""The least time that a prefill can take on a device: arithmetic at its peak, or the weights at its memory bandwidth.

A part of a layer (one group of matrix products) takes at least `max(FLOPs / peak, bytes / bandwidth)`. With many tokens
the first is larger; where only a short text stream is computed, the weights still have to be read, and the second can
be. That is why a ratio of FLOPs can promise more than a device can keep. Counted are the weights of the products and
the keys and values that attention reads; activations are not, so real times are longer. Attention counts in full, as in
Eq. 3-5, though a causal kernel skips up to half of a dense layer's.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .equations import layer_shape


@dataclass(frozen=True)
class Peak:
    """What a device can do: FLOP/s of dense matrix products in one dtype, and bytes/s of its memory. `source` says
    where the two come from."""

    flops_per_s: float
    bytes_per_s: float
    source: str


DATA_SHEETS = {  # part of the name that torch gives (a GH200 is no H200): dense 16-bit FLOP/s, bytes/s
    "A100-SXM4-40GB": (312e12, 1.555e12),
    "A100-SXM4-80GB": (312e12, 2.039e12),
    "A100 80GB PCIe": (312e12, 1.935e12),
    "H100 80GB HBM3": (989e12, 3.35e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H200 NVL": (835e12, 4.8e12),
    "NVIDIA H200": (989e12, 4.8e12),
}


def layer_parts(
    t: int,
    v: int,
    config,
    *,
    attention_frozen: bool = False,
    ffn_frozen: bool = False,
    batch: int = 1,
    value_bytes: int = 2,
):
    """`(FLOPs, bytes)` of each part of one decoder layer: Q and output, K and V, attention, FFN.

    Args:
        t, v: text and visual tokens of a row in this layer.
        config: a text config or a LLaVA config.
        attention_frozen, ffn_frozen: whether the layer's attention, and its FFN, leave visual tokens as they are.
        batch: rows.
        value_bytes: size of one weight.
    """
    shape = layer_shape(config)
    n = t + v
    queries, fed = t if attention_frozen else n, t if ffn_frozen else n
    weights = {
        "query_and_output": 2 * shape.hidden_size * shape.query_size,
        "key_and_value": 2 * shape.hidden_size * shape.key_value_size,
        "ffn": 3 * shape.hidden_size * shape.intermediate_size,
    }
    parts = [
        (2 * batch * queries * weights["query_and_output"], value_bytes * weights["query_and_output"]),
        (2 * batch * n * weights["key_and_value"], value_bytes * weights["key_and_value"]),
        (2 * batch * fed * weights["ffn"], value_bytes * weights["ffn"]),
    ]
    keys_and_values = 2 * batch * n * shape.key_value_size
    return [*parts, (4 * batch * queries * n * shape.query_size, value_bytes * keys_and_values)]


def prefill_seconds(
    layers: Iterable[tuple[int, bool, bool]], t: int, config, peak: Peak, *, batch: int = 1, value_bytes: int = 2
) -> float:
    """Least time of the decoder layers' prefill; `layers` holds, per layer, its visual tokens and whether its attention and
    its FFN leave them as they are. The other arguments are those of [`layer_parts`]."""
    return sum(
        max(flops / peak.flops_per_s, size / peak.bytes_per_s)
        for v, attention, ffn in layers
        for flops, size in layer_parts(
            t, v, config, attention_frozen=attention, ffn_frozen=ffn, batch=batch, value_bytes=value_bytes
        )
    )


def device_peak(device: torch.device, dtype: torch.dtype, tflops: float | None, gbytes: float | None) -> Peak:
    """The peak of a device: `tflops` (10¹² FLOP/s) and `gbytes` (10⁹ bytes/s) where given, else from the data sheet of a
    known GPU in a 16-bit dtype, else from a probe.

    Raises:
        ValueError: if only one of the two is given, or one is not positive.
    """
    if (tflops is None) != (gbytes is None):
        raise ValueError("--peak-tflops and --bandwidth-gbs go together")
    if tflops is not None and gbytes is not None:
        if min(tflops, gbytes) <= 0:
            raise ValueError(f"a peak of {tflops} TFLOP/s and {gbytes} GB/s: both must be above 0")
        return Peak(tflops * 1e12, gbytes * 1e9, "given")
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for part, numbers in DATA_SHEETS.items():
            if part in name:
                return Peak(*numbers, "data sheet")
    return probe_peak(device, dtype)


def probe_peak(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> Peak:
    """A rough peak: the fastest of a few products of `size` x `size` matrices, and of a few copies of 16 such."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(16, size, size, device=device, dtype=dtype)
    target = torch.empty_like(source)

    def fastest(function) -> float:
        seconds = []
        for _ in range(repeats + 1):  # the first warms up
            _synchronize(device)
            start = time.perf_counter()
            function()
            _synchronize(device)
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    flops_per_s = 2 * size**3 / fastest(lambda: left @ right)
    moved = 2 * source.numel() * source.element_size()  # read and written
    return Peak(flops_per_s, moved / fastest(lambda: target.copy_(source)), "probe")


def _synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
