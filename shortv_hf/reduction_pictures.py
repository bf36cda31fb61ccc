"""Pictures of what a reduction method does with the patches of an image, drawn over what the model sees of it.

Used by `shortv visualize`. Pillow alone.
"""

import colorsys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import PreTrainedModel, ProcessorMixin

from .chat import token_reduction
from .images import to_rgb
from .prompts import user_message
from .upstream import find_cache, image_features
from .visual_images import VisionRecorder, places_of_patches
from .visual_reduction import (
    N_NEIGHBOURS,
    DecoderReduction,
    Downsample,
    ImageReduction,
    ModelSizes,
    PruMerge,
    parse_visual_reduction,
    similarities,
)


ABSENT, DROPPED, REST, KEPT, MERGED = range(5)
LEGEND = {
    KEPT: "framed: kept",
    MERGED: "tinted: merged into the kept patch of that colour",
    REST: "dark with a dot: in the token of all the rest",
    DROPPED: "dark: dropped",
    ABSENT: "light: padding, never in the prompt",
}


@dataclass
class PatchFates:
    """What becomes of the patches of one tile.

    Attributes:
        title: which tile, and how many patches are kept.
        states: `[N]`, one of ABSENT, DROPPED, REST, KEPT, MERGED.
        group: `[N]`, equal for patches that end up in one token; -1 for those in none, or in the token of the rest.
    """

    title: str
    states: torch.Tensor
    group: torch.Tensor


@torch.no_grad()
def patch_fates(model: PreTrainedModel, inputs: dict, options: dict | None) -> list[PatchFates]:
    """The fates of the first row's first image, one per tile, under `options` (as `config.visual_reduction`).

    Args:
        inputs: model inputs of one row, as a processor returns them.

    Raises:
        ValueError: for bad options, or if `inputs` hold no image.
    """
    if "pixel_values" not in inputs:
        raise ValueError("there is no image to draw on")
    reduction = parse_visual_reduction(options, ModelSizes.of(model.config))
    n = ModelSizes.of(model.config).patches
    tiles, places = [1], [torch.arange(n)]
    if "image_sizes" in inputs:
        tiles, places = places_of_patches(model.model, inputs["image_sizes"][:1], n)
    place = places[0]
    with token_reduction(model, options):
        if isinstance(reduction, (PruMerge, Downsample)):
            states, group = _merged(model, inputs, reduction, n)
        elif isinstance(reduction, ImageReduction):
            images = {name: inputs[name][:1] for name in ("pixel_values", "image_sizes") if name in inputs}
            features = model.get_image_features(**images)
            kept = image_features(features)[0].isfinite().all(-1).cpu()
            states, group = _selected(kept, place, tiles[0] * n)
        else:
            kept = _kept_in_decoder(model, inputs, reduction)[: len(place)]
            states, group = _selected(kept, place, tiles[0] * n)
    return [
        PatchFates(_title(i, tiles[0], part, number), part, number)
        for i, (part, number) in enumerate(zip(states.split(n), group.split(n), strict=True))
    ]


def _title(tile, tiles, states, group):
    name = "" if tiles == 1 else "overview: " if tile == 0 else f"tile {tile}: "
    n = int((states != ABSENT).sum())
    if (states == MERGED).all():
        return f"{len(group.unique())} tokens of {n} patches"
    return f"{name}{int((states == KEPT).sum())} of {n} patches kept"


def _selected(kept, place, n):
    """Kept tokens `[tokens]` → states of `n` patches, by the patch that each token is."""
    states = torch.full((n,), ABSENT)
    patch = place >= 0
    states[place[patch]] = torch.where(kept[patch], KEPT, DROPPED)
    return states, torch.where(states == KEPT, torch.arange(n), -1)


def _kept_in_decoder(model, inputs, reduction: DecoderReduction | None):
    """Of the visual tokens in the row's prompt, which the last layer's cache holds."""
    cache = find_cache(model(**inputs, use_cache=True))
    visual = (inputs["input_ids"][0] == model.config.image_token_id).cpu()
    slots = getattr(cache.layers[-1], "slots", None)
    if slots is None:  # nothing was dropped
        return torch.ones(int(visual.sum()), dtype=torch.bool)
    held = torch.zeros(len(visual), dtype=torch.bool)
    held[slots[0][slots[0] >= 0].cpu()] = True
    return held[visual]


