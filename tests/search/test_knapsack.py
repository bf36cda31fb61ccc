"""The knapsack, against all combinations."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortv_hf.search.knapsack import UNITS, Knapsack, Option


pytestmark = pytest.mark.once

VALUES = st.floats(0, 1).map(lambda value: round(value, 3))
GROUPS = st.lists(st.lists(st.tuples(VALUES, VALUES), max_size=3), max_size=5)


def combinations(groups):
    for chosen in product(*([None, *group] for group in groups)):
        taken = [option for option in chosen if option is not None]
        yield sum(each.saving for each in taken), sum(each.loss for each in taken)


@settings(deadline=None)
@given(groups=GROUPS, share=st.floats(0, 1.1))
def test_equals_trying_everything(groups, share):
    groups = [[Option(f"{i}.{j}", *option) for j, option in enumerate(group)] for i, group in enumerate(groups)]
    knapsack = Knapsack(groups)
    wanted = share * knapsack.most
    found = knapsack.solve(wanted)
    slack = knapsack.most * len(groups) / UNITS  # savings are rounded down
    possible = [loss for saving, loss in combinations(groups) if saving >= wanted]
    surely = [loss for saving, loss in combinations(groups) if saving >= wanted + slack]
    if found is None:
        assert not surely
        return
    loss, options = found
    assert loss == pytest.approx(sum(option.loss for option in options))
    assert sum(option.saving for option in options) >= wanted - 1e-9
    assert min(possible) - 1e-9 <= loss <= min(surely, default=float("inf")) + 1e-9
    assert len({option.name.split(".")[0] for option in options}) == len(options)  # one of each group
