"""Which image or video each visual token belongs to, for methods that treat every image by itself.

The features know where images end, the prompt does not: two images can follow each other without text between. So the
encoders note the lengths of what they return ([`note`]) in the pass that is open ([`Lengths`]), and the text model's input
is cut by them. Where features are of tiles (InternVL) or of a
family without a class here, or came without an encoder, an image is a run of visual tokens.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Length(NamedTuple):
    """Of one image or video: how many tokens it has in the prompt, and whether the last of them is a newline that ends
    it, which is not among those to be ranked."""

    tokens: int
    ends_in_newline: bool


_OPEN: ContextVar["Lengths | None"] = ContextVar("lengths of the images of this pass", default=None)


class Lengths(dict[str, list[Length]]):
    """While open, the lengths that the encoders of this thread (or asyncio task) note, by "image" and "video"."""

    def __enter__(self) -> "Lengths":
        self._token = _OPEN.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _OPEN.reset(self._token)


def note(kind: str, lengths: Callable[[], list[Length]]) -> None:
    """To be called by an encoder: the `lengths` of its images or videos, if somebody wants to know. What was said first
    counts: images are encoded before videos, and an encoder of videos may be that of images underneath."""
    found = _OPEN.get()
    if found is not None and kind not in found:
        found[kind] = lengths()


@dataclass
class Windows:
    """What is known of the images in a chunk.

    Attributes:
        visual: `[B, S]` bool, the visual tokens.
        masks: by "image" and "video", `[B, S]` bool: the placeholders of the images or videos.
        lengths: of the images and of the videos, in the order of the placeholders. Filled while the pass goes on.
    """

    visual: Tensor
    masks: dict[str, Tensor] = field(default_factory=dict)
    lengths: Lengths = field(default_factory=Lengths)

    def groups(self, left: Tensor) -> Tensor:
        """`[B, S]` long: the number of the image that a token is of, from 1 on; 0 where it is of none, or one of those
        that end it, or not `left` `[B, S]`."""
        groups = torch.zeros_like(self.visual, dtype=torch.long)
        endings = [False]
        for kind, mask in self.masks.items():
            lengths = self.lengths.get(kind)
            if not lengths:
                if bool(mask.any()):
                    return self._runs(left)
                continue
            numbers = torch.arange(len(endings), len(endings) + len(lengths), device=mask.device)
            repeats = torch.tensor([each.tokens for each in lengths], dtype=torch.long, device=mask.device)
            of_image = numbers.repeat_interleave(repeats)
            if len(of_image) != int(mask.sum()):
                raise ValueError(
                    f"the {kind}s of this prompt cannot be told apart: their features are of {[n for n, _ in lengths]} "
                    f"tokens, {len(of_image)} in all, and it has places for {int(mask.sum())}"
                )
            groups[mask] = of_image
            endings += [each.ends_in_newline for each in lengths]
        if not self.masks:
            return self._runs(left)
        groups = groups.masked_fill(~(left & self.visual), 0)
        if any(endings):
            # Tokens that a method left out are at the end of their image: the newline is the last of the others.
            place = torch.arange(groups.numel(), device=groups.device).view_as(groups)
            last = place.new_full((len(endings),), -1)
            last = last.scatter_reduce(0, groups.flatten(), place.flatten(), "amax")
            has_ending = torch.tensor(endings, device=groups.device)[groups]
            groups = groups.masked_fill(has_ending & (place == last[groups]), 0)
        return groups

    def _runs(self, left: Tensor) -> Tensor:
        """Each run of visual tokens is an image."""
        visual = self.visual
        starts = visual & ~torch.nn.functional.pad(visual[:, :-1], (1, 0))
        return (starts.flatten().cumsum(0).view_as(visual) * (visual & left)).long()
