"""Visual-token reduction methods: which visual tokens the language model keeps, as pure tensor functions.

One method is one small options class in `METHODS`; its fields are the options of the dict in `config.visual_reduction`.
A method works at one of two places, and gives what that place needs (shapes: B rows, S tokens, N patches per tile):

    `DecoderReduction`: tokens leave before decoder layer `k` and keep their positions. The method says how many visual
        tokens of a row stay (`count`); which ones is decided by the attention of the prompt's last token.
    `ImageReduction`: the language model never sees the others; positions are contiguous. A `SelectingReduction` says
        which patches of a tile stay (`keep`); a `MergingReduction` makes new features of an image (`merge`).

The surgery on the models, shared by all methods, is in `visual_tokens.py` (decoder) and `visual_images.py` (images).
"""

import json
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import ClassVar

import torch


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that options are checked against: decoder layers, layers and type of the vision tower, patches per tile."""

    decoder_layers: int
    vision_layers: int
    vision_type: str
    patches: int
    tiled: bool  # LLaVA-NeXT: several tiles per image, and a newline token after each row of them
    has_cls_feature: bool  # `vision_feature_select_strategy="full"`: the CLS token goes to the language model too

    @classmethod
    def of(cls, config, select_strategy: str | None = None) -> "ModelSizes":
        """Sizes of a LLaVA or LLaVA-NeXT config; with a call's own `vision_feature_select_strategy`, if it has one."""
        vision = config.vision_config
        return cls(
            decoder_layers=config.text_config.num_hidden_layers,
            vision_layers=getattr(vision, "num_hidden_layers", 0),
            vision_type=vision.model_type,
            patches=(getattr(vision, "image_size", 0) // getattr(vision, "patch_size", 1)) ** 2,
            tiled="next" in config.model_type,
            has_cls_feature=(select_strategy or config.vision_feature_select_strategy) == "full",
        )


class Reduction:
    """What all methods share. `identity(sizes)`: these options change nothing, so the dense code runs.
    `looks_at_last_token`: the choice depends on the prompt's last token, so that the prompt must come in one piece, and
    without a cache every step chooses anew."""

    method: ClassVar[str]
    looks_at_last_token: ClassVar[bool] = False

    def check(self, sizes: ModelSizes):
        """Raises `ValueError` that names the offending value and the valid range."""

    def identity(self, sizes: ModelSizes) -> bool:
        return False


class DecoderReduction(Reduction):
    """Visual tokens leave at the input of decoder layer `k` (0-based), at prefill only."""

    k: int

    def check(self, sizes: ModelSizes):
        require_integer(self, "k", 1, sizes.decoder_layers)

    def count(self, v: int) -> int:
        """How many of a row's `v` visual tokens stay."""
        raise NotImplementedError


class ImageReduction(Reduction):
    """Visual tokens are cut after the vision tower; per image, and per tile where there are tiles."""

    needs_cls_attention: ClassVar[bool] = False

    def check(self, sizes: ModelSizes):
        if sizes.vision_type != "clip_vision_model":
            raise ValueError(f"{self.method} needs a clip_vision_model; the vision tower is {sizes.vision_type!r}")
        if sizes.has_cls_feature:
            raise ValueError(
                f"{self.method} works on patches; vision_feature_select_strategy is 'full', the valid value is 'default'"
            )

    def vision_layers(self, n: int) -> list[int]:
        """The layers of a vision tower of `n` whose CLS query and keys the method reads."""
        return []


class SelectingReduction(ImageReduction):
    """Keeps `token_num` patches of every tile as they are."""

    token_num: int

    def check(self, sizes: ModelSizes):
        super().check(sizes)
        require_integer(self, "token_num", 1, sizes.patches)

    def identity(self, sizes: ModelSizes) -> bool:
        return self.token_num == sizes.patches

    def scores(self, tiles: list[int], patches: int, vision: list["ClsAttention"]) -> torch.Tensor:
        """Scores `[sum(tiles), patches]`; the highest stay. `tiles`: number of tiles of each image."""
        raise NotImplementedError


class MergingReduction(ImageReduction):
    """Makes new tokens of an image's patches, before the projector. Undefined for LLaVA-NeXT."""

    def check(self, sizes: ModelSizes):
        super().check(sizes)
        if sizes.tiled:
            raise ValueError(
                f"{self.method} is not defined for LLaVA-NeXT: its tokens have no place in the rows of the tile grid, "
                "which newline tokens end; valid methods are fastv, vtw, vtc_cls and random"
            )

    def merge(self, features: torch.Tensor, vision: list["ClsAttention"], image: int) -> torch.Tensor:
        """Features of one image `[N, C]` → `[T, C]`, T at most N."""
        raise NotImplementedError


# FastV and VTW


@dataclass(frozen=True)
class FastV(DecoderReduction):
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
    def looks_at_last_token(self) -> bool:
        return 0 < self.ratio < 1

    def count(self, v: int) -> int:
        return round(v * (1 - self.ratio))  # half to even, as the released code


@dataclass(frozen=True)
class VTW(DecoderReduction):
    """Visual Tokens Withdrawal (Lin et al., AAAI 2025): all visual tokens leave before layer `k`."""

    method: ClassVar[str] = "vtw"
    k: int = 16

    def identity(self, sizes: ModelSizes) -> bool:
        return self.k == sizes.decoder_layers

    def count(self, v: int) -> int:
        return 0


def last_row_attention(query, key, mask, scaling: float) -> torch.Tensor:
    """Attention of one query per row, mean over heads: the only row that FastV needs.

    Args:
        query: `[B, heads, d]`.
        key: `[B, kv_heads, T, d]`; a group of heads shares a key head, which is not repeated.
        mask: `[B, 1, 1, T]` bool or additive, or `None`.
        scaling: factor of the scores.

    Returns:
        `[B, T]` float32, rows sum to 1.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))  # [B, kv_heads, group, d]
    scores = (grouped @ key.transpose(2, 3)).float() * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).mean((1, 2))


def keep_highest(scores: torch.Tensor, candidates: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mask `[B, S]` of the `counts` `[B]` candidates with the highest `scores` `[B, S]`; of equal ones the first."""
    ranked = scores.masked_fill(~candidates, float("-inf")).argsort(dim=1, descending=True, stable=True)
    return candidates & (ranked.argsort(dim=1) < counts[:, None])


# VTC-CLS


@dataclass
class ClsAttention:
    """Raw `q_proj` output of [CLS] `[tiles, C]` and `k_proj` outputs of all tokens `[tiles, 1 + N, C]` in a CLIP layer."""

    query: torch.Tensor
    keys: torch.Tensor
    heads: int

    def row(self, heads: int | None = None) -> torch.Tensor:
        """Softmaxed attention of [CLS] to the patches `[tiles, N]`, float32, mean over heads. The CLS column is left out
        after the softmax. `heads` instead of the layer's own number."""
        heads = self.heads if heads is None else heads
        query = self.query.unflatten(-1, (heads, -1))
        keys = self.keys.unflatten(-1, (heads, -1)).transpose(1, 2)
        return last_row_attention(query, keys, None, query.shape[-1] ** -0.5)[:, 1:]


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

    def scores(self, tiles, patches, vision):
        return sum(attention.row() for attention in vision)


# LLaVA-PruMerge and PruMerge+


@dataclass(frozen=True)
class PruMerge(MergingReduction):
    """LLaVA-PruMerge (Shang et al., ICCV 2025): patches whose [CLS] attention in CLIP's last layer is an outlier stay,
    each with its nearest neighbours merged into it, and one token is the sum of the rest."""

    method: ClassVar[str] = "prumerge"
    needs_cls_attention: ClassVar[bool] = True

    def vision_layers(self, n: int) -> list[int]:
        return [n - 1]

    def merge(self, features, vision, image):
        (last,) = vision
        attention = last.row(heads=1)[image]  # over the whole width, not per head
        kept = self.kept_patches(attention)
        return merge_neighbours(features, attention, last.keys[image, 1:], kept)

    def kept_patches(self, attention: torch.Tensor) -> torch.Tensor:
        """Indices of the kept patches in the order of their tokens, from the attention `[N]`."""
        return attention.argsort(descending=True, stable=True)[: count_outliers(attention)]


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge+: besides those of PruMerge, patches on a regular grid stay. `token_num` 64, 128 or 256 is the fixed
    variant that VTC-CLS compares with; without it, both numbers follow from the outliers."""

    method: ClassVar[str] = "prumerge_plus"
    token_num: int | None = None
    FIXED: ClassVar[dict[int, tuple[int, int]]] = {64: (13, 11), 128: (40, 6), 256: (95, 3)}  # highest, grid stride

    def check(self, sizes: ModelSizes):
        super().check(sizes)
        valid = [number for number in self.FIXED if number < sizes.patches]
        if self.token_num is not None and (isinstance(self.token_num, bool) or self.token_num not in valid):
            raise ValueError(
                f"prumerge_plus: token_num is {self.token_num!r}; valid with {sizes.patches} patches are None "
                f"(adaptive){''.join(f', {number}' for number in valid)}"
            )

    def kept_patches(self, attention):
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


def count_outliers(attention: torch.Tensor) -> int:
    """How many of `attention` `[N]` lie above the third quartile by more than 1.5 interquartile ranges."""
    n = len(attention)
    lower, upper = torch.quantile(attention, attention.new_tensor([0.25, 0.75]))
    outliers = int((attention > upper + 1.5 * (upper - lower)).sum())
    return int(n * (outliers / n))  # as released, float rounding included


N_NEIGHBOURS = 32


def merge_neighbours(features, attention, keys, kept) -> torch.Tensor:
    """PruMerge's tokens: each kept patch plus the attention-weighted sum of its nearest patches, then one token of all
    the patches that are not kept.

    Args:
        features: `[N, C]`. attention: `[N]`. keys: `[N, C]`, compared by cosine. kept: `[k]` indices.

    Returns:
        `[k + 1, C]`. Neighbours can be kept patches themselves; weights are not normalised. If every patch is kept,
        nothing is left for the last token, and there is none.
    """
    n = len(features)
    weighted = attention[:, None] * features.float()
    nearest = similarities(keys, kept).topk(min(N_NEIGHBOURS, n - 1), dim=1).indices
    tokens = features[kept].float() + weighted[nearest].sum(1)
    if len(kept) < n:
        rest = torch.ones(n, dtype=torch.bool, device=features.device)
        rest[kept] = False
        tokens = torch.cat([tokens, weighted[rest].sum(0, keepdim=True)])
    return tokens.to(features.dtype)


def similarities(keys: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Cosine of the keys `[N, C]` of the `kept` `[k]` patches with those of all, `[k, N]`; -inf with themselves."""
    directions = torch.nn.functional.normalize(keys.float(), dim=-1)
    return (directions[kept] @ directions.T).scatter(1, kept[:, None], float("-inf"))


# Baselines


@dataclass(frozen=True)
class RandomSubset(SelectingReduction):
    """Baseline: a random subset of the patches, the same for every image and every call with the same `seed`."""

    method: ClassVar[str] = "random"
    token_num: int = 128
    seed: int = 0

    def check(self, sizes: ModelSizes):
        super().check(sizes)
        require_integer(self, "seed", 0, 2**63 - 1)

    def scores(self, tiles, patches, vision):
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.rand(max(tiles), patches, generator=generator)
        return torch.cat([order[:n] for n in tiles])  # an image's own tiles differ, images do not


@dataclass(frozen=True)
class Downsample(MergingReduction):
    """Baseline: average-pool the grid of patches by `factor` in height and width."""

    method: ClassVar[str] = "downsample"
    factor: int = 2

    def check(self, sizes: ModelSizes):
        super().check(sizes)
        side = round(sizes.patches**0.5)
        valid = [factor for factor in range(1, side + 1) if side % factor == 0]
        if isinstance(self.factor, bool) or not isinstance(self.factor, Integral) or self.factor not in valid:
            raise ValueError(
                f"downsample: factor is {self.factor!r}; with {side} x {side} patches, valid are "
                f"{', '.join(map(str, valid))}"
            )

    def identity(self, sizes: ModelSizes) -> bool:
        return self.factor == 1

    def merge(self, features, vision, image):
        side = round(len(features) ** 0.5)
        grid = features.T.unflatten(1, (side, side))
        return torch.nn.functional.avg_pool2d(grid, self.factor).flatten(1).T


METHODS: dict[str, type[Reduction]] = {
    each.method: each for each in (FastV, VTW, VTCCLS, PruMerge, PruMergePlus, RandomSubset, Downsample)
}


def require_integer(options: Reduction, name: str, low: int, high: int):
    """Raises `ValueError` unless the option is an integer in `low..high`."""
    value = getattr(options, name)
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        raise ValueError(f"{options.method}: {name} is {value!r}; the valid range is the integers {low} to {high}")


def parse_visual_reduction(visual_reduction: dict | None, sizes: ModelSizes) -> Reduction | None:
    """The options object for a dict such as `{"method": "fastv", "k": 2, "ratio": 0.5}`; options left out have defaults.

    Raises:
        ValueError: for an unknown method or option, or a value out of its range for a model of these `sizes`.
    """
    if visual_reduction is None:
        return None
    known = ", ".join(METHODS)
    if not isinstance(visual_reduction, dict) or "method" not in visual_reduction:
        raise ValueError(
            f"visual_reduction is {visual_reduction!r}; it must be None or a dict with 'method', one of {known}"
        )
    options = dict(visual_reduction)
    method = options.pop("method")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"visual_reduction has method {method!r}; valid methods are {known}")
    valid = [field.name for field in fields(METHODS[method])]
    for name in options:
        if name not in valid:
            raise ValueError(
                f"visual_reduction: {method} has no option {name!r}; valid options are {', '.join(valid) or 'none'}"
            )
    reduction = METHODS[method](**options)
    reduction.check(sizes)
    return reduction


def visual_reduction_from_text(text: str) -> dict | None:
    """The dict for `config.visual_reduction` from a command line: JSON, `fastv:k=2,ratio=0.5`, `prumerge` or `none`.

    Raises:
        ValueError: if it is neither; what the options mean is checked with the model at hand.
    """
    form = 'use JSON such as {"method": "vtw", "k": 16}, or method:option=value,option=value'
    if text.strip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"cannot read the reduction {text!r} ({error}); {form}") from None
    method, _, rest = text.strip().partition(":")
    if method == "none" and not rest:
        return None
    options = {"method": method}
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        try:
            options[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"cannot read {part!r} in the reduction {text!r}; {form}") from None
    return options
