"""The surgery on the vision side, shared by all methods that cut image features before the language model.

`reduced_image_features` runs the parent's own `get_image_features` and returns features of the same lengths, so that they
fill the prompt's image tokens; those that the method leaves out are marked (`visual_tokens.DROPPED`), and the text model
drops their positions before its first layer. Marks travel with the features through whatever `generate` does to them.
"""

import torch
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .visual_reduction import ClsAttention, ImageReduction, MergingReduction, keep_highest
from .visual_tokens import DROPPED


class VisionRecorder:
    """While open, records [CLS] query and keys of some layers of a CLIP tower. The tower computes them anyway; no
    attention matrix is made, whatever its attention implementation."""

    def __init__(self, tower, reduction: ImageReduction):
        self.layers = []
        if reduction.needs_cls_attention:
            layers = [module for module in tower.modules() if isinstance(module, CLIPAttention)]
            self.layers = [layers[i] for i in reduction.vision_layers(len(layers))]
        self.queries, self.keys = {}, {}

    def __enter__(self):
        def record(layer, into, select):
            return lambda module, args, output: into.update({layer: select(output).detach()})

        self._hooks = []
        for layer in self.layers:
            self._hooks += [
                layer.q_proj.register_forward_hook(record(layer, self.queries, lambda output: output[:, 0])),
                layer.k_proj.register_forward_hook(record(layer, self.keys, lambda output: output)),
            ]
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()

    def attentions(self) -> list[ClsAttention]:
        return [ClsAttention(self.queries[layer], self.keys[layer], layer.num_heads) for layer in self.layers]


def reduced_image_features(model, reduction: ImageReduction, get_features, image_sizes=None) -> list[torch.Tensor]:
    """Image features with the dropped ones marked.

    Args:
        model: the LLaVA or LLaVA-NeXT model.
        get_features: calls the parent's `get_image_features`; returns a list of `[n, h]`, one per image.
        image_sizes: LLaVA-NeXT's, `[images, 2]`.

    Returns:
        The list, same shapes. A selecting method marks the places of the patches that go; newline tokens stay. A
        merging method's T tokens come first.
    """
    with VisionRecorder(model.vision_tower, reduction) as recorder:
        if isinstance(reduction, MergingReduction):
            return _merge(model, reduction, get_features, recorder)
        features = get_features()
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    places = [torch.arange(side**2)] * len(features)
    tiles = [1] * len(features)
    if image_sizes is not None:
        tiles, places = places_of_patches(model, image_sizes, side**2)
    scores = reduction.scores(tiles, side**2, recorder.attentions())
    marked = []
    for feature, n, place, scored in zip(features, tiles, places, scores.split(tiles), strict=True):
        place = place.to(scored.device)
        newline = place < 0
        present = torch.zeros(n * side**2, dtype=torch.bool, device=scored.device)
        present[place[~newline]] = True  # patches of the padding around an image are not in the prompt
        counts = torch.full((n,), reduction.token_num, device=scored.device)
        keep = keep_highest(scored, present.unflatten(0, (n, -1)), counts).flatten()
        keep = (keep[place.clamp(min=0)] | newline).to(feature.device)
        marked.append(feature.masked_fill(~keep[:, None], DROPPED))
    return marked


def _merge(model, reduction, get_features, recorder):
    """Merges before the projector; images with fewer tokens than others are filled up, and the filling marked."""
    lengths = []

    def fill(tokens, length, value=0.0):
        return torch.nn.functional.pad(tokens, (0, 0, 0, length - len(tokens)), value=value)

    def merge(projector, args):
        (features,) = args
        vision = recorder.attentions()
        merged = [reduction.merge(feature, vision, i) for i, feature in enumerate(features)]
        lengths.extend(len(tokens) for tokens in merged)
        return (torch.stack([fill(tokens, max(lengths)) for tokens in merged]),)

    hook = model.multi_modal_projector.register_forward_pre_hook(merge)
    try:
        features = get_features()
    finally:
        hook.remove()
    config = model.config.vision_config
    patches = (config.image_size // config.patch_size) ** 2
    return [fill(feature[:n], patches, DROPPED) for feature, n in zip(features, lengths, strict=True)]


def places_of_patches(model, image_sizes, patches: int):
    """Tiles per image, and for each token of an image which patch it is, counted through its tiles; -1 for newlines.

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
    return tiles, [places[:, 0].long() for places in packed]
