"""Baseline: a random subset of the patches."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .reduction import ImageReduction, ModelSizes, Patches, TokenMap, keep_in_tiles, left_of_tiles, require_integer


@dataclass(frozen=True)
class RandomSubset(ImageReduction):
    """Keeps `token_num` random patches of every tile, or of the whole image or video where tiles are not known or are
    frames; the same for every image and every call with the same `seed`."""

    method: ClassVar[str] = "random"
    token_num: int = 128
    seed: int = 0

    def check(self, sizes: ModelSizes) -> None:
        super().check(sizes)
        require_integer(self, "token_num", 1, sizes.patches)
        require_integer(self, "seed", 0, 2**63 - 1)

    def identity(self, sizes: ModelSizes) -> bool:
        return self.token_num == sizes.patches

    def left(self, v: int, sizes: ModelSizes, tiles: int | None = None) -> int | None:
        return left_of_tiles(self.token_num, v, sizes, tiles)

    def reduce(self, image: Patches) -> TokenMap:
        image = image.as_one_tile() if image.video else image
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(image.tiles, image.per_tile, generator=generator, device="cpu")  # tiles differ
        return keep_in_tiles(scores.to(image.patch.device), image, self.token_num)

    @classmethod
    def candidates(cls, sizes: ModelSizes, v: int) -> list[dict[str, Any]]:
        return [{"token_num": number, "seed": 0} for number in range(1, (sizes.patches or v) + 1)]
