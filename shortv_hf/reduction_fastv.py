"""FastV: visual tokens to which the prompt's last token pays little attention leave the decoder."""

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

from torch import Tensor

from .reduction import ModelSizes, StreamReduction, TokenMap, keep_highest


@dataclass(frozen=True)
class FastV(StreamReduction):
    """FastV (Chen et al., ECCV 2024, "An Image is Worth 1/2 Tokens After Layer 2"; semantics of the released code).

    Of a row's v visual tokens, `round(v * (1 - ratio))` with the highest score stay from layer `k` on. Score: attention
    of the row's last token in layer k - 1, float32 softmax, mean over heads.
    """

    method: ClassVar[str] = "fastv"
    k: int = 2
    ratio: float = 0.5

    def check(self, sizes: ModelSizes):
        super().check(sizes)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, Real) or not 0 <= self.ratio <= 1:
            raise ValueError(f"fastv: ratio is {self.ratio!r}; the valid range is 0 to 1 (the fraction dropped)")

    def identity(self, sizes: ModelSizes) -> bool:
        return self.ratio == 0 or self.k == sizes.decoder_layers

    @property
    def looks_at_last_token(self) -> bool:  # type: ignore[override]
        return 0 < self.ratio < 1

    @property
    def needs_scores(self) -> bool:
        return self.looks_at_last_token

    def count(self, v: int) -> int:
        return round(v * (1 - self.ratio))  # half to even, as the released code

    def reduce(self, scores: Tensor | None, visual: Tensor, counts: Tensor) -> TokenMap:
        return TokenMap.keeping(~visual if scores is None else ~visual | keep_highest(scores, visual, counts))
