"""Where Visual Tokens Withdrawal may begin: the first layer after which the visual tokens are hardly missed.

For a layer K, the divergence is KL(P_VTW || P_dense) in nats between the next-token distributions after the prompt, with
all visual tokens withdrawn before layer K and with none, averaged over samples. The released code of VTW takes the first
K from 5 on whose divergence is at most 0.003 (LLaVA-1.5-7B), 0.0005 (13B) or 0.0001 (LLaVA-NeXT-7B), over 20 samples.
"""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from .layer_contribution import KL_DIRECTIONS, divergence, last_logits, progress, to_device
from .reduction import ModelSizes


FIRST_LAYER = 5  # the released code looks at no earlier one


@torch.no_grad()
def withdrawal_divergences(
    model: PreTrainedModel, samples: Iterable[dict], layers: Iterable[int] | None = None, kl: str = "reverse"
) -> dict[int, float]:
    """Mean divergence in nats for every K of `layers` (default: from 5, or 1 in smaller models, to the last;
    never one that Qwen3-VL adds image features before).

    Args:
        samples: model inputs as a processor returns them; every row counts as one.
        kl: "reverse" is KL(P_VTW || P_dense), the released code; "forward" is KL(P_dense || P_VTW).

    Raises:
        ValueError: no samples, an unknown direction, or a layer out of range.
    """
    if kl not in KL_DIRECTIONS:
        raise ValueError(f"kl is {kl!r}; valid are {', '.join(KL_DIRECTIONS)}")
    n_layers = model.config.get_text_config().num_hidden_layers
    if layers is None:
        first = FIRST_LAYER if n_layers > FIRST_LAYER else 1
        layers = range(max(first, ModelSizes.of(model.config).deepstack), n_layers)
    layers = list(layers)
    totals, count = dict.fromkeys(layers, 0.0), 0
    for sample in progress(samples, "withdrawing visual tokens"):
        sample = to_device(model, sample)
        with model.using(visual_reduction=None):
            dense = last_logits(model, sample)
        count += len(dense)
        for k in layers:
            with model.using(visual_reduction={"method": "vtw", "k": k}):
                totals[k] += float(divergence(dense, last_logits(model, sample), kl).sum())
    if count == 0:
        raise ValueError("no samples to calibrate with")
    return {k: total / count for k, total in totals.items()}


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
    left as it was; its ShortV layers stay frozen in both passes.
    """
    first_layer_below({}, max_kl, 0)  # before the passes
    divergences = withdrawal_divergences(model, samples, layers, kl)
    return first_layer_below(divergences, max_kl, model.config.get_text_config().num_hidden_layers)
