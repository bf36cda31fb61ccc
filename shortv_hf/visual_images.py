"""The surgery on the vision side, shared by all methods that cut image features before the language model.

`reduced_image_features` runs the parent's own `get_image_features` and returns features of the same lengths, so that they
fill the prompt's image tokens; those that the method leaves out are marked (`visual_tokens.DROPPED`), and the text model
drops their positions before its first layer. Marks travel with the features through whatever `generate` does to them.
"""

from contextvars import ContextVar

import torch
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .visual_reduction import ClsAttention, ImageReduction, MergingReduction, keep_highest
from .visual_tokens import DROPPED


# The recorder of the pass that this thread (or asyncio task) is in. Modules are shared by all threads, so a pass leaves
# nothing on them: the hooks below are there from construction on, and do nothing outside a recorder's pass. Compiled
# graphs cannot read a context variable, and need not while no recorder is open anywhere: `_OPEN` holds those that are.
_RECORDER: ContextVar["VisionRecorder | None"] = ContextVar("vision recorder", default=None)
_OPEN: list["VisionRecorder"] = []


def listen(model):
    """Hooks by which a [`VisionRecorder`] sees the vision tower and changes what the projector gets."""
    for module in model.vision_tower.modules():
        if isinstance(module, CLIPAttention):
            module.register_forward_pre_hook(_record, with_kwargs=True)
    model.multi_modal_projector.register_forward_pre_hook(_before_projection)


def _record(module, args, kwargs):
    recorder = _RECORDER.get() if _OPEN else None
    if recorder is not None and module in recorder.layers:
        recorder.record(module, args[0] if args else kwargs["hidden_states"])


def _before_projection(module, args):
    recorder = _RECORDER.get() if _OPEN else None
    if recorder is not None and recorder.merge is not None and module is recorder.projector:
        return (recorder.merge(*args),)


class VisionRecorder:
    """While open, records [CLS] query and keys of some layers of a CLIP tower, and lets `merge` replace the features that
    go into the projector. No attention matrix is made, whatever the tower's attention implementation; the recorded
    keys are computed once more, 0.1 % of a 7B prefill."""

    def __init__(self, model, reduction: ImageReduction, merge=None):
        self.layers, self.projector, self.merge = [], model.multi_modal_projector, merge
        if reduction.needs_cls_attention:
            layers = [module for module in model.vision_tower.modules() if isinstance(module, CLIPAttention)]
            self.layers = [layers[i] for i in reduction.vision_layers(len(layers))]
        self.queries, self.keys = {}, {}

    def __enter__(self):
        self._token = _RECORDER.set(self)
        _OPEN.append(self)
        return self

    def __exit__(self, *_):
        _OPEN.remove(self)
        _RECORDER.reset(self._token)

    @torch.no_grad()
    def record(self, attention, hidden_states: torch.Tensor):
        """`hidden_states` `[images, 1 + N, C]` that one of the layers is about to attend with."""
        self.queries[attention] = attention.q_proj(hidden_states[:, :1])[:, 0]
        self.keys[attention] = attention.k_proj(hidden_states)

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
    if isinstance(reduction, MergingReduction):
        return _merged_features(model, reduction, get_features)
    with VisionRecorder(model, reduction) as recorder:
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


def _merged_features(model, reduction, get_features):
    """Merges before the projector; images with fewer tokens than others are filled up, and the filling marked."""
    lengths = []

    def fill(tokens, length, value=0.0):
        return torch.nn.functional.pad(tokens, (0, 0, 0, length - len(tokens)), value=value)

    def merge(features):
        vision = recorder.attentions()
        merged = [reduction.merge(feature, vision, i) for i, feature in enumerate(features)]
        lengths.extend(len(tokens) for tokens in merged)
        return torch.stack([fill(tokens, max(lengths)) for tokens in merged])

    with VisionRecorder(model, reduction, merge) as recorder:
        features = get_features()
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
