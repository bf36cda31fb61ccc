"""Which options to take, one of each group at most, so that they save enough at the least loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


UNITS = 20_000  # savings are counted in these; each is rounded down, so what is promised is saved


@dataclass(frozen=True)
class Option:
    """What can be taken: `saving` (of any unit) and `loss` add up over what is taken."""

    name: int | str
    saving: float
    loss: float


class Knapsack:
    """The multiple-choice knapsack problem, solved for all savings at once by dynamic programming.

    Args:
        groups: of options, of which at most one each is taken.
    """

    def __init__(self, groups: Sequence[Sequence[Option]]):
        self.groups = groups
        self.most = sum(max((option.saving for option in group), default=0.0) for group in groups)
        self._unit = max(self.most, 1e-30) / UNITS
        best = torch.full((UNITS + 1,), torch.inf, dtype=torch.float64)
        best[0] = 0.0
        self._taken: list[torch.Tensor] = []  # by group: the number of the option plus 1 that leads to each saving
        for group in groups:
            new, taken = best.clone(), torch.zeros(UNITS + 1, dtype=torch.int8)
            for number, option in enumerate(group, start=1):
                units = self._units(option)
                with_it = best[: UNITS + 1 - units] + option.loss
                better = with_it < new[units:]
                new[units:][better] = with_it[better]
                taken[units:][better] = number
            best = new
            self._taken.append(taken)
        self._best = best

    def _units(self, option: Option) -> int:
        return int(option.saving / self._unit + 1e-9)  # what is whole stays so

    def solve(self, saving: float) -> tuple[float, list[Option]] | None:
        """The least loss at which at least `saving` is saved, and the options that do it; `None` if all cannot."""
        first = max(-(-saving // self._unit), 0) if saving > 0 else 0
        if first > UNITS:
            return None
        place = int(first) + int(self._best[int(first) :].argmin())
        loss = float(self._best[place])
        if loss == float("inf"):
            return None
        chosen = []
        for group, taken in zip(reversed(self.groups), reversed(self._taken), strict=True):
            number = int(taken[place])
            if number:
                chosen.append(group[number - 1])
                place -= self._units(group[number - 1])
        return loss, chosen[::-1]
