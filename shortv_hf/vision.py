"""Image and video features under a method that cuts them before the language model.

`reduced_features` runs the parent's own `get_image_features` and returns features of the same lengths, so that they
fill the prompt's image tokens; those that the method leaves out are marked (`reduction.DROPPED`), and the text model
drops their positions before its first layer. Marks travel with the features through whatever `generate` does to them.
"""

import copy
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from fractions import Fraction
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention

from .reduction import DROPPED, ClsAttention, ImageReduction, ModelSizes, Patches, TokenMap, pair
from .upstream import family_of


# Modules are shared by all threads, so a pass leaves nothing on them: the hooks are there from construction on, and do
# nothing outside a pass. Compiled graphs cannot read a context variable, and need not while no pass is open anywhere:
# `_OPEN` holds those that are.
_PASS: ContextVar["VisionPass | None"] = ContextVar("vision pass", default=None)
_OPEN: list["VisionPass"] = []


_WATCH: ContextVar["Watch | None"] = ContextVar("who looks on", default=None)
_WATCHING: list["Watch"] = []


class Watch:
    """While open, keeps what happens in this thread (or asyncio task), to be looked at afterwards.

    Attributes:
        seen: each [`VisionPass`], and each `Stream` of the decoder, in the order in which they began.
    """

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __enter__(self) -> Any:
        self._token = _WATCH.set(self)
        _WATCHING.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _WATCHING.remove(self)
        _WATCH.reset(self._token)


def notice(what: Any) -> None:
    """Let a [`Watch`] that is open keep this."""
    watch = _WATCH.get() if _WATCHING else None
    if watch is not None:
        watch.seen.append(what)


class VisionPass:
    """While open, hooks on the modules of vision tower and projector find it in this thread (or asyncio task)."""

    def __enter__(self) -> Any:
        notice(self)
        self._token = _PASS.set(self)
        _OPEN.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _OPEN.remove(self)
        _PASS.reset(self._token)


def current_pass() -> VisionPass | None:
    """The pass that is open in this thread (or asyncio task)."""
    return _PASS.get() if _OPEN else None


def listen(model: nn.Module) -> None:
    """Hooks by which a [`VisionRecorder`] sees a CLIP tower, and changes what a projector gets; once per model, at its
    construction."""
    for module in clip_attentions(model):
        module.register_forward_pre_hook(_record, with_kwargs=True)
    projector = getattr(model, "multi_modal_projector", None)
    if projector is not None:
        projector.register_forward_pre_hook(_before_projection)


def clip_attentions(model: nn.Module) -> list[CLIPAttention]:
    """The attention modules of the model's CLIP tower, in the order of its layers; none of another tower."""
    return [module for module in model.modules() if isinstance(module, CLIPAttention)]


def _record(module: CLIPAttention, args: tuple, kwargs: dict) -> None:
    recorder = current_pass()
    if isinstance(recorder, VisionRecorder) and module in recorder.layers:
        recorder.record(module, args[0] if args else kwargs["hidden_states"])


def _before_projection(module: nn.Module, args: tuple) -> tuple | None:
    recorder = current_pass()
    if isinstance(recorder, VisionRecorder) and module is recorder.projector and args:
        return (recorder.before_projection(args[0]), *args[1:])
    return None


class VisionRecorder(VisionPass):
    """While open, records [CLS] query and keys of the layers of a CLIP tower that a method asks for, and lets
    `before_projection` replace the features `[images, tokens, C]` that go into the projector. No attention matrix is
    made, whatever the tower's attention implementation; the recorded keys are computed once more, 0.1 % of a 7B
    prefill."""

    def __init__(self, model: nn.Module, reduction: ImageReduction, before_projection: Callable[[Tensor], Tensor]):
        self.layers: list[CLIPAttention] = []
        self.projector, self.before_projection = getattr(model, "multi_modal_projector", None), before_projection
        if reduction.needs_cls_attention:
            layers = clip_attentions(model)
            self.layers = [layers[i] for i in reduction.vision_layers(len(layers))]
        self.queries: dict[nn.Module, Tensor] = {}
        self.keys: dict[nn.Module, Tensor] = {}

    @torch.no_grad()
    def record(self, attention: CLIPAttention, hidden_states: Tensor) -> None:
        """`hidden_states` `[images, 1 + N, C]` that one of the layers is about to attend with."""
        self.queries[attention] = attention.q_proj(hidden_states[:, :1])[:, 0]
        self.keys[attention] = attention.k_proj(hidden_states)

    def attentions(self) -> list[ClsAttention]:
        """What was recorded, layer by layer, of all tiles of all images."""
        return [ClsAttention(self.queries[layer], self.keys[layer], layer.num_heads) for layer in self.layers]


