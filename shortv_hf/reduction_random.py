"""Baseline: a random subset of the visual tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .reduction import ModelSizes, Patches, SelectingReduction, TokenMap, require_integer


@dataclass(frozen=True)
class RandomSubset(SelectingReduction):
    """Baseline: `token_num` random tokens of every tile, or of every image or video whose tiles are not known; the same
    ones for every image of a shape and every call with the same `seed`."""

    method: ClassVar[str] = "random"
    token_num: int = 128
    seed: int = 0

    def check(self, sizes: ModelSizes):
        super().check(sizes)
        require_integer(self, "seed", 0, 2**63 - 1)

    def reduce(self, image: Patches) -> TokenMap:
        generator = torch.Generator().manual_seed(self.seed)
        patches = int(image.patch.max()) + 1 if image.height is None else image.height * image.width
        return TokenMap.keeping(image.highest(torch.rand(image.tiles, patches, generator=generator), self.token_num))
