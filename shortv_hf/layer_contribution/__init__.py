"""Which layers to freeze: rankings, what freezing costs, and calibration, which puts the two together."""

from .. import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "budget": ("Budget", "Cost"),
        "calibration": ("Calibration", "calibrate"),
        "freezing": ("frozen_tokens",),
        "kl": ("Settings", "kl_to_dense"),
        "ranking": ("LayerRanking", "rank_layers"),
        "vtw": ("choose_vtw_k",),
    },
)
