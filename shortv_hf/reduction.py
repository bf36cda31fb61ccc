"""What a visual-token reduction method is: options, and one function that returns a map of tokens.

A method is one small class in a file of its own (`reduction_….py`); its fields are the options of the dict in
`config.visual_reduction`. It works at one of two places (shapes: B rows, S tokens, N tokens of an image):

    `StreamReduction`: tokens leave the stream at the input of decoder layer `k` and keep their positions.
    `ImageReduction`: the language model never sees the others; positions in a row are contiguous.

Both say what becomes of each token by a [`TokenMap`], so that nothing else needs to know which method made it: the
decoder (`plan.py`), the vision side (`vision.py`), pictures and FLOPs.
"""

import json
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig


# In every channel of an image feature: the token does not reach the language model.
DROPPED = float("-inf")


def is_dropped(features: Tensor) -> Tensor:
    """`[..., d]` → `[...]` bool: features that an [`ImageReduction`] marked."""
    return (features == DROPPED).all(-1)


@dataclass(frozen=True)
class TokenMap:
    """New tokens out of N old ones.

    Attributes:
        n: N.
        target: `[..., E]`, the place of the token that this one goes to; -1: dropped.
        weight: `[..., E]`, how much of it goes there; `None`: all of it.
        source: `[..., E]`, which of the old tokens each entry is; `None`: each once, in order, so that E = N.
    """

    n: int
    target: Tensor
    weight: Tensor | None = None
    source: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """`[..., N]` bool, the places that hold a token afterwards."""
        places = torch.zeros(*self.target.shape[:-1], self.n + 1, dtype=torch.bool, device=self.target.device)
        return places.scatter(-1, self._places, True)[..., : self.n]

    @property
    def _places(self) -> Tensor:
        return torch.where(self.target < 0, self.n, self.target)  # what is dropped goes behind the last

    @property
    def moves(self) -> bool:
        """Whether tokens change, and do not just stay or go."""
        return self.weight is not None or self.source is not None

    def apply(self, states: Tensor) -> Tensor:
        """`[..., N, C]` → `[..., N, C]`, out of place: new tokens at their places, and nothing of use elsewhere."""
        if not self.moves:
            return states
        taken = states.float()
        if self.source is not None:
            taken = taken.gather(-2, self.source[..., None].expand(*self.source.shape, states.shape[-1]))
        if self.weight is not None:
            taken = taken * self.weight[..., None]
        new = taken.new_zeros(*states.shape[:-2], self.n + 1, states.shape[-1])
        new = new.scatter_add(-2, self._places[..., None].expand_as(taken), taken)
        return new[..., : self.n, :].to(states.dtype)

    @classmethod
    def keeping(cls, keep: Tensor) -> "TokenMap":
        """The map that leaves the tokens where `keep` `[..., N]` is True as they are, and drops the others."""
        n = keep.shape[-1]
        return cls(n, torch.where(keep, torch.arange(n, device=keep.device), -1))


@dataclass(frozen=True)
class ModelSizes:
    """What options are checked against: layers of the decoder and of the vision tower, the tower's type, and how images
    become tokens."""

    decoder_layers: int
    vision_layers: int
    vision_type: str
    patches: int | None  # visual tokens per tile or image; None where it varies from image to image
    tiled: bool = False  # several tiles per image, and newline tokens between
    has_cls_feature: bool = False  # the tower's CLS token goes to the language model too
    deepstack: int = 0  # the first layers of the decoder, which add features to visual tokens

    @classmethod
    def of(cls, config: PretrainedConfig, select_strategy: str | None = None) -> "ModelSizes":
        """Sizes of a vision-language model's config; with a call's own `vision_feature_select_strategy`, if it has one."""
        vision = config.vision_config
        strategy = select_strategy or getattr(config, "vision_feature_select_strategy", None)
        return cls(
            decoder_layers=config.get_text_config().num_hidden_layers,
            vision_layers=getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", 0),
            vision_type=vision.model_type,
            patches=_tokens_per_image(config),
            tiled=getattr(config, "image_grid_pinpoints", None) is not None,
            has_cls_feature=strategy == "full" and vision.model_type == "clip_vision_model",
            deepstack=len(getattr(vision, "deepstack_visual_indexes", None) or ()),
        )


