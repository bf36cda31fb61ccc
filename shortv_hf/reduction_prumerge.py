"""LLaVA-PruMerge and PruMerge+: patches that [CLS] attends to stay, and take what is alike into themselves."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .reduction import ImageReduction, ModelSizes, Patches, TokenMap


N_NEIGHBOURS = 32


@dataclass(frozen=True)
class PruMerge(ImageReduction):
    """LLaVA-PruMerge (Shang et al., ICCV 2025): patches whose [CLS] attention in CLIP's last layer is an outlier stay,
    each with its nearest neighbours merged into it, and one token is the sum of the rest."""

    method: ClassVar[str] = "prumerge"
    merges: ClassVar[bool] = True
    needs_cls_attention: ClassVar[bool] = True

    def left(self, v: int, sizes: ModelSizes, tiles: int | None = None) -> int | None:
        return None

    def vision_layers(self, n: int) -> list[int]:
        return [n - 1]

    def reduce(self, image: Patches) -> TokenMap:
        (last,) = image.vision
        attention = last.row(heads=1)[0]  # over the whole width, not per head
        return merge_neighbours(attention, last.keys[0, 1:], self.kept_patches(attention))

    def kept_patches(self, attention: Tensor) -> Tensor:
        """Indices of the kept patches in the order of their tokens, from the attention `[N]`."""
        return attention.argsort(descending=True, stable=True)[: count_outliers(attention)]


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge+: besides those of PruMerge, patches on a regular grid stay. `token_num` 64, 128 or 256 is the fixed
    variant that VTC-CLS compares with; without it, both numbers follow from the outliers."""

    method: ClassVar[str] = "prumerge_plus"
    token_num: int | None = None
    FIXED: ClassVar[dict[int, tuple[int, int]]] = {64: (13, 11), 128: (40, 6), 256: (95, 3)}  # highest, grid stride

    def check(self, sizes: ModelSizes) -> None:
        super().check(sizes)
        valid = [number for number in self.FIXED if sizes.patches is None or number < sizes.patches]
        if self.token_num is not None and (isinstance(self.token_num, bool) or self.token_num not in valid):
            raise ValueError(
                f"prumerge_plus: token_num is {self.token_num!r}; valid with {sizes.patches} patches are None "
                f"(adaptive){''.join(f', {number}' for number in valid)}"
            )

    def kept_patches(self, attention: Tensor) -> Tensor:
        n = len(attention)
        if self.token_num is not None:
            number, stride = self.FIXED[self.token_num]
        else:
            number = count_outliers(attention)
            if number == 0:  # no rate to choose the grid by: PruMerge's answer
                return attention.new_zeros(0, dtype=torch.long)
            stride = max(int(int(n / number) / 3), 1)
        highest = attention.argsort(descending=True, stable=True)[:number]
        grid = torch.arange(0, n - 1, stride, device=attention.device)
        return torch.cat([highest, grid[~torch.isin(grid, highest)]])


def count_outliers(attention: Tensor) -> int:
    """How many of `attention` `[N]` lie above the third quartile by more than 1.5 interquartile ranges."""
    n = len(attention)
    lower, upper = torch.quantile(attention, attention.new_tensor([0.25, 0.75]))
    outliers = int((attention > upper + 1.5 * (upper - lower)).sum())
    return int(n * (outliers / n))  # as released, float rounding included


def merge_neighbours(attention: Tensor, keys: Tensor, kept: Tensor) -> TokenMap:
    """PruMerge's tokens: each kept patch plus the attention-weighted sum of its nearest patches, then one token of all
    the patches that are not kept. They take the first places of the image.

    Args:
        attention: `[N]`. keys: `[N, C]`, compared by cosine. kept: `[k]` indices.

    Returns:
        A map onto k + 1 places. Neighbours can be kept patches themselves; weights are not normalised. If every patch is
        kept, nothing is left for the last token, and there is none.
    """
    n, k = len(attention), len(kept)
    places = torch.arange(k, device=kept.device)
    nearest = similarities(keys, kept).topk(min(N_NEIGHBOURS, n - 1), dim=1).indices  # [k, neighbours]
    neighbours = nearest.T.flatten()  # all the nearest first: a patch's first entry is where it ranks highest
    is_rest = torch.ones(n, dtype=torch.bool, device=kept.device)
    is_rest[kept] = False
    rest = is_rest.nonzero()[:, 0]
    return TokenMap(
        target=torch.cat([places, places.repeat(nearest.shape[1]), torch.full_like(rest, k)]),
        n=n,
        weight=torch.cat([torch.ones_like(attention[kept]), attention[neighbours], attention[rest]]),
        source=torch.cat([kept, neighbours, rest]),
    )


def similarities(keys: Tensor, kept: Tensor) -> Tensor:
    """Cosine of the keys `[N, C]` of the `kept` `[k]` patches with those of all, `[k, N]`; -inf with themselves."""
    directions = torch.nn.functional.normalize(keys.float(), dim=-1)
    return (directions[kept] @ directions.T).scatter(1, kept[:, None], float("-inf"))
