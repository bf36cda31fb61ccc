"""VTW: from layer `k` on, no visual token."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .reduction import ModelSizes, StreamReduction, TokenMap, keep_only


@dataclass(frozen=True)
class VTW(StreamReduction):
    """Visual Tokens Withdrawal (Lin et al., AAAI 2025): all visual tokens leave before layer `k`. So nobody reads what layer
    `k` - 1 makes of them, and it need not be computed."""

    method: ClassVar[str] = "vtw"
    k: int = 16

    @property
    def dead_layer(self) -> int:
        return self.k - 1

    def count(self, v: int) -> int:
        return 0

    def reduce(self, scores: Tensor | None, groups: Tensor, counts: Tensor) -> TokenMap:
        return keep_only(groups == 0)

    @classmethod
    def candidates(cls, sizes: ModelSizes, v: int) -> list[dict[str, Any]]:
        return [{"k": k} for k in range(max(sizes.deepstack, 1), sizes.decoder_layers + 1)]
