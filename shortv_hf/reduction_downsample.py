"""Baseline: the grid of patches, average-pooled."""

from dataclasses import dataclass
from math import isqrt
from numbers import Integral
from typing import Any, ClassVar

import torch

from .reduction import ImageReduction, ModelSizes, Patches, TokenMap, require_integer


@dataclass(frozen=True)
class Downsample(ImageReduction):
    """Averages windows of `factor` x `factor` patches; of a video, frame by frame. The token of a window takes the place
    of its first patch. Windows at the right and lower edge are smaller where the factor does not divide the grid, which
    only grids that vary between images allow."""

    method: ClassVar[str] = "downsample"
    merges: ClassVar[bool] = True
    factor: int = 2

    def check(self, sizes: ModelSizes) -> None:
        super().check(sizes)
        if sizes.patches is None:
            require_integer(self, "factor", 1)
            return
        valid = divisors(isqrt(sizes.patches))
        if isinstance(self.factor, bool) or not isinstance(self.factor, Integral) or self.factor not in valid:
            side = isqrt(sizes.patches)
            raise ValueError(
                f"downsample: factor is {self.factor!r}; with {side} x {side} patches, valid are "
                f"{', '.join(map(str, valid))}"
            )

    def identity(self, sizes: ModelSizes) -> bool:
        return self.factor == 1

    def left(self, v: int, sizes: ModelSizes, tiles: int | None = None) -> int | None:
        return None if sizes.patches is None else v // self.factor**2

    def reduce(self, image: Patches) -> TokenMap:
        height, width, factor = image.height, image.width, self.factor
        if height is None or width is None:
            raise ValueError(
                f"downsample needs a grid of patches; that of an image with {len(image.patch)} tokens is not known"
            )
        top = image.patch // width // factor * factor
        left = image.patch % width // factor * factor
        size = (height - top).clamp(max=factor) * (width - left).clamp(max=factor)
        first = (image.tile * height + top) * width + left
        return TokenMap(first, len(first), weight=size.to(torch.float32).reciprocal())

    @classmethod
    def candidates(cls, sizes: ModelSizes, v: int) -> list[dict[str, Any]]:
        return [{"factor": factor} for factor in divisors(isqrt(sizes.patches or v))]


def divisors(side: int) -> list[int]:
    """Those of `side`, which leave no patch over."""
    return [factor for factor in range(1, side + 1) if side % factor == 0]
