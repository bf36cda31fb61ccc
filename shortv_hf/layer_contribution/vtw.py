"""Where Visual Tokens Withdrawal may begin: the first layer after which the visual tokens are hardly missed.

For a layer K, the divergence is KL(P_VTW || P_dense) in nats between the next-token distributions after the prompt, with
all visual tokens withdrawn before layer K and with none, averaged over samples. The released code of VTW takes the first
K from 5 on whose divergence is at most 0.003 (LLaVA-1.5-7B), 0.0005 (13B) or 0.0001 (LLaVA-NeXT-7B), over 20 samples.
"""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from ..reduction import ModelSizes
from .kl import Settings, kl_to_dense


FIRST_LAYER = 5  # the released code looks at no earlier one


def withdrawal_divergences(
    model: Any, samples: Iterable[dict], layers: Iterable[int] | None = None, kl: str = "reverse"
) -> dict[int, float]:
    """Mean divergence in nats for every K of `layers` (default: from 5, or 1 in smaller models, to the last;
    never one that Qwen3-VL adds image features before). The model's ShortV layers stay frozen in both passes.

    Args:
        samples: model inputs as a processor returns them; every row counts as one.
        kl: "reverse" is KL(P_VTW || P_dense), the released code; "forward" is KL(P_dense || P_VTW).

    Raises:
        ValueError: no samples, an unknown direction, or a layer out of range.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    if layers is None:
        first = FIRST_LAYER if n_layers > FIRST_LAYER else 1
        layers = range(max(first, ModelSizes.of(model.config).deepstack), n_layers)
    layers, frozen = list(layers), tuple(model.settings[0])
    settings = [Settings(frozen, {"method": "vtw", "k": k}) for k in layers]
    rows = kl_to_dense(model, samples, settings, kl, dense=Settings(frozen), description="withdrawing visual tokens")
    return dict(zip(layers, rows.mean(1).tolist(), strict=True))


def first_layer_below(divergences: dict[int, float], max_kl: float, n_layers: int) -> int:
    """The lowest K whose divergence is at most `max_kl`; `n_layers`, at which nothing is withdrawn, if there is none.

    Raises:
        ValueError: if `max_kl` is not 0 or more.
    """
    if not max_kl >= 0:
        raise ValueError(f"max_kl is {max_kl!r}; it must be 0 or more (nats)")
    return min((k for k, value in divergences.items() if value <= max_kl), default=n_layers)


def choose_vtw_k(
    model: PreTrainedModel, samples: Iterable[dict], max_kl: float, kl: str = "reverse", layers=None
) -> int:
    """K for `{"method": "vtw", "k": K}`: the first of `layers` whose mean divergence is at most `max_kl` nats.

    Arguments and errors as in [`withdrawal_divergences`] and [`first_layer_below`]. The model's own reduction method is
    left as it was.
    """
    first_layer_below({}, max_kl, 0)  # before the passes
    divergences = withdrawal_divergences(model, samples, layers, kl)
    return first_layer_below(divergences, max_kl, model.config.get_text_config().num_hidden_layers)
