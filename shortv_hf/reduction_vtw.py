"""VTW: all visual tokens leave the decoder at one layer."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .reduction import ModelSizes, StreamReduction, TokenMap


@dataclass(frozen=True)
class VTW(StreamReduction):
    """Visual Tokens Withdrawal (Lin et al., AAAI 2025): all visual tokens leave before layer `k`."""

    method: ClassVar[str] = "vtw"
    k: int = 16

    def identity(self, sizes: ModelSizes) -> bool:
        return self.k == sizes.decoder_layers

    def count(self, v: int) -> int:
        return 0

    def reduce(self, scores: Tensor | None, visual: Tensor, counts: Tensor) -> TokenMap:
        return TokenMap.keeping(~visual)