class ReducedImage(NamedTuple):
    """One image or video: its features `[n, h]`, with the dropped ones marked; its patches; and where they went."""

    features: Tensor
    patches: Patches
    map: TokenMap


def reduced_features(
    model: nn.Module,
    reduction: ImageReduction,
    get_features: Callable[[], list[Tensor]],
    *,
    image_sizes: Tensor | None = None,
    grid_thw: Tensor | None = None,
) -> list[Tensor]:
    """Features per image or video, of the lengths that they have without a method; those left out are marked.

    Arguments and errors as [`reduced_images`].
    """
    images = reduced_images(model, reduction, get_features, image_sizes=image_sizes, grid_thw=grid_thw)
    return [image.features for image in images]


def reduced_images(
    model: nn.Module,
    reduction: ImageReduction,
    get_features: Callable[[], list[Tensor]],
    *,
    image_sizes: Tensor | None = None,
    grid_thw: Tensor | None = None,
) -> list[ReducedImage]:
    """What a method makes of each image or video.

    Tokens are merged before a projector that takes each by itself, as PruMerge does; otherwise after it.

    Args:
        model: the multimodal model, to which [`listen`] was called.
        get_features: calls the parent's own method; returns features `[n, h]` per image or video.
        image_sizes: `[images, 2]`, where images are cut into tiles.
        grid_thw: `[images, 3]`, the patches of each image or video in time, height and width before they are merged.

    Raises:
        ValueError: if the method needs a grid, and that of an image is not known, or does not fit its features.
    """
    sizes = ModelSizes.of(model.config)
    found: list[tuple[Patches, TokenMap]] = []

    def find(lengths: list[int], device: torch.device) -> None:
        images = find_patches(model, sizes, lengths, device, image_sizes=image_sizes, grid_thw=grid_thw)
        attentions, start = recorder.attentions(), 0
        for image in images:
            tiles = slice(start, start + image.tiles)
            image = replace(image, vision=[each.of_tiles(tiles, device) for each in attentions])
            found.append((image, reduction.reduce(image)))
            start = tiles.stop

    def before_projection(states: Tensor) -> Tensor:
        if not reduction.merges or states.ndim != 3 or states.shape[1] != sizes.patches:
            return states
        find([states.shape[1]] * len(states), states.device)
        return torch.stack([tokens.apply(image) for (_, tokens), image in zip(found, states, strict=True)])

    with VisionRecorder(model, reduction, before_projection) as recorder:
        features = get_features()
        if not found:
            find([len(feature) for feature in features], features[0].device)
            features = [tokens.apply(feature) for (_, tokens), feature in zip(found, features, strict=True)]
    return [
        ReducedImage(feature.masked_fill(~tokens.kept.to(feature.device)[:, None], DROPPED), patches, tokens)
        for (patches, tokens), feature in zip(found, features, strict=True)
    ]


