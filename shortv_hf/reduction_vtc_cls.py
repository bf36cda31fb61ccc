"""VTC-CLS: the patches stay that the vision tower's [CLS] token attends to most."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .reduction import ImageReduction, ModelSizes, Patches, TokenMap, keep_in_tiles, left_of_tiles, require_integer


@dataclass(frozen=True)
class VTCCLS(ImageReduction):
    """VTC-CLS (Wang et al., 2024, "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs"; the released
    code's `attentions[layer:-1]`): keep the patches with the highest [CLS] attention, summed over CLIP layers from
    `layer` to the last but one, in raster order; `token_num` of every tile."""

    method: ClassVar[str] = "vtc_cls"
    needs_cls_attention: ClassVar[bool] = True
    layer: int = 16
    token_num: int = 36

    def check(self, sizes: ModelSizes) -> None:
        super().check(sizes)
        require_integer(self, "token_num", 1, sizes.patches)
        n = sizes.vision_layers
        require_integer(self, "layer", -n, n - 2)
        if self.layer == -1:
            raise ValueError(
                f"vtc_cls: layer is -1, the last, which is never used; valid are {-n} to {n - 2} except -1"
            )

    def identity(self, sizes: ModelSizes) -> bool:
        return self.token_num == sizes.patches

    def left(self, v: int, sizes: ModelSizes, tiles: int | None = None) -> int | None:
        return left_of_tiles(self.token_num, v, sizes, tiles)

    def vision_layers(self, n: int) -> list[int]:
        return list(range(n))[self.layer : -1]

    def reduce(self, image: Patches) -> TokenMap:
        scores = torch.stack([attention.row() for attention in image.vision]).sum(0)
        return keep_in_tiles(scores, image, self.token_num)

    @classmethod
    def candidates(cls, sizes: ModelSizes, v: int) -> list[dict[str, Any]]:
        layer = min(round(sizes.vision_layers * 2 / 3), sizes.vision_layers - 2)  # 16 of 24, as released
        return [{"layer": layer, "token_num": number} for number in range(1, (sizes.patches or v) + 1)]
