"""What a prefill costs: by the paper's equations, by a device's roofline, and measured."""

from .. import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "equations": (
            "flops_ratio", "kept_visual_tokens", "layer_flops", "layer_shape", "prefill_flops", "tower_flops",
            "visual_tokens_by_layer", "visual_tokens_of",
        ),
    },
)  # fmt: skip
