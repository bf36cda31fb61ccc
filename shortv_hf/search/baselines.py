"""What a schedule is compared with: one method at a time, at several costs."""

from collections.abc import Sequence

from ..layer_contribution.kl import Settings
from .choose import Prompt
from .space import options_of


POINTS = 5  # of a curve
SHARES = (0.75, 0.5, 0.25)  # of the visual tokens
TOKEN_BASELINES = ("fastv", "random", "downsample")


def baselines(
    layer_kl: dict[int | str, float], tails: tuple[int, ...], prompt: Prompt, methods: Sequence[str]
) -> list[tuple[str, Settings]]:
    """Methods by name, each with settings: LC (whole layers in the order of `layer_kl`, their KL alone: ShortV), VTW at some
    of the `tails`, and those of the `methods` that drop tokens."""
    order: list[int | str] = sorted(
        (each for each in layer_kl if isinstance(each, int)), key=lambda each: layer_kl[each]
    )
    n_layers = prompt.n_layers
    numbers = sorted({max(round(n_layers * (i + 1) / (POINTS + 1)), 1) for i in range(POINTS)} | {n_layers})
    found = [("LC", Settings(tuple(order[:n]))) for n in numbers if len(order) >= n]
    places = sorted({round(i * (len(tails) - 1) / (POINTS - 1)) for i in range(POINTS)}) if tails else []
    found += [("VTW", Settings((), {"method": "vtw", "k": tails[place]})) for place in places]
    for method in (each for each in TOKEN_BASELINES if each in methods):
        found += [
            (method, Settings((), options)) for options in options_of(method, prompt.config, round(prompt.v), SHARES)
        ]
    return found
