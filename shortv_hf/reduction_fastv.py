"""FastV: from layer `k` on, only the visual tokens stay that the prompt's last token attends to most."""

from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from torch import Tensor

from .reduction import ModelSizes, StreamReduction, TokenMap, keep_highest, keep_only


@dataclass(frozen=True)
class FastV(StreamReduction):
    """FastV (Chen et al., ECCV 2024, "An Image is Worth 1/2 Tokens After Layer 2"; semantics of the released code).

    Of a row's v visual tokens, `round(v * (1 - ratio))` with the highest score stay from layer `k` on. Score: attention
    of the row's last token in layer k - 1, float32 softmax, mean over heads.
    """

    method: ClassVar[str] = "fastv"
    k: int = 2
    ratio: float = 0.5

    def check(self, sizes: ModelSizes) -> None:
        super().check(sizes)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, Real) or not 0 <= self.ratio <= 1:
            raise ValueError(f"fastv: ratio is {self.ratio!r}; the valid range is 0 to 1 (the fraction dropped)")

    def identity(self, sizes: ModelSizes) -> bool:
        return self.ratio == 0 or super().identity(sizes)

    @property
    def needs_scores(self) -> bool:
        return 0 < self.ratio < 1

    def count(self, v: int) -> int:
        return round(v * (1 - self.ratio))  # half to even, as the released code

    def reduce(self, scores: Tensor | None, groups: Tensor, counts: Tensor) -> TokenMap:
        text = groups == 0
        return keep_only(text if scores is None else text | keep_highest(scores, groups, counts))

    @classmethod
    def candidates(cls, sizes: ModelSizes, v: int) -> list[dict[str, Any]]:
        k = max(min(2, sizes.decoder_layers - 1), sizes.deepstack)
        return [{"k": k, "ratio": round(1 - rank / v, 6)} for rank in range(v + 1)]
