"""What settings cost: the KL divergence of the next-token distribution from the dense model's (paper Section 2.2).

In nats, at the last position of the prompt, one value per sample:

    KL(P_dense || P_settings)     `kl="forward"`, the paper
    KL(P_settings || P_dense)     `kl="reverse"`, the authors' released code
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data import processes
from ..data.inputs import feature_mask, last_positions, to_device
from .freezing import check_model, check_tokens, frozen_tokens, measuring


KL_DIRECTIONS = ("forward", "reverse")


@dataclass(frozen=True)
class Settings:
    """What a model is set to while it is measured; nothing frozen and nothing dropped unless said.

    Attributes:
        shortv_layers: decoder layers that freeze `tokens`.
        visual_reduction: as the config's field.
        tokens: what the layers freeze, "visual" (ShortV), "text" or "all" ([`freezing.frozen_tokens`]).
    """

    shortv_layers: Sequence[int | str] = ()
    visual_reduction: dict | None = None
    tokens: str = "visual"

    def check(self):
        """Raises `ValueError` for a reduction with other tokens than "visual", and for unknown ones."""
        check_tokens(self.tokens)
        if self.visual_reduction is not None and self.tokens != "visual":
            raise ValueError(f"a reduction drops visual tokens; it does not go with freezing {self.tokens} tokens")


DENSE = Settings()


def kl_to_dense(
    model: PreTrainedModel,
    samples: Iterable[dict],
    settings: Iterable[Settings],
    kl: str = "forward",
    *,
    dense: Settings = DENSE,
    description: str = "KL from the dense model",
) -> torch.Tensor:
    """Divergence of each of the `settings` from the dense model on each sample, with one dense pass per sample. Processes
    that have joined (`data/processes.py`) take a share of the samples each, and all have the result.

    Args:
        model: a ShortV model, or a stock one after `apply_shortv(model, [])`; what it is set to does not count.
        samples: model inputs as a processor returns them; every row counts as one.
        settings: gone through for each sample.
        kl: "forward" or "reverse".
        dense: what counts as dense.
        description: of the progress bar.

    Returns:
        `[n_settings, n_samples]` float64, in nats, on the CPU. The mean over samples is the joint KL of a setting.

    Raises:
        ValueError: for bad settings, an unknown direction, no samples, or a model that cannot freeze visual tokens.
    """
    settings = list(settings)
    check_direction(kl)
    for each in settings:
        each.check()
    check_model(model)
    own = []
    for number, sample in processes.share(logging.tqdm(samples, desc=description)):
        with measuring(model):
            sample = to_device(model, sample)
            target = logits_with(model, sample, dense)
            rows = [divergence(target, logits_with(model, sample, each), kl) for each in settings]
            own.append((number, torch.stack(rows).double().cpu() if rows else torch.empty(0, len(target))))
    columns = [column for _, column in sorted(processes.gather(own), key=lambda pair: pair[0])]
    if not columns:
        raise ValueError("no samples: the KL needs at least one")
    return torch.cat(columns, dim=1)


def logits_with(model: Any, sample: dict, settings: Settings) -> torch.Tensor:
    """[`last_logits`] of a model that is set so for this pass."""
    with (
        model.using(visual_reduction=settings.visual_reduction),
        frozen_tokens(model, list(settings.shortv_layers), settings.tokens),
    ):
        return last_logits(model, sample)


def check_direction(kl: str):
    """Raises `ValueError` for an unknown KL direction."""
    if kl not in KL_DIRECTIONS:
        raise ValueError(f"unknown kl {kl!r}; use one of {', '.join(KL_DIRECTIONS)}")


def divergence(dense: torch.Tensor, frozen: torch.Tensor, kl: str) -> torch.Tensor:
    """KL divergence per row of logits `[B, V]`, in nats and float32: `[B]`."""
    dense, frozen = dense.float().log_softmax(-1), frozen.to(dense.device).float().log_softmax(-1)
    p, q = (dense, frozen) if kl == "forward" else (frozen, dense)
    return nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def last_logits(model: PreTrainedModel, sample: dict) -> torch.Tensor:
    """Logits at the last position of each row, `[B, V]` float32."""
    states = model.model(**sample, use_cache=False).last_hidden_state
    last = last_positions(feature_mask(model.config, sample), sample.get("attention_mask")).to(states.device)
    return model.lm_head(states[torch.arange(len(states), device=states.device), last]).float()
