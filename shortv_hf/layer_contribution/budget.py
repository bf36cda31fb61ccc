"""How many layers of a ranking to freeze, by what it may cost or has to save."""

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from ..flops.equations import flops_ratio
from .kl import Settings, kl_to_dense
from .ranking import LayerRanking


@dataclass(frozen=True)
class Budget:
    """Exactly one of three.

    Attributes:
        num_layers: freeze this number of layers.
        flops_ratio: freeze as few as reach this share of the dense prefill's FLOPs (Eq. 5), above 0 up to 1.
        max_kl: freeze as many as cost at most this mean KL divergence, in nats.
    """

    num_layers: int | None = None
    flops_ratio: float | None = None
    max_kl: float | None = None

    def __post_init__(self):
        if sum(budget is not None for budget in (self.num_layers, self.flops_ratio, self.max_kl)) != 1:
            raise ValueError("give exactly one of num_layers, flops_ratio and max_kl")

    def check(self, config: PretrainedConfig, metric: str = "lc"):
        """Raises `ValueError` for what no ranking of a model with this config can meet; before the ranking, not after."""
        n_layers = config.get_text_config().num_hidden_layers
        if self.num_layers is not None and not 0 <= self.num_layers <= n_layers:
            raise ValueError(f"cannot freeze {self.num_layers} layers: the model has {n_layers}")
        if self.flops_ratio is not None and not 0 < self.flops_ratio <= 1:
            raise ValueError(f"flops_ratio is {self.flops_ratio}; the valid range is above 0 up to 1")
        if self.flops_ratio is not None and metric == "random":
            raise ValueError("flops_ratio needs the samples' numbers of tokens, and a random ranking has no samples")
        if self.max_kl is not None and not self.max_kl >= 0:
            raise ValueError(f"max_kl is {self.max_kl}; a KL divergence is 0 or more")


@dataclass(frozen=True)
class Cost:
    """What freezing the first `num_layers` layers of a ranking together costs and saves.

    Attributes:
        kl, kl_error: mean KL divergence from the dense model in nats, and its standard error (0 of one sample).
        flops_ratio: share of the dense prefill's FLOPs at the samples' mean t and v; `None` if the ranking knows no samples.
    """

    num_layers: int
    kl: float
    kl_error: float
    flops_ratio: float | None


def measure_costs(
    model: PreTrainedModel, samples: Iterable[dict], ranking: LayerRanking, numbers: Iterable[int], kl: str = "forward"
) -> list[Cost]:
    """The cost of freezing the first N layers of a ranking, for every N of `numbers`. Errors as [`kl_to_dense`]."""
    numbers = list(numbers)
    rows = kl_to_dense(
        model, samples, [Settings(ranking.layers(n)) for n in numbers], kl, description="KL of frozen layers"
    )
    errors = rows.std(1) / rows.shape[1] ** 0.5 if rows.shape[1] > 1 else rows.new_zeros(len(rows))
    return [
        Cost(n, float(row.mean()), float(error), flops_share(ranking, model.config, n))
        for n, row, error in zip(numbers, rows, errors, strict=True)
    ]


def flops_share(ranking: LayerRanking, config: PretrainedConfig, num_layers: int) -> float | None:
    """FLOPs ratio (Eq. 5) with `num_layers` frozen at the mean t and v of the ranking's samples, `None` without them."""
    if ranking.text_tokens is None or ranking.visual_tokens is None:
        return None
    t, v = ranking.text_tokens, ranking.visual_tokens
    return flops_ratio(t, v, config, N=num_layers)  # type: ignore[arg-type]  # means are no integers; Eq. 5 takes them too


def choose_by_flops(ranking: LayerRanking, config: PretrainedConfig, ratio: float) -> int:
    """The smallest N whose [`flops_share`] is at most `ratio`.

    Raises:
        ValueError: if freezing all layers is not enough, or the ranking knows no samples.
    """
    if ranking.text_tokens is None:
        raise ValueError(f"a {ranking.metric} ranking has no samples to take the numbers of tokens from")
    for n in range(len(ranking.order) + 1):
        reached = flops_share(ranking, config, n)
        assert reached is not None  # the ranking has samples
        if reached <= ratio:
            return n
    raise ValueError(f"a FLOPs ratio of {ratio} is out of reach: freezing all {n} layers gives {reached:.3f}")


def choose_by_kl(costs: Iterable[Cost], max_kl: float) -> int:
    """The largest N whose cost is at most `max_kl` nats; 0 if none is."""
    return max((cost.num_layers for cost in costs if cost.kl <= max_kl), default=0)