def _tokens_per_image(config: PretrainedConfig) -> int | None:
    if hasattr(config, "mm_tokens_per_image"):  # families that pool patches say how many are left
        return config.mm_tokens_per_image
    if hasattr(config, "downsample_ratio"):
        return config.image_seq_length
    vision = config.vision_config
    sides = [_both(getattr(vision, name, None)) for name in ("image_size", "patch_size")]
    if None in sides or hasattr(vision, "spatial_merge_size") or hasattr(config, "spatial_merge_size"):
        return None
    (height, width), (patch_height, patch_width) = sides
    return (height // patch_height) * (width // patch_width)


def _both(size: Any) -> tuple[int, int] | None:
    """Height and width, of one number or of two."""
    if isinstance(size, (list, tuple)):
        return size[0], size[1]
    return None if size is None else (size, size)


METHODS: dict[str, type["Reduction"]] = {}  # filled by the classes themselves


class Reduction:
    """What all methods share. `identity(sizes)`: these options change nothing, so the dense code runs.
    `looks_at_last_token`: the choice depends on the prompt's last token, so that the prompt must come in one piece, and
    without a cache every step chooses anew."""

    method: ClassVar[str]
    looks_at_last_token: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "method" in vars(cls):
            METHODS[cls.method] = cls

    @property
    def first_layer(self) -> int:
        """The first decoder layer that sees fewer tokens."""
        raise NotImplementedError

    def check(self, sizes: ModelSizes):
        """Raises `ValueError` that names the offending value and the valid range."""

    def identity(self, sizes: ModelSizes) -> bool:
        return False

    def left(self, v: int, sizes: ModelSizes) -> int | None:
        """How many of a prompt's `v` visual tokens stay; `None` if that depends on the image."""
        return None


class StreamReduction(Reduction):
    """Visual tokens leave at the input of decoder layer `k` (0-based), at prefill only."""

    k: int

    @property
    def first_layer(self) -> int:
        return self.k

    def check(self, sizes: ModelSizes):
        require_integer(self, "k", 1, sizes.decoder_layers)
        if self.k < sizes.deepstack:
            raise ValueError(
                f"{self.method}: k is {self.k}; this model's first {sizes.deepstack} layers add features of the vision "
                f"tower to visual tokens, so the valid range is the integers {sizes.deepstack} to {sizes.decoder_layers}"
            )

    def left(self, v: int, sizes: ModelSizes) -> int | None:
        return self.count(v)

    @property
    def needs_scores(self) -> bool:
        """Whether tokens are ranked by the attention that the prompt's last token pays them in layer k - 1."""
        return False

    def count(self, v: int) -> int:
        """How many of a row's `v` visual tokens stay."""
        raise NotImplementedError

    def reduce(self, scores: Tensor | None, visual: Tensor, counts: Tensor) -> TokenMap:
        """What becomes of the tokens of each row, without a host synchronisation.

        Args:
            scores: `[B, S]` float32, where `needs_scores`. visual: `[B, S]` bool, the tokens that may go. counts: `[B]`,
                how many of them stay.
        """
        raise NotImplementedError


@dataclass
class Patches:
    """The n tokens of an image, or of a video.

    Attributes:
        tile: `[n]`, the tile (of a video: the frame) of each token.
        patch: `[n]`, which patch of its tile it is; -1: a newline token, which always stays.
        tiles: how many tiles there are.
        height, width: the grid of a tile's patches; `None` if it is not known.
        vision: what was recorded in the vision tower, tiles first.
    """

    tile: Tensor
    patch: Tensor
    tiles: int
    height: int | None
    width: int | None
    vision: list["ClsAttention"]

    @classmethod
    def grid(cls, tiles: int, height: int, width: int, device: torch.device | str = "cpu") -> "Patches":
        """Tiles of patches without newlines."""
        n = height * width
        places = torch.arange(tiles * n, device=device)
        return cls(places // n, places % n, tiles, height, width, [])

    def highest(self, scores: Tensor, count: int) -> Tensor:
        """`[n]` bool: newlines, and in each tile the `count` tokens with the highest `scores` `[tiles, patches]`, of
        those that are there."""
        newline = self.patch < 0
        at = self.tile.to(scores.device), self.patch.clamp(min=0).to(scores.device)
        present = torch.zeros_like(scores, dtype=torch.bool).index_put(
            (at[0][~newline], at[1][~newline]), _true(scores)
        )
        keep = keep_highest(scores, present, torch.full((len(scores),), count, device=scores.device))
        return keep[at].to(newline.device) | newline


def _true(like: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=like.device)


class ImageReduction(Reduction):
    """Visual tokens are cut after the vision tower: per image or video, and per tile where tiles are known."""

    needs_cls_attention: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    @property
    def first_layer(self) -> int:
        return 0

    def check(self, sizes: ModelSizes):
        if self.needs_cls_attention and sizes.vision_type != "clip_vision_model":
            raise ValueError(
                f"{self.method} reads the attention of [CLS] in a clip_vision_model; the vision tower is "
                f"{sizes.vision_type!r}"
            )
        if sizes.has_cls_feature:
            raise ValueError(
                f"{self.method} works on patches; vision_feature_select_strategy is 'full', the valid value is 'default'"
            )
        if self.merges and sizes.tiled:
            raise ValueError(
                f"{self.method} is not defined for images in tiles, as LLaVA-NeXT has them: its tokens have no place in the "
                "rows of the tile grid, which newline tokens end"
            )

    def vision_layers(self, n: int) -> list[int]:
        """The layers of a vision tower of `n` whose CLS query and keys the method reads."""
        return []

    def reduce(self, image: Patches) -> TokenMap:
        """What becomes of an image's n tokens."""
        raise NotImplementedError


class SelectingReduction(ImageReduction):
    """Keeps `token_num` tokens of every tile or image as they are."""

    token_num: int

    def check(self, sizes: ModelSizes):
        super().check(sizes)
        per_tile = None if sizes.tiled and sizes.vision_type != "clip_vision_model" else sizes.patches
        require_integer(self, "token_num", 1, per_tile)

    def identity(self, sizes: ModelSizes) -> bool:
        return self.token_num == sizes.patches and not (sizes.tiled and sizes.vision_type != "clip_vision_model")

    def left(self, v: int, sizes: ModelSizes) -> int | None:
        if sizes.patches is None or v % sizes.patches:
            return None
        return self.token_num * (v // sizes.patches)


# What methods are made of


def last_row_attention(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of one query per row, mean over heads.

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


def keep_highest(scores: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
    """Mask `[B, S]` of the `counts` `[B]` candidates with the highest `scores` `[B, S]`; of equal ones the first."""
    ranked = scores.masked_fill(~candidates, float("-inf")).argsort(dim=1, descending=True, stable=True)
    return candidates & (ranked.argsort(dim=1) < counts[:, None])


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

    def of_tiles(self, start: int, n: int) -> "ClsAttention":
        return ClsAttention(self.query[start : start + n], self.keys[start : start + n], self.heads)


# Options


def require_integer(options: Reduction, name: str, low: int, high: int | None):
    """Raises `ValueError` unless the option is an integer in `low..high`, without an upper end if that is `None`."""
    value = getattr(options, name)
    end = "on" if high is None else f"to {high}"
    if (
        isinstance(value, bool)
        or not isinstance(value, Integral)
        or value < low
        or (high is not None and value > high)
    ):
        raise ValueError(f"{options.method}: {name} is {value!r}; the valid range is the integers {low} {end}")


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
    valid = [field.name for field in fields(METHODS[method])]  # type: ignore[arg-type]
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
