"""Pictures of methods that merge tokens, in the vision tower and in the decoder: which patches are left after each layer, and
which have gone into one token. Used by `shortv visualize`. Pillow alone.

What is drawn is read off the passes of the model itself. The P patches of an image or video are numbered in rows from
the top left, through its pictures (tiles or frames) of n patches each.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, product
from math import ceil, floor, isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..data.images import to_rgb
from ..reduction import ModelSizes, tokens_per_image
from ..stream import Stage, Stream
from ..tower import TowerMerging
from ..upstream import family_of, visual_token_ids
from ..vision import SmallerGrid, Watch
from .patches import PADDING, STEPS, VEIL, describe, draw_outline, draw_sheet, from_pixels


PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
MAX_FRAMES = 8  # that are drawn of a video
RED, GREY, YELLOW, CYAN = "#e01f28", "#9a9a9a", "#ffe03c", "#00e5ff"


@dataclass
class Layout:
    """What the first image or video of a row is for the vision tower.

    Attributes:
        kind: "image" or "video".
        pictures: how many tiles or frames.
        height, width: of the grid of patches of each of them.
        order: `[n]`, the numbers of a picture's patches in the order in which the tower has them.
        unit: the side of the square of patches that makes a visual token.
    """

    kind: str
    pictures: int
    height: int
    width: int
    order: Tensor
    unit: int

    @property
    def n(self) -> int:
        return self.height * self.width

    def split(self, values: Tensor) -> Tensor:
        """`[P]` → `[pictures, height, width]`."""
        return values.view(self.pictures, self.height, self.width)


def layout_of(model: Any, inputs: dict) -> Layout:
    """Of model `inputs` of one row. Raises `ValueError` if there is no image in them, or its grid is not known."""
    kind = next((kind for kind, name in PIXELS.items() if inputs.get(name) is not None), None)
    if kind is None:
        raise ValueError("there is no image to draw on")
    if f"{kind}_grid_thw" in inputs:
        unit = model.config.vision_config.spatial_merge_size
        pictures, height, width = inputs[f"{kind}_grid_thw"][0].tolist()
        order = _in_squares(torch.arange(height * width).view(height, width), unit).flatten()
        return Layout(kind, pictures, height, width, order, unit)
    sizes = ModelSizes.of(model.config)
    n = sizes.patches if sizes.tower is None else sizes.tower.patches
    side = isqrt(n or 0)
    if not n or side**2 != n:
        raise ValueError("it is not known which grid of patches the vision tower cuts its pictures into")
    unit = 1 if sizes.tower is None else isqrt(sizes.tower.unit)
    return Layout(kind, _count_pictures(model, inputs, kind), side, side, torch.arange(n), unit)


def _count_pictures(model: Any, inputs: dict, kind: str) -> int:
    config = model.config
    if kind == "video":
        return inputs["pixel_values_videos"].shape[1]
    if getattr(config, "image_grid_pinpoints", None):
        several = inputs.get("batch_num_images")
        if several is not None and several[0] > 1:  # images of which there are several are not cut into tiles
            return 1
        size, side = inputs["image_sizes"][0], config.vision_config.image_size
        return family_of(model.model).image_size_to_num_patches(size, config.image_grid_pinpoints, side)
    if not hasattr(config, "downsample_ratio"):
        return 1
    places = _placeholders(model, inputs, kind)  # pixels are of the tiles of all images; an image is a run of tokens
    run = (places - torch.arange(len(places)) == places[0]).sum()
    return int(run) // (tokens_per_image(config) or 1)


def _placeholders(model: Any, inputs: dict, kind: str) -> Tensor:
    """The positions of all visual tokens of this kind in the row."""
    return (inputs["input_ids"][0] == visual_token_ids(model.config)[kind]).nonzero()[:, 0].cpu()


def _in_squares(grid: Tensor, side: int) -> Tensor:
    """`[h, w]` → `[squares, side**2]`."""
    height, width = grid.shape
    return grid.view(height // side, side, width // side, side).transpose(1, 2).reshape(-1, side**2)


def token_patches(model: Any, inputs: dict, layout: Layout, tower: TowerMerging | None) -> list[list[int]]:
    """For each visual token of the image or video in the prompt, the patches that it was made of, of those that are left
    behind the `tower`; none for newlines, and for placeholders that do not reach the language model."""
    n = layout.n
    left = [torch.arange(n)] * layout.pictures if tower is None else [patches.cpu() for patches in tower.left]
    numbers = [layout.order[patches] + i * n for i, patches in enumerate(left[: layout.pictures])]
    if hasattr(model.model, "pack_image_features"):
        return _packed(model.model, inputs, layout, tower is not None, numbers)
    others = int(ModelSizes.of(model.config).has_cls_feature)
    tokens: list[list[int]] = []
    for each in numbers:
        if f"{layout.kind}_grid_thw" in inputs or layout.unit == 1:  # those of a token follow each other
            made = each.view(-1, layout.unit**2)
        else:
            made = _in_squares(each.view(isqrt(len(each)), -1), layout.unit)
        tokens += [[]] * others + made.tolist() + [[]] * (n // layout.unit**2 - len(made))
    return tokens


def _packed(base: Any, inputs: dict, layout: Layout, smaller: bool, numbers: list[Tensor]) -> list[list[int]]:
    """[`token_patches`] where tiles are packed, or frames pooled: the model does so with the patches' coordinates, as if
    they were features. Of coordinates between two patches, the token was interpolated from both."""
    side, config = isqrt(len(numbers[0])), base.config
    view = SmallerGrid(base, side, layout.n).view if smaller else base
    tiles_in_a_row = 1
    if layout.kind == "image" and layout.pictures > 1:
        shape = family_of(base).get_anyres_image_grid_shape
        pinpoints, edge = config.image_grid_pinpoints, config.vision_config.image_size
        _, tiles_in_a_row = shape(inputs["image_sizes"][0], pinpoints, edge)
    index = torch.arange(side**2)
    features = torch.stack([index // side, index % side], dim=1).double().repeat(layout.pictures, 1, 1)
    picture = torch.arange(layout.pictures)[:, None]
    if layout.kind == "video":
        features = torch.cat([picture.expand(-1, side**2)[..., None], features], dim=2)
        packed = view.apply_pooling(features).flatten(0, 1)
    else:  # the first is the overview, the others make one large grid
        tile = (picture - 1).clamp(min=0)
        corner = torch.stack([tile // tiles_in_a_row, tile % tiles_in_a_row], dim=2) * side
        features = torch.cat([(picture > 0).expand(-1, side**2)[..., None], features + corner], dim=2)
        given = {
            "image_features": [features],
            "image_sizes": inputs["image_sizes"][:1],
            "image_newline": torch.full((3,), -1.0, dtype=features.dtype),
            "vision_feature_select_strategy": "default",
            "vision_aspect_ratio": getattr(config, "vision_aspect_ratio", None),
        }
        known = inspect.signature(base.pack_image_features).parameters
        packed = view.pack_image_features(**{name: value for name, value in given.items() if name in known})[0][0]
    tokens = []
    for which, y, x in packed.tolist():
        rows, columns = ([] if y < 0 else sorted({floor(at + 1e-6), ceil(at - 1e-6)}) for at in (y, x))
        made = []
        for row, column in product(rows, columns):
            number = round(which)
            if layout.kind == "image" and number:
                number += row // side * tiles_in_a_row + column // side
            made.append(int(numbers[number][row % side * side + column % side]))
        tokens.append(made)
    return tokens


def patches_behind(tokens: list[list[int]], into: Tensor) -> list[list[int]]:
    """For each visual token all patches in it: those that it was made of, first, and those that the tower had merged `into`
    (`[P]`) them before."""
    members: dict[int, list[int]] = {}
    for patch, place in enumerate(into.tolist()):
        members.setdefault(place, []).append(patch)
    return [[*made, *(p for place in made for p in members[place] if p != place)] for made in tokens]


# What becomes of patches, layer by layer


@dataclass
class Step:
    """Behind the merging in one layer, of all patches.

    Attributes:
        title: which layer, and how many patches or tokens are left.
        kept: `[P]` bool, those that are left in the tower, or a token of which is left in the decoder.
        absent: `[P]` bool, those that are in no token of the prompt.
        group: `[P]` bool, those in the token of the chosen patch.
        middle: `[P]` bool, where that token is.
    """

    title: str
    kept: Tensor
    absent: Tensor
    group: Tensor
    middle: Tensor


class Merging(NamedTuple):
    """How an image or video is merged; the number of the chosen patch; and one step per merging layer."""

    layout: Layout
    chosen: int
    steps: list[Step]


@torch.no_grad()
def follow_merging(model: Any, inputs: dict, options: dict, token: int | None = None) -> Merging:
    """What `options` (as `config.visual_reduction`) merge of the first image or video of `inputs`.

    Args:
        inputs: model inputs of one row, as a processor returns them.
        token: the number of the patch whose token is followed; `None`: the one that the last merge in the tower is into
            or, without a tower's half, that in the decoder.

    Raises:
        ValueError: for bad options, if nothing is merged, or there is no such patch.
    """
    layout = layout_of(model, inputs)
    n_patches = layout.pictures * layout.n
    if token is not None and not 0 <= token < n_patches:
        raise ValueError(f"there is no patch {token}; the valid range is the integers 0 to {n_patches - 1}")
    with model.using(visual_reduction=options), Watch() as watch:
        model(**inputs, use_cache=True)
    tower = next((each for each in watch.seen if isinstance(each, TowerMerging)), None)
    stream = next((each for each in watch.seen if isinstance(each, Stream)), None)
    in_tower = [] if tower is None else list(_in_tower(tower, layout))
    in_decoder = [] if stream is None else list(_in_decoder(stream))
    into = in_tower[-1][1] if in_tower else torch.arange(n_patches)
    tokens = token_patches(model, inputs, layout, tower)
    places = _placeholders(model, inputs, layout.kind)[: len(tokens)]
    if token is None and tower is not None and in_tower:
        token = _last_in_tower(tower, layout)
    if token is None and in_decoder:
        goes = in_decoder[-1][1][places]
        merged = (goes != places).nonzero()[:, 0]
        last = (places == goes[merged[-1:]]).nonzero()[
            :, 0
        ]  # it may be a newline; then one of those that went into it
        token = next((tokens[i][0] for i in (*last.tolist(), *merged.tolist()) if tokens[i]), None)
    if token is None:
        raise ValueError(f"nothing of this {layout.kind} is merged by {describe(options)}")
    steps = [_tower_step(*step, layout, token) for step in in_tower]
    if stream is not None and stream.groups is not None:
        groups = stream.groups[0].cpu()
        steps += [_decoder_step(*step, groups[places], tokens, into, places, token) for step in in_decoder]
    return Merging(layout, token, steps)


def _in_tower(tower: TowerMerging, layout: Layout) -> Iterator[tuple[int, Tensor]]:
    """By layer, `[P]`: the patch that each has gone into so far."""

    into = torch.arange(layout.pictures * layout.n)
    for layer, merges in groupby(tower.merges, key=lambda merge: merge.layer):
        moved = torch.arange(len(into))
        for merge in merges:
            for picture, patches, target in zip(merge.pictures, merge.patches, merge.map.target, strict=True):
                if picture < layout.pictures:
                    numbers = layout.order[patches.cpu()] + picture * layout.n
                    moved[numbers] = numbers[target.cpu()]
        into = moved[into]
        yield layer, into


def _in_decoder(stream: Stream) -> Iterator[tuple[int, Tensor]]:
    """By layer, `[S]`: the token of the prompt that each has gone into so far."""
    into = torch.arange(stream.length)
    for stage in stream.stages:
        if stage.map is not None:
            moved, before = torch.arange(stream.length), _positions(stream, stage)
            moved[before] = before[stage.map.target[0].cpu()]
            into = moved[into]
            yield stage.layer, into


def _positions(stream: Stream, stage: Stage) -> Tensor:
    rows = stream.rows(stage.layer - 1)
    return torch.arange(stream.length) if rows is None else rows.index[0].cpu()


def _last_in_tower(tower: TowerMerging, layout: Layout) -> int:
    """The patch of the first picture that the last merge is into."""
    merge = next(each for each in reversed(tower.merges) if 0 in each.pictures)
    patches, target = (part[merge.pictures.index(0)].cpu() for part in (merge.patches, merge.map.target))
    (moved,) = (target != torch.arange(len(target))).nonzero(as_tuple=True)
    return int(layout.order[patches[target[moved[0]]]])


def _tower_step(layer: int, into: Tensor, layout: Layout, token: int) -> Step:
    kept = into == torch.arange(len(into))
    left = sorted({int(picture.sum()) for picture in layout.split(kept)})
    return Step(
        title=f"vision layer {layer}: {' or '.join(map(str, left))} of {layout.n} patches left",
        kept=kept,
        absent=torch.zeros_like(kept),
        group=into == into[token],
        middle=kept & (into == into[token]),
    )


def _decoder_step(
    layer: int, goes: Tensor, groups: Tensor, tokens: list[list[int]], into: Tensor, places: Tensor, token: int
) -> Step:
    """Args: goes: `[S]`. groups, places: of the `tokens`. into: `[P]`, by the tower."""
    goes, ranked = goes[places], groups > 0
    behind = patches_behind(tokens, into)
    mask = torch.zeros(3, len(into), dtype=torch.bool)  # kept, in the prompt, in the group
    middle = torch.zeros(len(into), dtype=torch.bool)
    mine = next((i for i, made in enumerate(tokens) if into[token] in made), None)
    for i, made in enumerate(tokens):
        mask[0, made] |= bool(goes[i] == places[i])
        mask[1, behind[i]] = True
        if mine is not None and goes[i] == goes[mine]:
            mask[2, behind[i]] = True
            middle[made] |= bool(goes[i] == places[i])
    left = int((ranked & (goes == places)).sum())
    return Step(
        f"decoder layer {layer}: {left} of {int(ranked.sum())} tokens left", mask[0], ~mask[1], mask[2], middle
    )


# The pictures


def pictures_of(model: Any, inputs: dict, layout: Layout, image_processor: Any) -> list[Image.Image]:
    """What the model sees of each tile or frame; the first frame where it sees several at once."""
    pixels = inputs[PIXELS[layout.kind]]
    if pixels.ndim > 2:
        return from_pixels((pixels[0] if pixels.ndim == 5 else pixels)[: layout.pictures], image_processor)
    vision = model.config.vision_config
    frames, side = vision.temporal_patch_size, vision.patch_size
    cut = pixels[: layout.pictures * layout.n].view(layout.pictures, layout.n, -1, frames, side, side)[:, :, :, 0]
    patches = cut[:, layout.order.argsort().to(cut.device)].unflatten(1, (layout.height, layout.width))
    return from_pixels(patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3), image_processor)


def shown_pictures(layout: Layout, chosen: int) -> list[int]:
    """All tiles; of many frames some spread evenly, that of the `chosen` patch among them."""
    if layout.kind == "image" or layout.pictures <= MAX_FRAMES:
        return list(range(layout.pictures))
    shown = torch.linspace(0, layout.pictures - 1, MAX_FRAMES).round().long()
    own = chosen // layout.n
    if own not in shown:
        shown[(shown - own).abs().argmin()] = own
    return shown.tolist()


def draw_step(picture: Image.Image, parts: dict[str, Tensor], cell: int) -> Image.Image:
    """One picture, red where patches are left and grey where they are not; an outline around the group of the chosen patch,
    and a square in its middle.

    Args:
        parts: the masks of a [`Step`], `[height, width]` each.
        cell: how large a patch is drawn, in pixels.
    """
    height, width = parts["kept"].shape
    picture = picture.resize((cell * width, cell * height), Image.Resampling.LANCZOS)
    grey = to_rgb(ImageOps.grayscale(picture))
    looks = {
        "gone": Image.blend(grey, Image.new("RGB", picture.size, GREY), 0.7),
        "kept": Image.blend(grey, Image.new("RGB", picture.size, RED), 0.5),
        "absent": Image.new("RGB", picture.size, PADDING),
    }
    result = looks["gone"]
    for name in ("kept", "absent"):
        mask = Image.fromarray((parts[name] * 255).byte().numpy()).resize(picture.size, Image.Resampling.NEAREST)
        result.paste(looks[name], (0, 0), mask)
    draw = ImageDraw.Draw(result)
    group = {(x, y) for y, x in parts["group"].nonzero().tolist()}
    line = 1 if cell < 12 else 2
    for x, y in group:
        near = {(dx, dy): (x + dx, y + dy) in group for dx, dy in product(STEPS, STEPS)}
        draw_outline(draw, (x * cell, y * cell), cell, ((line + (cell > 6), VEIL), (line, YELLOW)), near)
    for y, x in parts["middle"].nonzero().tolist():
        for inset, colour in ((cell // 6, VEIL), (cell // 6 + 1, CYAN)):
            end = cell - 1 - inset
            draw.rectangle((x * cell + inset, y * cell + inset, x * cell + end, y * cell + end), colour)
    return result


def draw_merging(
    model: Any, inputs: dict, image_processor: Any, options: dict, output: str | Path, token: int | None = None
) -> Path:
    """What `options` merge of the first image or video of `inputs`, one panel per merging layer; PNG. Returns `output`.

    Arguments and errors as [`follow_merging`].

    Args:
        image_processor: says how pixels were normalized.
    """
    layout, chosen, steps = follow_merging(model, inputs, options, token)
    seen, shown = pictures_of(model, inputs, layout, image_processor), shown_pictures(layout, chosen)
    size = 336 if len(shown) == 1 else 224
    cell = max(size // max(layout.height, layout.width), 4)
    original = [seen[i].resize((cell * layout.width, cell * layout.height), Image.Resampling.LANCZOS) for i in shown]
    for picture in original:  # a frame, for white ones
        ImageDraw.Draw(picture).rectangle((0, 0, picture.width - 1, picture.height - 1), outline=GREY)
    names = [_name(model, layout, i) for i in shown]
    titles = [f"what the vision tower sees: {layout.width} x {layout.height} patches{' each' * (len(seen) > 1)}"]
    rows = [list(zip(original, names, strict=True))]
    for step in steps:
        parts = {name: layout.split(getattr(step, name)) for name in ("kept", "absent", "group", "middle")}
        titles.append(step.title)
        row = []
        for i, name in zip(shown, names, strict=True):
            masks = {part: mask[i] for part, mask in parts.items()}
            left = f"{int(masks['kept'].sum())} patches left" if len(seen) > 1 else ""
            row.append((draw_step(seen[i], masks, cell), ": ".join(filter(None, (name, left)))))
        rows.append(row)
    return draw_sheet(rows, titles, _legend(model, options, chosen, layout, steps), output, per_line=3)


def _name(model: Any, layout: Layout, number: int) -> str:
    if layout.pictures == 1:
        return ""
    if layout.kind == "video":
        return f"frame {number * getattr(model.config.vision_config, 'temporal_patch_size', 1) + 1}"
    if hasattr(model.model, "pack_image_features"):
        return f"tile {number}" if number else "overview"
    return f"tile {number + 1}"


def _legend(model: Any, options: dict, chosen: int, layout: Layout, steps: list[Step]) -> str:
    row, column = divmod(chosen % layout.n, layout.width)
    where = " of ".join(filter(None, (f"row {row}, column {column}", _name(model, layout, chosen // layout.n))))
    where = where.replace("of overview", "of the overview")
    notes = [describe(options), "red: left", "grey: merged into others"]
    notes += ["blank: cut off as padding, not in the prompt"] * any(bool(step.absent.any()) for step in steps)
    return " · ".join(
        [*notes, f"yellow outline: in one token with patch {chosen} ({where})", "blue square: that token's own place"]
    )
