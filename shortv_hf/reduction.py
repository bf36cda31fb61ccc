"""What a visual-token reduction method is: its options, and one function that says where each token goes.

One method is one small frozen dataclass in a file of its own, `reduction_<method>.py`; its fields are the options of the
dict in `config.visual_reduction`. Defining it puts it into `METHODS`; `configuration_shortv.py` imports each file. A
method works at one of three places, or at several (shapes: B rows, S tokens, n tokens per image):

    `StreamReduction`: tokens leave before decoder layers `layers` and keep their positions. How many of a group (a row,
        or an image) stay is known before (`count`); which ones may depend on attention in the layer before.
    `ImageReduction`: after the vision tower; the language model never sees the others, and its positions are contiguous.
    `TowerReduction`: inside the vision tower, whose later layers see fewer patches.

The first two answer with a [`TokenMap`], the third with what becomes one. Who carries it out, draws it or counts it reads the map and knows no method. The surgery
on the models is in `stream.py` (the decoder), `vision.py` (images) and `tower.py`.
"""

import json
import re
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor


DROPPED = float("-inf")  # in every channel of an image feature: the token does not reach the language model


def is_dropped(features: Tensor) -> Tensor:
    """`[..., d]` → `[...]` bool: features that an [`ImageReduction`] left out."""
    return (features == DROPPED).all(-1)


# What methods are checked against, and what they answer with


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that options are checked against.

    Attributes:
        decoder_layers, vision_layers: number of layers of the decoder and of the vision tower.
        vision_type: the `model_type` of the vision tower.
        patches: visual tokens per image, or per tile where there are tiles; `None` where they vary.
        tiled: whether an image is several tiles, with a newline token after each row of them.
        has_cls_feature: whether the tower's CLS token goes to the language model too.
        deepstack: after how many of the first decoder layers image features are added to the visual tokens once more.
        tower: of vision towers in which patches can be merged.
    """

    decoder_layers: int
    vision_layers: int
    vision_type: str
    patches: int | None
    tiled: bool
    has_cls_feature: bool
    deepstack: int = 0
    tower: "TowerSizes | None" = None

    @classmethod
    def of(cls, config: Any, select_strategy: str | None = None) -> "ModelSizes":
        """Sizes of a vision-language config; with a call's own `vision_feature_select_strategy`, if it has one."""
        vision = config.vision_config
        strategy = select_strategy or getattr(config, "vision_feature_select_strategy", None)
        return cls(
            decoder_layers=config.get_text_config().num_hidden_layers,
            vision_layers=getattr(vision, "num_hidden_layers", getattr(vision, "depth", 0)),
            vision_type=vision.model_type,
            patches=tokens_per_image(config),
            tiled=bool(getattr(config, "image_grid_pinpoints", None)),
            has_cls_feature=strategy == "full" and vision.model_type == "clip_vision_model",  # SigLIP's has none
            deepstack=len(getattr(vision, "deepstack_visual_indexes", None) or ()),
            tower=TowerSizes.of(config),
        )