class SmallerGrid:
    """A model whose tower leaves `side` x `side` patches of each picture, for one call of its encoders: packing and
    pooling, which take the side from the config, find the smaller one. The model itself is not touched.

    Attributes:
        view: the model with that config; the modules are the same.
    """

    def __init__(self, model: Any, side: int, patches: int):
        self.model, self.patches = model, patches
        self.view = copy.copy(model)
        config = copy.copy(model.config)
        config.vision_config = copy.copy(config.vision_config)
        # The side is the picture's size over this, rounded down. A fraction makes that exact.
        vars(config.vision_config)["patch_size"] = Fraction(pair(config.vision_config.image_size)[0], side)
        vars(self.view)["config"] = config
        for name, method in (("pack_image_features", self._pack), ("apply_pooling", self._pool)):
            if hasattr(model, name):
                vars(self.view)[name] = method
        self._packed: list[int] = []
        self._pooled: tuple[int, int] | None = None

    def _pack(self, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(self.model.pack_image_features).bind(*args, **kwargs).arguments
        dense = [torch.zeros(len(tiles), self.patches, 1) for tiles in call["image_features"]]
        newline = None if call.get("image_newline") is None else torch.zeros(1)
        packed, _ = self.model.pack_image_features(**{**call, "image_features": dense, "image_newline": newline})
        self._packed += [len(each) for each in packed]
        return type(self.model).pack_image_features(self.view, *args, **kwargs)

    def _pool(self, features: Tensor) -> Tensor:
        pooled = type(self.model).apply_pooling(self.view, features)
        dense = self.model.apply_pooling(torch.zeros(1, self.patches, 1)).shape[1]
        self._pooled = len(features), dense - pooled.shape[1]
        return pooled

    def dense_lengths(self, features: list[Tensor], tokens: int | None) -> list[int]:
        """How many tokens images or videos have whose `features` `[m, h]` were made by the view; `tokens`, where those of
        a picture are neither packed nor pooled."""
        if self._packed:
            return self._packed
        if self._pooled is not None:
            frames, fewer = self._pooled
            return [len(each) + frames // len(features) * fewer for each in features]
        assert tokens is not None  # the methods' check
        return [tokens] * len(features)


def find_patches(
    model: Any,
    sizes: ModelSizes,
    lengths: list[int],
    device: torch.device,
    *,
    image_sizes: Tensor | None = None,
    grid_thw: Tensor | None = None,
) -> list[Patches]:
    """Which patch each of the `lengths` tokens of the images or videos is. Arguments as [`reduced_images`].

    Raises:
        ValueError: if a grid does not have as many places as there are tokens.
    """
    if grid_thw is not None:
        merged = model.config.vision_config.spatial_merge_size
        images = [
            Patches.of_grid(frames, height // merged, width // merged, device, video=frames > 1)
            for frames, height, width in grid_thw.tolist()
        ]
    elif image_sizes is not None and sizes.tiled and sizes.patches is not None:
        images = packed_patches(model, sizes.patches, image_sizes, device)
    else:
        images = [square_patches(None if sizes.tiled else sizes.patches, n, device) for n in lengths]
    if [len(image.patch) for image in images] != lengths:
        raise ValueError(
            f"the grids of the images have {[len(image.patch) for image in images]} places, and their features are {lengths}"
        )
    return images


def square_patches(per_tile: int | None, n: int, device: torch.device) -> Patches:
    """Square tiles of `per_tile` patches, if that makes `n`; otherwise patches of no known grid."""
    side = isqrt(per_tile or 0)
    if not per_tile or side**2 != per_tile or n % per_tile:
        return Patches.without_grid(n, device)
    return Patches.of_grid(n // per_tile, side, side, device)


def packed_patches(model: Any, per_tile: int, image_sizes: Tensor, device: torch.device) -> list[Patches]:
    """Patches of images in tiles of `per_tile`, newline tokens among them. The model's own packing says which token is
    which: it packs the patches' numbers, counted through the tiles, as if they were features."""
    config, side = model.config, isqrt(per_tile)
    tiles = [
        family_of(model).image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in image_sizes
    ]
    numbers = [torch.arange(n * per_tile, dtype=torch.float64).view(n, per_tile, 1) for n in tiles]
    packed, _ = model.pack_image_features(
        numbers, image_sizes, "default", image_newline=torch.tensor([-1.0], dtype=torch.float64)
    )
    images = []
    for n, numbered in zip(tiles, packed, strict=True):
        number = numbered[:, 0].long().to(device)
        newline = number < 0
        tile, patch = (number // per_tile).clamp(min=0), torch.where(newline, -1, number % per_tile)
        images.append(Patches(tile, patch, n, side, side))
    return images
