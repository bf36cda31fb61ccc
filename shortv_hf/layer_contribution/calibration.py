"""From samples to the layers to freeze: what `shortv lc` does, without printing.

calibration = calibrate(model, samples, Budget(max_kl=0.01))
model.set_shortv_layers(calibration.layers)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from .budget import Budget, Cost, choose_by_flops, choose_by_kl, measure_costs
from .ranking import LayerRanking, check_choices, rank_layers


@dataclass
class Calibration:
    """A ranking, and what was chosen from it.

    Attributes:
        ranking: of the layers, for visual tokens.
        text_scores: the same metric for text tokens, one per layer, for comparison; `None` where it was not asked for, or
            the metric has none.
        layers: to freeze, the most ineffective first; `None` without a budget.
        cost: of freezing them together; `None` without a budget.
        costs: for every N from 0 to all layers where they were measured: without a budget (but of no "random" ranking), and
            with `max_kl`.
    """

    ranking: LayerRanking
    text_scores: list[float] | None = None
    layers: list[int | str] | None = None
    cost: Cost | None = None
    costs: list[Cost] = field(default_factory=list)


def calibrate(
    model: PreTrainedModel,
    samples: Iterable[dict] | None,
    budget: Budget | None = None,
    *,
    metric: str = "lc",
    kl: str = "forward",
    seed: int = 0,
    data: str | None = None,
    text: bool = False,
    on_scores: Callable[["Calibration"], None] | None = None,
) -> Calibration:
    """Rank the decoder layers, choose how many to freeze, and measure what that costs. The model stays as it was.

    Args:
        model: a ShortV model, or a stock one after `apply_shortv(model, [])`.
        samples: model inputs; kept for several passes unless they can be gone through again, as `data.Samples` can.
        budget: how many layers to choose; without one none are, and the cost of every number is measured.
        metric, kl, seed, data: as of [`rank_layers`].
        text: measure the layers for text tokens as well ("lc" and "cosine").
        on_scores: called with what is known as soon as there is a ranking, and again with the scores for text tokens: what
            follows can still fail.

    Raises:
        ValueError: as [`rank_layers`]; a budget that is out of range, before any pass, or out of reach.
    """
    check_choices(metric, kl=kl)
    if budget is not None:
        budget.check(model.config, metric)
    if samples is None:  # enough for a random ranking
        samples = ()
    elif iter(samples) is samples:
        samples = list(samples)
    options: dict[str, Any] = {"kl": kl, "seed": seed, "data": data}
    found = Calibration(rank_layers(model, samples, metric, **options))
    if on_scores is not None:
        on_scores(found)
    if text and metric in ("lc", "cosine"):
        found.text_scores = rank_layers(model, samples, metric, "text", **options).scores
        if on_scores is not None:
            on_scores(found)
    ranking = found.ranking
    if budget is None:
        if metric != "random":
            found.costs = measure_costs(model, samples, ranking, range(len(ranking.order) + 1), kl)
        return found
    if budget.max_kl is not None:
        found.costs = measure_costs(model, samples, ranking, range(len(ranking.order) + 1), kl)
        n = choose_by_kl(found.costs, budget.max_kl)
        found.cost = found.costs[n]
    else:
        if budget.num_layers is not None:
            n = budget.num_layers
        else:
            assert budget.flops_ratio is not None  # a budget gives one of the three
            n = choose_by_flops(ranking, model.config, budget.flops_ratio)
        (found.cost,) = measure_costs(model, samples, ranking, [n], kl)
    found.layers = ranking.layers(n)
    return found
