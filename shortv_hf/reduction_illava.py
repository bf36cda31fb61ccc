"""iLLaVA: in a few layers of the vision tower and of the decoder, the least attended visual tokens are merged into one."""

from dataclasses import dataclass
from math import floor, isqrt
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from .reduction import (
    ModelSizes,
    StreamReduction,
    TokenMap,
    TowerReduction,
    TowerSizes,
    rank_in_groups,
)


SCORES = ("attention", "lse")


@dataclass(frozen=True)
class ILLaVA(StreamReduction):
    """iLLaVA (Hu et al., 2024, arXiv 2412.06263; the released code's merging, without its half-precision rounding and
    its limits to one image and one row). Either half can be left out by an empty list.

    In layers `vit_k` of the vision tower, of each picture (image, tile or frame), `vit_r` patches are merged into the one
    of the next lowest score: the rank-weighted mean of their hidden states after attention, before the FFN. Score:
    attention received in that layer, mean over heads and queries.

    At the input of decoder layers `llm_k`, of the N tokens of each image or video `round(N * (1 - llm_r))` are merged
    into the lowest ranked of the others. Score: attention of the row's last token in the layer before, float32 softmax,
    mean over heads. A newline token that ends an image without others is not among the N.

    Options that a dict leaves out are those of [`illava_defaults`] for images.

    Attributes:
        vit_k: layers of the tower (0-based).
        vit_r: how many patches go: of a picture's patches in that layer a fraction below 1, rounded down to whole visual
            tokens; or a number.
        llm_k: layers of the decoder (0-based, from 1 on).
        llm_r: how many tokens stay: a fraction (1: all); above 1, how many go.
        score: `"attention"`, or `"lse"`: of each token's own query, the log-sum-exp of its attention, which the released
            code for Qwen2-VL takes for attention.
    """

    method: ClassVar[str] = "illava"
    merges: ClassVar[bool] = True
    per_image: ClassVar[bool] = True
    vit_k: tuple[int, ...] = (5, 6, 7, 8)
    vit_r: float = 92
    llm_k: tuple[int, ...] = (8,)
    llm_r: float = 0.7
    score: str = "attention"

    def __post_init__(self) -> None:
        for name in ("vit_k", "llm_k"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(
                isinstance(each, Integral) and not isinstance(each, bool) for each in value
            ):
                raise ValueError(f"illava: {name} is {value!r}; it must be a list of layers, such as [5, 6]")
            layers = tuple(sorted(int(each) for each in value))
            if len(set(layers)) < len(layers):
                raise ValueError(f"illava: {name} is {list(value)!r}, which names a layer twice")
            object.__setattr__(self, name, layers)

    # Which half works where

    @property
    def in_decoder(self) -> StreamReduction | None:
        return self if self.llm_k and self.llm_r != 1 else None

    @property
    def in_tower(self) -> TowerReduction | None:
        return MergingInTower(self.vit_k, self.vit_r, self.score == "lse") if self.vit_k else None

    @property
    def layers(self) -> tuple[int, ...]:
        return self.llm_k

    @property
    def first_layer(self) -> int:
        return 0 if self.vit_k or not self.llm_k else self.llm_k[0]

    @property
    def needs_scores(self) -> bool:
        return True

    @property
    def scores_own_queries(self) -> bool:
        return self.score == "lse"

    @property
    def looks_at_last_token(self) -> bool:
        return self.in_decoder is not None

    # Options

    @classmethod
    def completed(cls, options: dict[str, Any], sizes: ModelSizes) -> dict[str, Any]:
        own = _defaults(sizes, "image")
        own.pop("method")
        return {**own, **options}

    def check(self, sizes: ModelSizes) -> None:
        if self.score not in SCORES:
            raise ValueError(f"illava: score is {self.score!r}; valid are {' and '.join(SCORES)}")
        _check_number("vit_r", self.vit_r, "a fraction between 0 and 1, or an integer from 1 on (how many go)")
        _check_number("llm_r", self.llm_r, "a fraction above 0 and up to 1 (what stays), or an integer (how many go)")
        for k in self.llm_k:
            if not 1 <= k < sizes.decoder_layers:
                raise ValueError(
                    f"illava: llm_k holds {k}; the valid range is the integers 1 to {sizes.decoder_layers - 1}"
                )
            self.check_deepstack(sizes, "llm_k", k)
        if self.in_tower is not None:
            self._check_tower(self.in_tower, sizes)
        if sizes.patches is not None and not sizes.tiled:
            self.steps(sizes.patches, sizes)  # raises if more tokens would go than an image has

    def _check_tower(self, merging: TowerReduction, sizes: ModelSizes) -> None:
        tower = sizes.tower
        if tower is None:
            raise ValueError(
                f"illava: patches cannot be merged in this model's vision tower ({sizes.vision_type!r}): what follows needs "
                "each at its place; use vit_k = [], which leaves the half in the decoder"
            )
        if sizes.has_cls_feature:
            raise ValueError(
                "illava works on patches; vision_feature_select_strategy is 'full', the valid value is 'default'"
            )
        for k in self.vit_k:
            if not 0 <= k < tower.layers:
                raise ValueError(f"illava: vit_k holds {k}; the valid range is the integers 0 to {tower.layers - 1}")
        if self.vit_r >= 1 and self.vit_r < tower.unit:
            raise ValueError(
                f"illava: vit_r is {self.vit_r}; a visual token is made of {tower.unit} patches, so the valid numbers are "
                f"multiples of {tower.unit}, and fractions below 1"
            )
        if tower.patches is None:
            return
        if merging.removed(tower.patches, tower.unit) == 0:
            raise ValueError(f"illava: vit_r is {self.vit_r}, of {tower.patches} patches not one visual token")
        left = merging.left(tower.patches, tower.unit)
        side, unit = isqrt(left), isqrt(tower.unit)
        if tower.grid and (side**2 != left or side % unit):
            what = "a square number" if unit == 1 else f"the square of a multiple of {unit}"
            raise ValueError(
                f"illava: vit_k {list(self.vit_k)} and vit_r {self.vit_r} leave {left} of {tower.patches} patches, which "
                f"have to make a grid: {what}; with as many layers, vit_r could be {_squares(self.vit_k, tower, left)}"
            )

    def identity(self, sizes: ModelSizes) -> bool:
        return self.in_tower is None and self.in_decoder is None

    # In the decoder

    def removed(self, n: int) -> int:
        """How many of an image's n tokens go at one layer. Raises `ValueError` if none would be left."""
        if self.llm_r <= 1:
            return max(min(round(n * (1 - self.llm_r)), n - 1), 0)  # half to even, as released
        if 0 < n <= self.llm_r:
            raise ValueError(f"illava: llm_r is {self.llm_r}, and an image has {n} tokens, of which one must be left")
        return int(self.llm_r) if n else 0

    def count(self, v: int) -> int:
        return v - self.removed(v)

    def reduce(self, scores: Tensor | None, groups: Tensor, counts: Tensor) -> TokenMap:
        assert scores is not None  # see `needs_scores`
        rank, left = rank_in_groups(scores, groups), counts[groups]
        place = torch.arange(groups.shape[1], device=groups.device).expand_as(groups)
        # Of each group, where the lowest of those that stay is.
        lowest = (groups > 0) & (rank == left - 1)
        into = torch.zeros(len(groups), len(counts), dtype=torch.long, device=groups.device)
        into = into.scatter(1, groups.masked_fill(~lowest, 0), place)
        taken = torch.zeros_like(counts).index_add(0, groups.flatten(), (rank >= left).long().flatten())[groups]
        weight = (rank - left + 2).float() * 2 / ((taken + 1) * (taken + 2))
        goes = (groups > 0) & (rank >= left)
        return TokenMap(
            target=torch.where(goes, into.gather(1, groups), place),
            n=groups.shape[1],
            weight=torch.where(goes | lowest, weight, 1.0),
        )

    # How many are left

    def steps(self, v: int, sizes: ModelSizes, kept: int | None = None) -> list[tuple[int, int]] | None:
        merging, tower = self.in_tower, sizes.tower
        # Where all images have as many tokens, it is known how many there are.
        whole = sizes.patches is not None and not sizes.tiled and v % sizes.patches == 0
        images = v // sizes.patches if whole and sizes.patches else 1
        v = v // images if images else v
        if kept is not None:
            v = kept // images
        elif merging is not None and tower is not None:
            if whole or tower.patches is None:
                v = merging.left(v * tower.unit, tower.unit) // tower.unit
            elif v % tower.patches:  # newlines among them, or pooled frames
                return None
            else:
                v = v // tower.patches * merging.left(tower.patches, tower.unit)
        found = [(0, v * images)] if merging is not None else []
        for k in self.llm_k if self.in_decoder is not None else ():
            v = self.count(v)
            found.append((k, v * images))
        return found

    def left(self, v: int, sizes: ModelSizes, tiles: int | None = None) -> int | None:
        steps = self.steps(v, sizes)
        return steps[-1][1] if steps else v if steps is not None else None

    @classmethod
    def defaults(cls, config: Any, kind: str = "image") -> dict[str, Any]:
        return illava_defaults(config, kind)

    @classmethod
    def candidates(cls, sizes: ModelSizes, v: int) -> list[dict[str, Any]]:
        k = max(round(sizes.decoder_layers * 8 / 28), sizes.deepstack, 1)  # layer 8 of 28, as released
        return [{"vit_k": [], "llm_k": [k], "llm_r": round(number / v, 6)} for number in range(1, v + 1)]


@dataclass(frozen=True)
class MergingInTower(TowerReduction):
    """iLLaVA's half in the vision tower."""

    layers: tuple[int, ...]
    r: float
    own_queries: bool

    def removed(self, n: int, unit: int) -> int:
        r = floor(self.r * n) if self.r < 1 else int(self.r)
        if r >= n:
            raise ValueError(f"illava: vit_r is {self.r}, and a picture has {n} patches left, of which one must stay")
        return r // unit * unit

    def merged(self, scores: Tensor, r: int) -> tuple[Tensor, Tensor]:
        lowest = scores.argsort(dim=1, stable=True)[:, : r + 1]
        weights = torch.arange(r + 1, 0, -1, dtype=torch.float32, device=scores.device)
        return lowest, weights / weights.sum()


def _check_number(name: str, value: Any, valid: str) -> None:
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else 0.0
    if not 0 < number < float("inf") or (number > 1 and not number.is_integer()):
        raise ValueError(f"illava: {name} is {value!r}; valid is {valid}")


def _squares(layers: tuple[int, ...], tower: TowerSizes, left: int) -> str:
    """The numbers of patches to merge in each layer that leave a grid of about `left`."""
    assert tower.patches is not None  # where they vary, there is no grid
    n, unit = tower.patches, isqrt(tower.unit)
    squares = [side**2 for side in range(1, isqrt(n)) if side % unit == 0]
    fitting = [(n - square) // len(layers) for square in squares if (n - square) % (len(layers) * tower.unit) == 0]
    nearest = sorted(fitting, key=lambda r: abs(n - len(layers) * r - left))[:2]
    return " or ".join(map(str, nearest)) or "none"


def illava_defaults(config: Any, kind: str = "image") -> dict[str, Any]:
    """The released settings for `config.visual_reduction`, for inputs of the `kind` "image" or "video".

    LLaVA-OneVision and Qwen2-VL have settings of their own. Other families get the decoder's half as LLaVA-OneVision has
    it for images (7 of 10 tokens from layer 8 on), which nobody has published results for. In models of fewer or
    smaller layers than the released ones, layers and the side of the grid are those at the same fraction.

    Raises:
        ValueError: `kind` is another.
    """
    if kind not in ("image", "video"):
        raise ValueError(f"kind is {kind!r}; valid are image and video")
    return _defaults(ModelSizes.of(config), kind)


def _defaults(sizes: ModelSizes, kind: str) -> dict[str, Any]:
    tower = sizes.tower
    vit_k: list[int] = []
    vit_r: float = 92
    llm_k, llm_r, of_layers = ([2] if kind == "video" else [8]), 0.7, 24
    if tower is not None and tower.patches is None:  # Qwen2-VL
        vit_k, vit_r = _at_fraction([12, 13, 14, 15], 32, tower.layers, 0), 0.16
        llm_k, llm_r, of_layers = [6, 7, 8], 0.9, 28
    elif tower is not None and tower.patches is not None and sizes.patches is None:  # LLaVA-OneVision
        vit_k = [3, 4, 5, 6] if kind == "video" else [5, 6, 7, 8]
        if tower.patches != 27**2 or tower.layers <= max(vit_k):
            vit_k = _at_fraction(vit_k, 26, tower.layers, 0)
            vit_k, vit_r = _smaller_grid(vit_k, tower.patches)
    lowest = max(sizes.deepstack, 1)
    if max(llm_k) >= sizes.decoder_layers or min(llm_k) < lowest:
        llm_k = _at_fraction(llm_k, of_layers, sizes.decoder_layers, lowest)
    in_tower = {"vit_k": vit_k, "vit_r": vit_r} if vit_k else {"vit_k": []}
    return {"method": ILLaVA.method, **in_tower, "llm_k": llm_k, "llm_r": llm_r}


def _at_fraction(layers: list[int], of: int, n: int, lowest: int) -> list[int]:
    """Layers as deep in n as the given ones are among `of`."""
    return sorted({min(max(round(layer * n / of), lowest), n - 1) for layer in layers})


def _smaller_grid(layers: list[int], patches: int) -> tuple[list[int], int]:
    """As many of the layers as can merge equal numbers of patches and leave a grid of about 19 x 19 of 27 x 27."""
    side = max(round(isqrt(patches) * 19 / 27), 1)
    for n in range(len(layers), 0, -1):
        if (patches - side**2) % n == 0 and patches > side**2:
            break
    return layers[:n], (patches - side**2) // n
