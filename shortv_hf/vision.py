"""Image and video features under a method that cuts them before the language model.

`reduced_features` runs upstream's own encoder and returns features of the same lengths, so that they fill the prompt's
placeholders; those that the method leaves out are marked (`reduction.DROPPED`), and the text model drops their positions
before its first layer. Marks travel with the features through whatever `generate` does to them.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .reduction import DROPPED, ClsAttention, ImageReduction, ModelSizes, Patches, TokenMap


# The recorder of the pass that this thread (or asyncio task) is in. Modules are shared by all threads, so a pass leaves
# nothing on them: the hooks below are there from construction on, and do nothing outside a recorder's pass. Compiled
# graphs cannot read a context variable, and need not while no recorder is open anywhere: `_OPEN` holds those that are.
_RECORDER: ContextVar["VisionRecorder | None"] = ContextVar("vision recorder", default=None)
_OPEN: list["VisionRecorder"] = []


def _tower(model: nn.Module) -> nn.Module | None:
    return getattr(model, "vision_tower", None)


def listen(model: nn.Module):
    """Hooks by which a [`VisionRecorder`] sees the vision tower and changes what the projector gets."""
    for module in () if _tower(model) is None else _tower(model).modules():
        if isinstance(module, CLIPAttention):
            module.register_forward_pre_hook(_record, with_kwargs=True)
    projector = getattr(model, "multi_modal_projector", None)
    if projector is not None:
        projector.register_forward_pre_hook(_before_projection)


def _record(module: nn.Module, args: tuple, kwargs: dict):
    recorder = _RECORDER.get() if _OPEN else None
    if recorder is not None and module in recorder.layers:
        recorder.record(module, args[0] if args else kwargs["hidden_states"])


def _before_projection(module: nn.Module, args: tuple) -> tuple | None:
    recorder = _RECORDER.get() if _OPEN else None
    if recorder is not None and recorder.merge is not None and module is recorder.projector:
        return (recorder.merge(*args),)
    return None


class VisionRecorder:
    """While open, records [CLS] query and keys of some layers of a CLIP tower, and lets `merge` replace the features that
    go into the projector. No attention matrix is made, whatever the tower's attention implementation; the recorded
    keys are computed once more, 0.1 % of a 7B prefill."""

    def __init__(self, model: nn.Module, reduction: ImageReduction, merge: Callable[[Tensor], Tensor] | None = None):
        self.layers: list[nn.Module] = []
        self.projector, self.merge = getattr(model, "multi_modal_projector", None), merge
        if reduction.needs_cls_attention:
            layers = [module for module in _tower(model).modules() if isinstance(module, CLIPAttention)]
            self.layers = [layers[i] for i in reduction.vision_layers(len(layers))]
        self.queries: dict[nn.Module, Tensor] = {}
        self.keys: dict[nn.Module, Tensor] = {}

    def __enter__(self) -> "VisionRecorder":
        self._token = _RECORDER.set(self)
        _OPEN.append(self)
        return self

    def __exit__(self, *_: Any):
        _OPEN.remove(self)
        _RECORDER.reset(self._token)

    @torch.no_grad()
    def record(self, attention: nn.Module, hidden_states: Tensor):
        """`hidden_states` `[images, 1 + N, C]` that one of the layers is about to attend with."""
        self.queries[attention] = attention.q_proj(hidden_states[:, :1])[:, 0]
        self.keys[attention] = attention.k_proj(hidden_states)

    def attentions(self) -> list[ClsAttention]:
        return [ClsAttention(self.queries[layer], self.keys[layer], layer.num_heads) for layer in self.layers]


def reduced_features(
    model: nn.Module,
    reduction: ImageReduction,
    get_features: Callable[[], list[Tensor]],
    image_sizes: Tensor | None = None,
    grid_thw: Tensor | None = None,
) -> list[Tensor]:
    """Features with the dropped ones marked: a list of `[n, h]` as `get_features` returns it, one per image or video, with
    new tokens at their places. Arguments: as [`token_maps`]."""
    features, found, merged = token_maps(model, reduction, get_features, image_sizes, grid_thw)
    maps, marked = [tokens for _, tokens in found], []
    for feature in features:
        parts = [maps.pop(0)]
        while sum(part.n for part in parts) < len(feature):  # an image of several tiles
            parts.append(maps.pop(0))
        kept = torch.cat([part.kept for part in parts]).to(feature.device)
        if parts[0].moves and not merged:
            split = feature.split([part.n for part in parts])
            feature = torch.cat(
                [_on(part, feature.device).apply(tile) for part, tile in zip(parts, split, strict=True)]
            )
        marked.append(feature.masked_fill(~kept[:, None], DROPPED))
    return marked


def token_maps(
    model: nn.Module,
    reduction: ImageReduction,
    get_features: Callable[[], list[Tensor]],
    image_sizes: Tensor | None = None,
    grid_thw: Tensor | None = None,
) -> tuple[list[Tensor], list[tuple[Patches, TokenMap]], bool]:
    """What a method makes of each image or video.

    Args:
        model: the vision-language model without its head.
        get_features: calls the parent's encoder; returns a list of `[n, h]`.
        image_sizes: `[images, 2]`, of models that cut images into tiles.
        grid_thw: `[images, 3]`, frames, rows and columns of patches, of models whose images differ in size.

    Returns:
        The features; in their order where the tokens of each image, video or tile are, and what becomes of them; and
        whether new tokens have been made already: that is done before the projector, where it maps tokens one to one.
    """
    patches = ModelSizes.of(model.config).patches
    found: list[tuple[Patches, TokenMap]] = []

    def merge(states: Tensor) -> Tensor:
        if states.ndim != 3 or states.shape[1] != patches:
            return states
        images = _cut([Patches.grid(1, *_sides(patches), states.device)] * len(states), recorder.attentions())
        found.extend((image, reduction.reduce(image)) for image in images)
        return torch.stack([tokens.apply(state) for (_, tokens), state in zip(found, states, strict=True)])

    with VisionRecorder(model, reduction, merge if reduction.merges and patches is not None else None) as recorder:
        features = get_features()
    if found:
        return features, found, True
    images = _cut(patches_of(model, features, image_sizes, grid_thw), recorder.attentions())
    return features, [(image, reduction.reduce(image)) for image in images], False


def _on(tokens: TokenMap, device: torch.device) -> TokenMap:
    parts = (None if part is None else part.to(device) for part in (tokens.target, tokens.weight, tokens.source))
    return TokenMap(tokens.n, *parts)


def _cut(images: list[Patches], attentions: list[ClsAttention]) -> list[Patches]:
    """The images, each with what was recorded of its own tiles."""
    start = 0
    for i, image in enumerate(images):
        vision = [attention.of_tiles(start, image.tiles) for attention in attentions]
        images[i] = Patches(image.tile, image.patch, image.tiles, image.height, image.width, vision)
        start += image.tiles
    return images


def patches_of(
    model: nn.Module, features: Sequence[Tensor], image_sizes: Tensor | None, grid_thw: Tensor | None
) -> list[Patches]:
    """Where the tokens of each image are in its tiles, its frames or its rows. Arguments: as [`token_maps`]."""
    patches = ModelSizes.of(model.config).patches
    if grid_thw is not None:
        merged = model.config.vision_config.spatial_merge_size
        return [Patches.grid(t, h // merged, w // merged) for t, h, w in grid_thw.tolist()]
    config = model.config
    packs = hasattr(model, "pack_image_features") and not hasattr(config, "vision_aspect_ratio")
    if image_sizes is not None and packs and patches is not None:
        return patches_of_tiles(model, image_sizes, patches)
    found = []
    for feature in features:
        n = len(feature)
        tiled = getattr(config, "image_grid_pinpoints", None) is not None
        if patches is None or n % patches or tiled:  # not known: one tile, without rows
            found.append(Patches(torch.zeros(n, dtype=torch.long), torch.arange(n), 1, None, None, []))
        else:
            found.append(Patches.grid(n // patches, *_sides(patches)))
    return found


def _sides(patches: int) -> tuple[int, int]:
    side = round(patches**0.5)
    return side, patches // side


def patches_of_tiles(model: nn.Module, image_sizes: Tensor, patches: int) -> list[Patches]:
    """Which patch of which tile each token of an image is.

    The model's own packing says so: it packs the patches' numbers as if they were features."""
    config = model.config
    tiles = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in image_sizes
    ]
    numbers = [torch.arange(n * patches, dtype=torch.float64).view(n, patches, 1) for n in tiles]
    packed, _ = model.pack_image_features(
        numbers, image_sizes, "default", image_newline=torch.tensor([-1.0], dtype=torch.float64)
    )
    found = []
    for n, each in zip(tiles, packed, strict=True):
        places = each[:, 0].long()
        patch = torch.where(places < 0, -1, places % patches)
        found.append(Patches(places.clamp(min=0) // patches, patch, n, *_sides(patches), []))
    return found
