"""Pictures of what a reduction method does with the patches of an image, drawn over what the model sees of it.

Used by `shortv visualize`. Pillow alone.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import PreTrainedModel, ProcessorMixin

from ..data.images import to_rgb
from ..data.inputs import encode_messages, to_device, visual_mask
from ..data.prompts import user_message
from ..data.video import Video
from ..reduction import (
    ModelSizes,
    Patches,
    StreamReduction,
    TokenMap,
    keep_only,
    parse_visual_reduction,
)
from ..upstream import find_cache, image_features
from ..vision import find_patches, reduced_images
from .plots import wrap_text


ABSENT, DROPPED, REST, KEPT, MERGED = range(5)
LEGEND = {
    KEPT: "full colour, outlined: kept",
    MERGED: "thin outline: merged into the kept patch of that colour",
    REST: "greyed out, with a dot: in the token of all the rest",
    DROPPED: "greyed out: dropped",
    ABSENT: "blank: padding, never in the prompt",
}
LEGEND_OF_MERGING = LEGEND | {KEPT: "thick frame: kept"}
LEGEND_OF_AVERAGING = "the patches within one outline are averaged into one token"
RANK = {ABSENT: 0, DROPPED: 1, REST: 2, MERGED: 3, KEPT: 4}  # what is drawn of a patch that several tokens take
STEPS = (-1, 0, 1)  # to the neighbours of a patch
INK, OUTLINE, VEIL, PADDING, WHITE = "#333333", "#ffd23c", "#484850", "#ebebeb", "white"


@dataclass
class PatchFates:
    """What becomes of the patches of one tile.

    Attributes:
        title: which tile, and how many patches are kept.
        states: `[N]`, one of ABSENT, DROPPED, REST, KEPT, MERGED.
        group: `[N]`, equal for patches that end up in one token; -1 for those in none, or in the token of the rest.
        width: patches in a row; `None`: the tile is square.
    """

    title: str
    states: torch.Tensor
    group: torch.Tensor
    width: int | None = None


@torch.no_grad()
def patch_fates(model: Any, inputs: dict, options: dict | None) -> list[PatchFates]:
    """The fates of the first row's first image, one per tile, under `options` (as `config.visual_reduction`).

    Args:
        inputs: model inputs of one row, as a processor returns them.

    Raises:
        ValueError: for bad options, or if `inputs` hold no image.
    """
    if "pixel_values" not in inputs:
        raise ValueError("there is no image to draw on")
    sizes = ModelSizes.of(model.config)
    reduction = parse_visual_reduction(options, sizes)
    image = _first_image(inputs)
    where = {"image_sizes": image.get("image_sizes"), "grid_thw": image.get("image_grid_thw")}

    def features() -> list[torch.Tensor]:
        with model.using(visual_reduction=None):
            return image_features(model.get_image_features(**image))

    if reduction is not None and reduction.on_images is not None:
        ((_, patches, tokens),) = reduced_images(model.model, reduction.on_images, features, **where)
    else:
        (feature,) = features()
        (patches,) = find_patches(model.model, sizes, [len(feature)], feature.device, **where)
        with model.using(visual_reduction=options):
            tokens = keep_only(_kept_in_decoder(model, inputs)[: len(feature)])
    states, group = _fates(tokens, patches)
    parts = zip(states.split(patches.per_tile), group.split(patches.per_tile), strict=True)
    return [PatchFates(_title(i, patches.tiles, *part), *part, patches.width) for i, part in enumerate(parts)]


def _first_image(inputs: dict) -> dict:
    """The arguments of `get_image_features` for the first image alone."""
    image = {name: inputs[name][:1] for name in ("pixel_values", "image_sizes", "image_grid_thw") if name in inputs}
    if "image_grid_thw" in image:  # the patches of all images, one after the other
        image["pixel_values"] = inputs["pixel_values"][: int(image["image_grid_thw"].prod())]
    return image


def _title(tile, tiles, states, group):
    name = "" if tiles == 1 else "overview: " if tile == 0 else f"tile {tile}: "
    n = int((states != ABSENT).sum())
    if (states == MERGED).all():
        return f"{len(group.unique())} tokens of {n} patches"
    return f"{name}{int((states == KEPT).sum())} of {n} patches kept"


def _kept_in_decoder(model, inputs) -> torch.Tensor:
    """Of the visual tokens in the row's prompt, which the last layer's cache holds."""
    cache = find_cache(model(**inputs, use_cache=True))
    assert cache is not None  # it was asked for
    visual = visual_mask(model.config, inputs["input_ids"][0]).cpu()
    slots = getattr(cache.layers[-1], "slots", None)
    if slots is None:  # nothing was dropped
        return torch.ones(int(visual.sum()), dtype=torch.bool)
    held = torch.zeros(len(visual), dtype=torch.bool)
    held[slots[0][slots[0] >= 0].cpu()] = True
    return held[visual]


def _fates(tokens: TokenMap, patches: Patches) -> tuple[torch.Tensor, torch.Tensor]:
    """States and groups of all patches `[tiles * N]` of an image, from where its tokens go.

    A patch whose weight is 1 is kept as the middle of a group, which others are merged into; weights that add up to 1
    are an average, without a middle; other sums are the rest.
    """
    index = patches.tile * patches.per_tile + patches.patch
    number = torch.where(patches.patch < 0, -1, index).tolist()  # of the patch that a token is
    states = [ABSENT] * (patches.tiles * patches.per_tile)
    group = [-1] * len(states)
    target = tokens.target.cpu()
    source = torch.arange(tokens.n) if tokens.source is None else tokens.source.cpu()
    weight = torch.ones(len(target)) if tokens.weight is None else tokens.weight.float().cpu()
    there = target >= 0
    total = torch.zeros(tokens.n).index_add(0, target[there], weight[there])
    averages = ((total - 1).abs() < 1e-4).tolist()
    entries = [
        entry for entry in zip(source.tolist(), target.tolist(), weight.tolist(), strict=True) if number[entry[0]] >= 0
    ]
    middle = {place: number[token] for token, place, share in entries if share == 1 and place >= 0}
    for token, place, share in entries:
        patch = number[token]
        if place < 0:
            fate, into = DROPPED, -1
        elif share == 1:
            fate, into = KEPT, patch
        elif place in middle:
            fate, into = MERGED, middle[place]
        else:
            fate, into = (MERGED, place) if averages[place] else (REST, -1)
        if RANK[fate] > RANK[states[patch]]:  # of several places, the first
            states[patch], group[patch] = fate, into
    return torch.tensor(states), torch.tensor(group)


def seen_pictures(inputs: dict, processor: ProcessorMixin, image: Image.Image) -> list[Image.Image]:
    """What the model sees of the first `image`: one picture per tile, cropped, resized and padded as its pixels are; the
    image itself where the processor cuts it into patches."""
    if inputs["pixel_values"].ndim == 2:
        return [to_rgb(image)]
    pixels = inputs["pixel_values"][0]
    return from_pixels(pixels if pixels.ndim == 4 else pixels[None], processor.image_processor)


def from_pixels(pixels: torch.Tensor, image_processor: Any) -> list[Image.Image]:
    """Pictures whose normalized `pixels` `[I, 3, H, W]` are."""
    mean, std = (torch.tensor(getattr(image_processor, name))[:, None, None] for name in ("image_mean", "image_std"))
    pixels = (pixels.float().cpu() * std + mean).clamp(0, 1)
    return [Image.fromarray((tile.permute(1, 2, 0) * 255).byte().numpy()) for tile in pixels]


def draw_patches(picture: Image.Image, fates: PatchFates, size: int = 448) -> Image.Image:
    """One tile of about `size` pixels: greyed out where patches are dropped, unchanged inside kept and merged ones.

    Outlines run inside the patches, where the next one has another fate or belongs to another group. Where patches are
    merged into others, each of those has a thicker frame of its own, and each group a colour.
    """
    columns = fates.width or round(len(fates.states) ** 0.5)
    rows = len(fates.states) // columns
    cell = max(size // max(columns, rows), 4)
    picture = picture.resize((cell * columns, cell * rows), Image.Resampling.LANCZOS)
    result = Image.blend(picture, Image.new("RGB", picture.size, VEIL), 0.75)
    draw = ImageDraw.Draw(result)
    states = fates.states.tolist()
    merging = MERGED in states
    groups = fates.group.tolist() if merging else [-1] * len(states)
    into = [group for group, state in zip(groups, states, strict=True) if state == KEPT]
    colours = {group: _colour(number) for number, group in enumerate(into)} if merging else {}
    regions = {  # between patches that are equal here runs no outline
        (i % columns, i // columns): fate for i, fate in enumerate(zip(states, groups, strict=True))
    }
    for (column, row), (state, group) in regions.items():
        x, y, end = column * cell, row * cell, cell - 1
        if state == ABSENT:
            draw.rectangle((x, y, x + end, y + end), PADDING)
        elif state == REST:
            radius = max(cell // 12, 1)
            x, y = x + cell // 2, y + cell // 2
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), WHITE)
        elif state in (KEPT, MERGED):
            result.paste(picture.crop((x, y, x + cell, y + cell)), (x, y))
            line = min(max(cell // 15, 1), 3) * (2 if merging and state == KEPT else 1)
            contrast = line + (cell > 16)  # a dark line beside the coloured one, for pictures of the same colour
            lines = ((contrast, VEIL), (line, colours.get(group, OUTLINE)))
            near = {
                step: regions.get((column + step[0], row + step[1])) == (state, group)
                for step in product(STEPS, STEPS)
            }
            draw_outline(draw, (x, y), cell, lines, near)
    return result


def draw_outline(draw: ImageDraw.ImageDraw, corner, cell: int, lines, near: dict[tuple[int, int], bool]) -> None:
    """Inside the patch at a `corner`, `lines` of some (width, colour), the widest first, along those of its neighbours, one to
    the right and one below and so on, that are not `near` it in what becomes of them."""
    (x, y), end = corner, cell - 1
    for width, colour in lines:
        spans = {-1: (0, width - 1), 0: (0, end), 1: (end - width + 1, end)}
        for (dx, (left, right)), (dy, (top, bottom)) in product(spans.items(), repeat=2):
            if not near[dx, dy]:
                draw.rectangle((x + left, y + top, x + right, y + bottom), colour)


def _colour(number: int) -> tuple[int, int, int]:
    """Successive numbers get colours that are far apart."""
    hue, brightness = number * 0.618034 % 1, (1, 0.7)[number % 2]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.85, brightness))
    return red, green, blue


def draw_fates(pictures, panels: list[list[PatchFates]], titles: list[str], output: str | Path) -> Path:
    """A sheet with one row of tiles per entry of `panels`, its title above. Returns `output`, a PNG file."""
    size = 224 if len(panels) > 1 else 448 if len(pictures) > 1 else 720
    rows = [
        [(draw_patches(picture, fate, size), fate.title) for picture, fate in zip(pictures, fates, strict=True)]
        for fates in panels
    ]
    states = {state for fates in panels for fate in fates for state in fate.states.tolist()}
    entries = LEGEND_OF_MERGING if MERGED in states else LEGEND
    drawn = " · ".join(text for state, text in entries.items() if state in states)
    return draw_sheet(rows, titles, LEGEND_OF_AVERAGING if states == {MERGED} else drawn, output)


def draw_sheet(
    rows: list[list[tuple[Image.Image, str]]], titles: list[str], legend: str, output: str | Path, per_line: int = 4
) -> Path:
    """A sheet with one panel of drawn tiles, each with its caption, per entry of `rows`, and its title above; of panels of
    one tile, `per_line` stand in a line. Returns `output`, a PNG file."""
    font, small = ImageFont.load_default(17), ImageFont.load_default(12)
    n_tiles, (width, height), gap = len(rows[0]), rows[0][0][0].size, 12
    captions = 22 if any(caption for row in rows for _, caption in row) else 2  # their height
    per_line = max(1, min(len(rows), per_line)) if n_tiles == 1 else 1
    panel_width = n_tiles * (width + gap) - gap
    sheet_width = per_line * (panel_width + gap) + gap
    notes = wrap_text(legend, small.getlength, sheet_width - 2 * gap)

    texts, places, y = [], [], 8  # ((x, y), text, font) and ((x, y), tile)
    for first in range(0, len(rows), per_line):
        numbers = range(first, min(first + per_line, len(rows)))
        lines = {number: wrap_text(titles[number], font.getlength, panel_width) for number in numbers}
        below = y + 22 * max(map(len, lines.values()))  # the titles of this line of panels
        for column, number in enumerate(numbers):
            left = gap + column * (panel_width + gap)
            texts += [((left, y + 22 * i), line, font) for i, line in enumerate(lines[number])]
            for tile, (picture, caption) in enumerate(rows[number]):
                x = left + tile * (width + gap)
                texts.append(((x, below + 2), caption, small))
                places.append(((x, below + captions), picture))
        y = below + captions + height + 14
    texts += [((gap, y + 17 * i), line, small) for i, line in enumerate(notes)]
    sheet = Image.new("RGB", (sheet_width, y + 17 * len(notes) + 9), WHITE)
    draw = ImageDraw.Draw(sheet)
    for place, picture in places:
        sheet.paste(picture, place)
    for place, line, which in texts:
        draw.text(place, line, INK, which)
    sheet.save(output, format="PNG", optimize=True)
    return Path(output)


def draw_reduction(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image | Sequence[Image.Image] | Video,
    prompt: str,
    options: dict,
    output,
    progress=iter,
    token: int | None = None,
    other_layers: bool = True,
) -> Path:
    """What `options` do with the patches of `image`, of several pictures those of the first, under the question `prompt`;
    PNG.

    A method that ranks tokens in a decoder layer (FastV): what it keeps at its own, and with
    `other_layers` what it would keep at every other; `progress` wraps the iteration. One that merges tokens there or in the vision tower (iLLaVA): what is left
    behind each of its layers, and what has gone into the `token` of a patch; this one on videos too.
    """
    from .merging import draw_merging

    images: list[Image.Image] = []
    videos = [image] if isinstance(image, Video) else []
    if not isinstance(image, Video):
        images = [to_rgb(each) for each in (image if isinstance(image, Sequence) else [image])]
    message = user_message(prompt, images, processor, videos)
    inputs = to_device(model, encode_messages([message], processor, images, videos))
    reduction = parse_visual_reduction(options, ModelSizes.of(model.config))
    if reduction is None:
        raise ValueError("there is no method to draw: pass one such as fastv:k=2,ratio=0.5")
    if reduction.in_tower is not None or (reduction.in_decoder is not None and reduction.merges):
        return draw_merging(model, inputs, processor.image_processor, options, output, token)
    if isinstance(image, Video):
        raise ValueError(f"what {reduction.method} does is drawn on pictures only")
    if token is not None:
        raise ValueError(
            f"{reduction.method} merges nothing in the tower or the decoder, so there is no token to follow"
        )
    variants, titles = [options], [describe(options)]
    if isinstance(reduction, StreamReduction) and reduction.needs_scores and other_layers:
        sizes = ModelSizes.of(model.config)
        others = [k for k in range(max(sizes.deepstack, 1), sizes.decoder_layers) if k != reduction.k]
        variants += [{**options, "k": k} for k in others]
        titles += [f"if it were k = {k}" for k in others]
    panels = [patch_fates(model, inputs, variant) for variant in progress(variants)]
    return draw_fates(seen_pictures(inputs, processor, images[0])[: len(panels[0])], panels, titles, output)


def describe(options: dict) -> str:
    rest = ", ".join(f"{name} = {value}" for name, value in options.items() if name != "method")
    return f"{options['method']}{': ' if rest else ''}{rest}"
