"""From what each change costs alone to schedules that are worth measuring together.

KL divergences of changes are taken to add up; they do not quite, which is why what is chosen here is measured afterwards.
On a small model, sums rank sets nearly as well as anything dearer does, and noise of the samples matters more.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from ..configuration_shortv import frozen_updates
from ..flops.equations import frozen_updates_in, layer_flops
from ..layer_contribution.kl import Settings
from .knapsack import Knapsack, Option
from .space import Space


MOST_KL = 1.0  # nats; what seems to cost more is measured only where the budget asks for it


@dataclass(frozen=True)
class Prompt:
    """The mean prompt of the samples, to count FLOPs by: `t` text and `v` visual tokens.

    Attributes:
        left: the share of the visual tokens that each decoder layer sees, by the reduction as JSON; all, of those not in it.
    """

    config: PretrainedConfig
    t: float
    v: float
    left: dict[str, list[float]] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        return self.config.get_text_config().num_hidden_layers

    def counts(self, reduction: dict | None) -> list[float]:
        """Visual tokens that each layer sees."""
        if reduction is not None and reduction["method"] == "vtw":
            return [self.v if layer < reduction["k"] else 0.0 for layer in range(self.n_layers)]
        return [self.v * share for share in self.left.get(key_of(reduction), [1.0] * self.n_layers)]

    def layer(self, count: float, attention_frozen: bool = False, ffn_frozen: bool = False) -> float:
        """FLOPs of a decoder layer that sees `count` visual tokens."""
        frozen = {"attention_frozen": attention_frozen, "ffn_frozen": ffn_frozen}
        return layer_flops(self.t, count, self.config, **frozen)  # type: ignore[arg-type]  # means are no integers

    @property
    def dense(self) -> float:
        return self.n_layers * self.layer(self.v)

    def flops_ratio(self, settings: Settings) -> float:
        """FLOPs of the prefill over those of the dense model (Eq. 5)."""
        attention, ffn = self.frozen(settings)
        counts = enumerate(self.counts(settings.visual_reduction))
        return sum(self.layer(n, i in attention, i in ffn) for i, n in counts) / self.dense

    def frozen(self, settings: Settings) -> tuple[frozenset[int], frozenset[int]]:
        """Layers whose attention, and whose FFN, leaves visual tokens as they are."""
        v = round(self.v)
        return frozen_updates_in(settings.shortv_layers, settings.visual_reduction, v, self.config, self.n_layers)

    def cache_ratio(self, settings: Settings) -> float:
        """Length of the KV cache after the prefill over that of the dense model."""
        kept = sum(self.t + n for n in self.counts(settings.visual_reduction))
        return kept / (self.n_layers * (self.t + self.v))


def key_of(reduction: dict | None) -> str:
    return json.dumps(reduction, sort_keys=True)


@dataclass(frozen=True)
class Schedule:
    """A set of changes, with the KL in nats that they add up to."""

    settings: Settings
    predicted_kl: float


class Schedules:
    """The best schedules by what each change costs alone.

    Args:
        space: what there is to choose among.
        alone: mean KL of its "entries", "tails" and "reductions" alone.
        prompt: to count FLOPs by; knows what the reductions leave.
    """

    def __init__(self, space: Space, alone: dict[str, list[float]], prompt: Prompt):
        self.prompt = prompt
        self.kl = dict(zip(space.entries, alone["entries"], strict=True))
        tails: list[dict[str, Any]] = [{"method": "vtw", "k": k} for k in space.tails]
        reduced: list[tuple[dict | None, float]] = [(None, 0.0)]
        reduced += zip([*tails, *space.reductions], [*alone["tails"], *alone["reductions"]], strict=True)
        self.reductions = [
            (reduction, kl, prompt.flops_ratio(Settings((), reduction)), self._knapsack(reduction))
            for reduction, kl in reduced
        ]

    def _knapsack(self, reduction: dict | None) -> Knapsack:
        """What can be frozen beside a reduction, a group for each layer that still sees visual tokens."""
        dead, _ = self.prompt.frozen(Settings((), reduction))
        groups = []
        for layer, count in enumerate(self.prompt.counts(reduction)):
            if count == 0 or layer in dead:
                continue
            full, group = self.prompt.layer(count), []
            for entry, kl in self.kl.items():
                attention, ffn = frozen_updates([entry])
                if layer in attention | ffn:
                    saved = full - self.prompt.layer(count, bool(attention), bool(ffn))
                    group.append(Option(entry, saved, max(kl, 0.0)))  # rounding can make it negative
            groups.append(group)
        return Knapsack(groups)

    def within(self, flops_ratio: float) -> list[Schedule]:
        """For each reduction that can reach this share of the dense FLOPs, its best schedule; the best first."""
        found = []
        for reduction, kl, share, knapsack in self.reductions:
            solved = knapsack.solve((share - flops_ratio) * self.prompt.dense)
            if solved is not None:
                entries = sorted((option.name for option in solved[1]), key=lambda entry: self.kl[entry])
                found.append(Schedule(Settings(tuple(entries), reduction), kl + solved[0]))
        return sorted(found, key=lambda schedule: schedule.predicted_kl)

    def finalists(self, number: int, flops_ratio: float | None = None, max_kl: float | None = None) -> list[Schedule]:
        """About `number` schedules to measure: over the whole range of FLOPs, and close by the budget."""
        levels, most = [level / 100 for level in range(1, 100)], max(MOST_KL, 1.5 * (max_kl or 0.0))
        best = {level: found[0] for level in levels if (found := self.within(level)) and found[0].predicted_kl <= most}
        spread = _evenly(list(best), number // 2)
        chosen = [best[level] for level in spread]
        if flops_ratio is not None:
            chosen += self.within(flops_ratio)[: number - len(chosen)]
        elif max_kl is not None:
            # Sums are rather too low than too high, so what seems to cost much less than the limit is looked at, too.
            near = [level for level in best if 0.2 * max_kl <= best[level].predicted_kl <= 1.5 * max_kl]
            chosen += [best[level] for level in _evenly(near, number - len(chosen))]
        else:
            chosen += [best[level] for level in _evenly([each for each in best if each not in spread], number // 2)]
        return unique(chosen)


def unique(schedules: Iterable[Schedule]) -> list[Schedule]:
    """Those with other settings than all before."""
    found: dict[str, Schedule] = {}
    for each in schedules:
        found.setdefault(settings_key(each.settings), each)
    return list(found.values())


def settings_key(settings: Settings) -> str:
    return json.dumps([sorted(map(str, settings.shortv_layers)), key_of(settings.visual_reduction)])


def _evenly(values: Sequence[float], number: int) -> list[float]:
    """`number` of the values, the first and the last among them, at even distances."""
    if len(values) <= number or number < 2:
        return list(values[:number]) if number < 2 else list(values)
    return [values[round(i * (len(values) - 1) / (number - 1))] for i in range(number)]