def _merged(model, inputs, reduction, n):
    if isinstance(reduction, Downsample):
        side = round(n**0.5)
        rows, columns = torch.arange(side) // reduction.factor, torch.arange(side) // reduction.factor
        group = (rows[:, None] * (side // reduction.factor) + columns).flatten()
        return torch.full((n,), MERGED), group
    with token_reduction(model, None), VisionRecorder(model.model.vision_tower, reduction) as recorder:
        model.get_image_features(pixel_values=inputs["pixel_values"][:1])
    (vision,) = recorder.attentions()
    kept = reduction.kept_patches(vision.row(heads=1)[0])
    states, group = torch.full((n,), REST), torch.full((n,), -1)
    if len(kept):
        similar = similarities(vision.keys[0, 1:], kept)
        nearest = similar.topk(min(N_NEIGHBOURS, n - 1), dim=1).indices
        near = torch.full_like(similar, float("-inf")).scatter(1, nearest, similar.gather(1, nearest))
        best, into = near.max(0)  # of the kept patches that it is merged into, the most similar
        merged = (best > float("-inf")).cpu()
        states[merged], group[merged] = MERGED, kept[into].cpu()[merged]
        states[kept.cpu()], group[kept.cpu()] = KEPT, kept.cpu()
    return states, group


def seen_pictures(inputs: dict, processor: ProcessorMixin) -> list[Image.Image]:
    """What the model sees of the first image: one picture per tile, cropped, resized and padded as its pixels are."""
    pixels = inputs["pixel_values"][0].float().cpu()
    pixels = pixels if pixels.ndim == 4 else pixels[None]
    image_processor = processor.image_processor
    mean, std = (torch.tensor(getattr(image_processor, name)) for name in ("image_mean", "image_std"))
    pixels = (pixels * std[:, None, None] + mean[:, None, None]).clamp(0, 1)
    return [Image.fromarray((tile.permute(1, 2, 0) * 255).byte().numpy()) for tile in pixels]


def draw_patches(picture: Image.Image, fates: PatchFates, size: int = 448) -> Image.Image:
    """One tile: kept patches as they are, with a frame; merged ones in the colour of theirs; others dark."""
    side = round(len(fates.states) ** 0.5)
    cell = max(size // side, 4)
    size = cell * side
    picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    dark = Image.blend(picture, Image.new("RGB", picture.size, (20, 20, 24)), 0.8)
    result, draw = picture.copy(), None
    merging = bool((fates.states == MERGED).any())
    for i, (state, group) in enumerate(zip(fates.states.tolist(), fates.group.tolist(), strict=True)):
        x, y = i % side * cell, i // side * cell
        box = (x, y, x + cell, y + cell)
        draw = ImageDraw.Draw(result)
        if state == MERGED:
            tint = Image.new("RGB", (cell, cell), _colour(group))
            result.paste(Image.blend(picture.crop(box), tint, 0.5), box)
        elif state == KEPT:
            outline = _colour(group) if merging else (255, 210, 60)
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=outline, width=max(cell // 8, 1))
        elif state == ABSENT:
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), (235, 235, 235))
        else:
            result.paste(dark.crop(box), box)
            if state == REST:
                draw.point((x + cell // 2, y + cell // 2), (255, 255, 255))
    return result


def _colour(group: int) -> tuple[int, int, int]:
    """Neighbouring numbers get hues that are far apart."""
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(group * 0.618034 % 1, 0.85, 1))


def draw_fates(pictures, panels: list[list[PatchFates]], titles: list[str], output: str | Path) -> Path:
    """A sheet with one row of tiles per entry of `panels`, its title above. Returns `output`, a PNG file."""
    size = 448 if len(panels) == 1 else 224
    font, small = ImageFont.load_default(17), ImageFont.load_default(12)
    rows = [[draw_patches(*pair, size) for pair in zip(pictures, fates, strict=True)] for fates in panels]
    width, height, gap = rows[0][0].width, rows[0][0].height, 12
    per_line = max(1, min(len(rows), 4)) if len(pictures) == 1 else 1
    across = per_line * len(pictures)
    lines = [list(range(i, min(i + per_line, len(rows)))) for i in range(0, len(rows), per_line)]
    states = {state for fates in panels for fate in fates for state in fate.states.tolist()}
    legend = " · ".join(LEGEND[state] for state in LEGEND if state in states)
    if states == {MERGED}:
        legend = "patches of one colour are averaged into one token"
    legend_width = round(small.getlength(legend)) + 2 * gap
    sheet_size = (max(across * (width + gap) + gap, legend_width), len(lines) * (height + 58) + 34)
    sheet = Image.new("RGB", sheet_size, "white")
    draw = ImageDraw.Draw(sheet)
    for line, numbers in enumerate(lines):
        top = line * (height + 58) + 8
        for column, number in enumerate(numbers):
            for tile, (picture, fate) in enumerate(zip(rows[number], panels[number], strict=True)):
                x = gap + (column * len(pictures) + tile) * (width + gap)
                if tile == 0:
                    draw.text((x, top), titles[number], "#333333", font)
                draw.text((x, top + 24), fate.title, "#333333", small)
                sheet.paste(picture, (x, top + 44))
    draw.text((gap, len(lines) * (height + 58) + 8), legend, "#333333", small)
    sheet.save(output, format="PNG", optimize=True)
    return Path(output)


def draw_reduction(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    prompt: str,
    options: dict,
    output,
    progress=iter,
) -> Path:
    """What `options` do with the patches of `image` under the question `prompt`; PNG.

    FastV: what it keeps at its own layer, and what it would keep at every other; `progress` wraps the iteration.
    """
    text = processor.apply_chat_template([user_message(prompt, [image], processor)], add_generation_prompt=True)
    inputs = dict(processor(text=text, images=[to_rgb(image)], return_tensors="pt").to(model.device))
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    reduction = parse_visual_reduction(options, ModelSizes.of(model.config))
    if reduction is None:
        raise ValueError("there is no method to draw: pass one such as fastv:k=2,ratio=0.5")
    variants, titles = [options], [_describe(options)]
    if options["method"] == "fastv":
        others = [k for k in range(1, model.config.text_config.num_hidden_layers) if k != reduction.k]
        variants += [{**options, "k": k} for k in others]
        titles += [f"if it were k = {k}" for k in others]
    panels = [patch_fates(model, inputs, variant) for variant in progress(variants)]
    return draw_fates(seen_pictures(inputs, processor)[: len(panels[0])], panels, titles, output)


def _describe(options: dict) -> str:
    rest = ", ".join(f"{name} = {value}" for name, value in options.items() if name != "method")
    return f"{options['method']}{': ' if rest else ''}{rest}"
