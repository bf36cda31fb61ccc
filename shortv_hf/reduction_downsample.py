"""Baseline: an image of fewer tokens, each the mean of a window."""

from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

import torch

from .reduction import ImageReduction, ModelSizes, Patches, TokenMap


@dataclass(frozen=True)
class Downsample(ImageReduction):
    """Baseline: average the grid of patches over windows of `factor` in height and width. A token takes the place of its
    window's first patch; windows at the edge of a grid that `factor` does not divide are smaller."""

    method: ClassVar[str] = "downsample"
    merges: ClassVar[bool] = True
    factor: int = 2

    def check(self, sizes: ModelSizes):
        super().check(sizes)
        if sizes.patches is None:
            if isinstance(self.factor, bool) or not isinstance(self.factor, Integral) or self.factor < 1:
                raise ValueError(f"downsample: factor is {self.factor!r}; the valid range is the integers 1 on")
            return
        side = round(sizes.patches**0.5)
        valid = [factor for factor in range(1, side + 1) if side % factor == 0]
        if isinstance(self.factor, bool) or not isinstance(self.factor, Integral) or self.factor not in valid:
            raise ValueError(
                f"downsample: factor is {self.factor!r}; with {side} x {side} patches, valid are "
                f"{', '.join(map(str, valid))}"
            )

    def identity(self, sizes: ModelSizes) -> bool:
        return self.factor == 1

    def left(self, v: int, sizes: ModelSizes) -> int | None:
        return None if sizes.patches is None else v // self.factor**2

    def reduce(self, image: Patches) -> TokenMap:
        if image.height is None or image.width is None:
            raise ValueError("downsample needs a grid of patches, which this model's images do not have")
        row, column = image.patch // image.width, image.patch % image.width
        window = (row - row % self.factor) * image.width + column - column % self.factor
        target = image.tile * (image.height * image.width) + window
        size = torch.bincount(target, minlength=len(target))
        return TokenMap(len(target), target, size[target].float().reciprocal())