@dataclass(frozen=True)
class TowerSizes:
    """What a [`TowerReduction`] is checked against.

    Attributes:
        layers: how many layers of the tower the features pass through.
        patches: per picture (image, tile or frame); `None` where they vary.
        unit: the patches that make one visual token: what is left of a picture must be whole units.
        grid: the rows of the grid of patches have a meaning behind the tower (newlines, pooling): what is left must be a
            square, whose side is divided by the square root of `unit`.
        others: tokens before the patches, which stay.
    """

    layers: int
    patches: int | None
    unit: int = 1
    grid: bool = False
    others: int = 0

    @classmethod
    def of(cls, config: Any) -> "TowerSizes | None":
        """Those of a vision-language config; `None` if what is behind its tower needs every patch at its place (windows
        of attention, features of several layers, a pooling of fixed size), or the tower is not known."""
        vision = config.vision_config
        if hasattr(vision, "spatial_merge_size") and hasattr(vision, "mlp_ratio"):  # Qwen2-VL's, not its successors'
            return cls(vision.depth, None, vision.spatial_merge_size**2)
        layer = getattr(config, "vision_feature_layer", None)
        known = ("clip_vision_model", "siglip_vision_model", "internvl_vision")
        # Gemma 3's pooling; those of Aya Vision, LLaVA-NeXT-Video and Video-LLaVA, which have no classes here.
        others = ("mm_tokens_per_image", "downsample_factor", "spatial_pool_mode", "video_seq_length")
        if (
            vision.model_type not in known
            or not isinstance(layer, int)
            or any(hasattr(config, name) for name in others)
        ):
            return None
        (height, width), (patch_height, patch_width) = pair(vision.image_size), pair(vision.patch_size)
        shuffled = round(1 / getattr(config, "downsample_ratio", 1)) ** 2  # patches in a token of InternVL
        return cls(
            layers=layer if layer >= 0 else vision.num_hidden_layers + 1 + layer,
            patches=(height // patch_height) * (width // patch_width),
            unit=shuffled,
            grid=shuffled > 1 or bool(getattr(config, "image_grid_pinpoints", None)),
            others=vision.model_type != "siglip_vision_model",
        )


def tokens_per_image(config: Any) -> int | None:
    """Visual tokens that an image (or a tile of it) gives, newlines aside; `None` where it depends on the image."""
    vision = config.vision_config
    if hasattr(config, "mm_tokens_per_image"):  # pooled by the projector
        return config.mm_tokens_per_image
    if hasattr(config, "downsample_ratio"):  # pixels shuffled before it
        return config.image_seq_length
    resolution_varies = hasattr(config, "spatial_merge_size") or hasattr(vision, "spatial_merge_size")
    interpolates = hasattr(config, "vision_aspect_ratio")  # images with many tiles
    if resolution_varies or interpolates or not hasattr(vision, "image_size"):
        return None
    (height, width), (patch_height, patch_width) = pair(vision.image_size), pair(vision.patch_size)
    return (height // patch_height) * (width // patch_width)


def pair(size: int | list[int]) -> tuple[int, int]:
    """Height and width, from one number for both or from the two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True)
class TokenMap:
    """Where N tokens go: sums of them take some of the N places, and the other places hold nothing afterwards.

    Attributes:
        target: `[..., E]` long: the place that a token goes to; -1: it is dropped.
        n: N, the number of tokens and of places.
        weight: `[..., E]` float: the token's factor in the sum at that place; `None`: 1.
        source: `[..., E]` long: which token it is, where some go to several places; `None`: each once, in order (E = N).
            Of a token's entries, the first is the place that it has most to do with.
    """

    target: Tensor
    n: int
    weight: Tensor | None = None
    source: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """`[..., N]` bool: the places that hold a token afterwards."""
        held = self.target.new_zeros((*self.target.shape[:-1], self.n + 1), dtype=torch.bool)
        return held.scatter(-1, self._places(), True)[..., : self.n]

    def apply(self, states: Tensor) -> Tensor:
        """The tokens `[..., N, C]` at their new places, out of place; 0 where no token is. Where nothing is merged, the
        states themselves: tokens that stay are where they were. Sums are float32."""
        if self.weight is None and self.source is None:
            return states
        parts = states.float()
        if self.source is not None:
            parts = torch.take_along_dim(parts, self.source[..., None], dim=-2)
        if self.weight is not None:
            parts = parts * self.weight.float()[..., None]
        places = self._places()[..., None].expand_as(parts)
        sums = parts.new_zeros((*parts.shape[:-2], self.n + 1, parts.shape[-1])).scatter_add(-2, places, parts)
        return sums[..., : self.n, :].to(states.dtype)

    def to(self, device: torch.device) -> "TokenMap":
        weight, source = (None if part is None else part.to(device) for part in (self.weight, self.source))
        return TokenMap(self.target.to(device), self.n, weight, source)

    def _places(self) -> Tensor:
        """The targets; a place behind the last for tokens that are dropped."""
        return torch.where(self.target >= 0, self.target, self.n)


# What methods look at


def last_row_attention(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of one query per row, mean over heads: the only row that a method needs.

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


def received(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention that each of n tokens receives, mean over heads and queries: `[B, n]` float32, from `query` and `key`
    `[B, heads, n, d]`. Of the attention matrix, a block of queries is held at a time."""
    batch, heads, n, _ = query.shape
    total = torch.zeros(batch, n, dtype=torch.float32, device=query.device)
    for block in query_blocks(query):
        total += ((query[:, :, block] @ key.transpose(2, 3)).float() * scaling).softmax(-1).sum((1, 2))
    return total / (heads * n)


def log_sums(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Logarithm of the sum of the exponentials that a query's softmax divides by, mean over heads: `[B, T]` float32, from
    `query` `[B, heads, T, d]`, `key` `[B, kv_heads, K, d]` and a `mask` `[B, 1, T, K]`, bool or additive. It is
    FlashAttention's second return value, by which the released iLLaVA ranks the tokens of Qwen2-VL."""
    grouped = query.unflatten(1, (key.shape[1], -1))  # [B, kv_heads, group, T, d]
    scores = (grouped @ key[:, :, None].transpose(3, 4)).float() * scaling
    if mask is not None:
        mask = mask[:, :, None]
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.logsumexp(-1).mean((1, 2))


def query_blocks(query: Tensor) -> list[slice]:
    """Parts of the T queries of `[B, heads, T, d]`: d at a time, so that their scores are as many numbers as a hidden state
    of the keys has, less than an FFN holds."""
    n, head_dim = query.shape[2:]
    return [slice(start, start + head_dim) for start in range(0, n, head_dim)]


@dataclass
class ClsAttention:
    """Raw `q_proj` output of [CLS] `[tiles, C]` and `k_proj` outputs of all tokens `[tiles, 1 + N, C]` in a CLIP layer."""

    query: Tensor
    keys: Tensor
    heads: int

    def row(self, heads: int | None = None) -> Tensor:
        """Softmaxed attention of [CLS] to the patches `[tiles, N]`, float32, mean over heads. The CLS column is left out
        after the softmax. `heads` instead of the layer's own number."""
        heads = self.heads if heads is None else heads
        query = self.query.unflatten(-1, (heads, -1))
        keys = self.keys.unflatten(-1, (heads, -1)).transpose(1, 2)
        return last_row_attention(query, keys, None, query.shape[-1] ** -0.5)[:, 1:]

    def of_tiles(self, tiles: slice, device: torch.device) -> "ClsAttention":
        """That of some of the tiles, on a device."""
        return ClsAttention(self.query[tiles].to(device), self.keys[tiles].to(device), self.heads)


@dataclass
class Patches:
    """The n visual tokens of one image, in the order of the prompt.

    Attributes:
        tile: `[n]` long: the tile that the token is of.
        patch: `[n]` long: its index in the tile, in raster order; -1 for newline tokens, which no method touches.
        tiles: number of tiles; the frames of a video are tiles.
        height, width: of the grid of a tile, in tokens; `None` where it is not known: one tile of n patches then.
        vision: of the layers that the method asks for, [CLS] in this image's tiles.
        video: whether the tiles are frames.
    """

    tile: Tensor
    patch: Tensor
    tiles: int
    height: int | None
    width: int | None
    vision: list[ClsAttention] = field(default_factory=list)
    video: bool = False

    @classmethod
    def of_grid(cls, tiles: int, height: int, width: int, device: torch.device, video: bool = False) -> "Patches":
        """All patches of some tiles of one grid."""
        index = torch.arange(tiles * height * width, device=device)
        return cls(index // (height * width), index % (height * width), tiles, height, width, video=video)

    @classmethod
    def without_grid(cls, n: int, device: torch.device) -> "Patches":
        """`n` patches of which no more is known."""
        return cls(torch.zeros(n, dtype=torch.long, device=device), torch.arange(n, device=device), 1, None, None)

    @property
    def per_tile(self) -> int:
        """Patches of a tile, those of the padding around an image, which are not in the prompt, included."""
        return len(self.patch) if self.height is None or self.width is None else self.height * self.width

    def as_one_tile(self) -> "Patches":
        """The same tokens, whatever tiles they are of."""
        return replace(Patches.without_grid(len(self.patch), self.patch.device), vision=self.vision)


# The kinds of methods

METHODS: dict[str, type["Reduction"]] = {}


class Reduction:
    """What all methods share; a subclass with a `method` is one, and registers itself."""

    method: ClassVar[str]
    merges: ClassVar[bool] = False  # whether tokens are sums of others

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "method" in vars(cls):
            METHODS[cls.method] = cls

    @property
    def first_layer(self) -> int:
        """The first decoder layer (0-based) that sees fewer tokens."""
        raise NotImplementedError

    @property
    def looks_at_last_token(self) -> bool:
        """Whether the choice depends on the prompt's last token, so that the prompt must come in one piece, and without
        a cache every step chooses anew."""
        return False

    @property
    def in_decoder(self) -> "StreamReduction | None":
        """The part that works in the decoder."""
        return None

    @property
    def on_images(self) -> "ImageReduction | None":
        """The part that works behind the vision tower."""
        return None

    @property
    def in_tower(self) -> "TowerReduction | None":
        """The part that works inside the vision tower."""
        return None

    @property
    def cuts_images(self) -> bool:
        """Whether tokens are gone before the decoder, so that it must be given pixels, not their features."""
        return self.on_images is not None or self.in_tower is not None

    def check(self, sizes: ModelSizes) -> None:
        """Raises `ValueError` that names the offending value and the valid range."""

    def identity(self, sizes: ModelSizes) -> bool:
        """Whether these options change nothing, so that the dense code runs."""
        return False

    def left(self, v: int, sizes: ModelSizes, tiles: int | None = None) -> int | None:
        """How many of `v` visual tokens are left from layer `first_layer` on; `None` where that depends on the image.
        `tiles`: of how many whole tiles (images, where there are none) they are; needed with newlines among them."""
        raise NotImplementedError

    def steps(self, v: int, sizes: ModelSizes, kept: int | None = None) -> list[tuple[int, int]] | None:
        """How many of `v` visual tokens of one image are left, from which decoder layers on: pairs of layer and number.
        `None` where that depends on the image, and it is not said how many are `kept` before the decoder."""
        left = self.left(v, sizes) if kept is None else kept
        return None if left is None else [(self.first_layer, left)]

    @classmethod
    def completed(cls, options: dict[str, Any], sizes: ModelSizes) -> dict[str, Any]:
        """The options, with what a model of these `sizes` has for those left out, if not the class."""
        return options

    @classmethod
    def defaults(cls, config: Any, kind: str = "image") -> dict[str, Any]:
        """What to use for `config.visual_reduction` if no options are named, with a model of this config and inputs that
        are of the `kind` "image" or "video"."""
        return {"method": cls.method}

    @classmethod
    def candidates(cls, sizes: ModelSizes, v: int) -> list[dict[str, Any]]:
        """Options among which to look for a given cost, for prompts of `v` visual tokens; one entry, without options, if
        the cost cannot be set."""
        return [{}]


class StreamReduction(Reduction):
    """Visual tokens leave at the input of decoder layers (0-based), at prefill only. Most methods do so at one, `k`."""

    k: int
    per_image: ClassVar[bool] = False  # whether tokens are counted and ranked in each image, not in the whole row

    @property
    def in_decoder(self) -> "StreamReduction | None":
        return self

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers at whose input tokens leave, ascending."""
        return (self.k,)

    @property
    def first_layer(self) -> int:
        return self.layers[0]

    @property
    def dead_layer(self) -> int | None:
        """The layer whose update of visual tokens is read by nobody, since all leave behind it; `None` if there is none."""
        return None

    @property
    def needs_scores(self) -> bool:
        """Whether `reduce` needs scores of the layer before."""
        return False

    @property
    def scores_own_queries(self) -> bool:
        """What scores are: the attention of each row's last token, or of each token's own query how much there is to
        attend to ([`log_sums`])."""
        return False

    @property
    def looks_at_last_token(self) -> bool:
        return self.needs_scores

    def check(self, sizes: ModelSizes) -> None:
        require_integer(self, "k", 1, sizes.decoder_layers)
        self.check_deepstack(sizes, "k", self.k)

    def check_deepstack(self, sizes: ModelSizes, name: str, k: int) -> None:
        """Raises `ValueError` if tokens would leave that image features are yet to be added to."""
        if k < sizes.deepstack:
            raise ValueError(
                f"{self.method}: {name} is {k}; image features are added to the visual tokens after the first "
                f"{sizes.deepstack} layers, which must see them all: the valid range is the integers {sizes.deepstack} "
                f"to {sizes.decoder_layers}"
            )

    def identity(self, sizes: ModelSizes) -> bool:
        return self.k == sizes.decoder_layers

    def left(self, v: int, sizes: ModelSizes, tiles: int | None = None) -> int | None:
        return self.count(v)

    def count(self, v: int) -> int:
        """How many of a group's `v` visual tokens stay, at each of the `layers`."""
        raise NotImplementedError

    def reduce(self, scores: Tensor | None, groups: Tensor, counts: Tensor) -> TokenMap:
        """Where the tokens of each row go, without a synchronisation.

        Args:
            scores: `[B, S]` float32; `None` where no token stays or the method needs none.
            groups: `[B, S]` long, from 1 on: the group of each visual token, which is in one row; 0: none. Tokens of
                group 0 go to themselves.
            counts: `[1 + groups]` long, by group: how many stay, as `count` says.

        Returns:
            A map with `target` `[B, S]`.
        """
        raise NotImplementedError


class ImageReduction(Reduction):
    """Visual tokens are cut after the vision tower; per image, and per tile where there are tiles."""

    needs_cls_attention: ClassVar[bool] = False

    @property
    def on_images(self) -> "ImageReduction | None":
        return self

    @property
    def first_layer(self) -> int:
        return 0

    def check(self, sizes: ModelSizes) -> None:
        if self.needs_cls_attention and sizes.vision_type != "clip_vision_model":
            raise ValueError(
                f"{self.method} looks at the [CLS] token of a clip_vision_model; the vision tower is {sizes.vision_type!r}"
            )
        if sizes.has_cls_feature:
            raise ValueError(
                f"{self.method} works on patches; vision_feature_select_strategy is 'full', the valid value is 'default'"
            )
        if self.merges and sizes.tiled:
            *others, last = (name for name, each in METHODS.items() if not each.merges)
            raise ValueError(
                f"{self.method} is not defined for LLaVA-NeXT and others that cut images into tiles: its tokens have no "
                "place in the rows of the tile grid, which newline tokens end; valid methods are "
                f"{', '.join(others)} and {last}"
            )

    def vision_layers(self, n: int) -> list[int]:
        """The layers of a vision tower of `n` whose CLS query and keys the method reads."""
        return []

    def reduce(self, image: Patches) -> TokenMap:
        """Where the n tokens of one image go: a map with `target` `[E]`. Newline tokens stay at their own places.

        Raises:
            ValueError: if the method needs a grid, and that of the image is not known.
        """
        raise NotImplementedError


class TowerReduction:
    """The part of a method that works inside the vision tower: in each of some layers (0-based), after its attention,
    patches of a picture are merged into one of them.

    Attributes:
        layers: ascending.
        own_queries: what scores are: the attention that a patch receives from all patches of its picture ([`received`]),
            or [`log_sums`].
    """

    layers: tuple[int, ...]
    own_queries: bool

    def removed(self, n: int, unit: int) -> int:
        """How many of a picture's n patches go, a multiple of `unit`. Raises `ValueError` if none would be left."""
        raise NotImplementedError

    def merged(self, scores: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """Of each picture, by `scores` `[pictures, n]` float32: the r patches that go, and behind them the one that takes
        them in, `[pictures, 1 + r]` indices; and their weights in its new value, `[1 + r]` float32."""
        raise NotImplementedError

    def left(self, n: int, unit: int) -> int:
        """How many of a picture's n patches are left behind the last layer."""
        for _ in self.layers:
            n -= self.removed(n, unit)
        return n


def rank_in_groups(scores: Tensor, groups: Tensor) -> Tensor:
    """`[B, S]` long: the rank of each token among those of its group, from 0, the highest of the `scores` `[B, S]` first;
    of equal ones the first."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, groups.gather(1, order).argsort(dim=1, stable=True))
    sorted_groups = groups.gather(1, order)
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    starts = torch.nn.functional.pad(sorted_groups[:, 1:] != sorted_groups[:, :-1], (1, 0), value=True)
    first = place.masked_fill(~starts, 0).cummax(1).values
    return torch.zeros_like(order).scatter(1, order, place - first)


def keep_highest(scores: Tensor, groups: Tensor, counts: Tensor) -> Tensor:
    """Mask `[B, S]` of the `counts` `[1 + groups]` tokens of each of the `groups` `[B, S]` with the highest `scores`
    `[B, S]`; of equal ones the first. Group 0 is none."""
    return (groups > 0) & (rank_in_groups(scores, groups) < counts[groups])


def keep_only(keep: Tensor) -> TokenMap:
    """The map of the mask `[..., N]`: tokens stay where they are, or are dropped."""
    places = torch.arange(keep.shape[-1], device=keep.device)
    return TokenMap(torch.where(keep, places, -1), keep.shape[-1])


def keep_in_tiles(scores: Tensor, image: Patches, number: int) -> TokenMap:
    """Of each tile, the `number` patches in the prompt with the highest `scores` `[tiles, patches]` stay, or all if there
    are fewer."""
    tiles, size = scores.shape
    newline = image.patch < 0
    place = torch.where(newline, tiles * size, image.tile * size + image.patch)
    present = torch.zeros(tiles * size + 1, dtype=torch.bool, device=place.device).scatter(0, place, True)
    tile = torch.arange(1, tiles + 1, device=place.device)[:, None] * present[:-1].view(tiles, size)
    counts = torch.full((1 + tiles,), number, device=place.device)
    keep = keep_highest(scores, tile, counts).flatten()
    return keep_only(torch.nn.functional.pad(keep, (0, 1), value=True)[place])


def left_of_tiles(token_num: int, v: int, sizes: ModelSizes, tiles: int | None) -> int | None:
    """[`Reduction.left`] of a method that keeps `token_num` tokens of each tile, and newlines."""
    if sizes.patches is None:
        return None if tiles is None else min(tiles * token_num, v)
    if tiles is None:
        if v % sizes.patches:
            return None
        tiles = v // sizes.patches
    return max(v - tiles * (sizes.patches - token_num), 0)


# From and to text


def require_integer(options: Reduction, name: str, low: int, high: int | None = None) -> None:
    """Raises `ValueError` unless the option is an integer in `low..high`, or from `low` on."""
    value = getattr(options, name)
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or int(value) < low or (high is not None and int(value) > high):
        valid = f"integers from {low} on" if high is None else f"integers {low} to {high}"
        raise ValueError(f"{options.method}: {name} is {value!r}; the valid range is the {valid}")


def parse_visual_reduction(visual_reduction: dict | None, sizes: ModelSizes) -> Reduction | None:
    """The options object for a dict such as `{"method": "fastv", "k": 2, "ratio": 0.5}`; options left out have defaults.

    Raises:
        ValueError: for an unknown method or option, or a value out of its range for a model of these `sizes`.
    """
    if visual_reduction is None:
        return None
    key = repr(visual_reduction), sizes
    if key not in _PARSED:  # once, and not on every forward
        _PARSED[key] = _parse(visual_reduction, sizes)
    return _PARSED[key]


_PARSED: dict[tuple[str, ModelSizes], Reduction] = {}


def _parse(visual_reduction: Any, sizes: ModelSizes) -> Reduction:
    known = ", ".join(METHODS)
    if not isinstance(visual_reduction, dict) or "method" not in visual_reduction:
        raise ValueError(
            f"visual_reduction is {visual_reduction!r}; it must be None or a dict with 'method', one of {known}"
        )
    options = dict(visual_reduction)
    method = options.pop("method")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"visual_reduction has method {method!r}; valid methods are {known}")
    valid = [each.name for each in fields(METHODS[method])]  # type: ignore[arg-type]  # methods are dataclasses
    for name in options:
        if name not in valid:
            raise ValueError(
                f"visual_reduction: {method} has no option {name!r}; valid options are {', '.join(valid) or 'none'}"
            )
    reduction = METHODS[method](**METHODS[method].completed(options, sizes))
    reduction.check(sizes)
    return reduction


def visual_reduction_from_text(text: str) -> dict | None:
    """The dict for `config.visual_reduction` from a command line: JSON, `fastv:k=2,ratio=0.5`,
    `illava:vit_k=[],llm_k=[6,7]`, `prumerge` or `none`.

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
    for part in filter(None, re.split(r",(?![^\[]*\])", rest)):  # not at the commas of a list
        name, _, value = part.partition("=")
        try:
            options[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"cannot read {part!r} in the reduction {text!r}; {form}") from None
    return options
