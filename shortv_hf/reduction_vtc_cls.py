"""VTC-CLS: the patches to which [CLS] pays most attention stay."""

from dataclasses import dataclass
from typing import ClassVar

from .reduction import ModelSizes, Patches, SelectingReduction, TokenMap, require_integer


@dataclass(frozen=True)
class VTCCLS(SelectingReduction):
    """VTC-CLS (Wang et al., 2024, "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs"; the released
    code's `attentions[layer:-1]`): keep the patches with the highest [CLS] attention, summed over CLIP layers from
    `layer` to the last but one, in raster order."""

    method: ClassVar[str] = "vtc_cls"
    needs_cls_attention: ClassVar[bool] = True
    layer: int = 16
    token_num: int = 36

    def check(self, sizes: ModelSizes):
        super().check(sizes)
        n = sizes.vision_layers
        require_integer(self, "layer", -n, n - 2)
        if self.layer == -1:
            raise ValueError(
                f"vtc_cls: layer is -1, the last, which is never used; valid are {-n} to {n - 2} except -1"
            )

    def vision_layers(self, n: int) -> list[int]:
        return list(range(n))[self.layer : -1]

    def reduce(self, image: Patches) -> TokenMap:
        scores = sum(attention.row() for attention in image.vision[1:])
        scores = image.vision[0].row() + scores
        return TokenMap.keeping(image.highest(scores, self.token_num))
