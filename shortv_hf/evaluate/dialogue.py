"""A task's question as lmms-eval states it, chat messages with pictures and videos in them, as model inputs."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from PIL import Image
from transformers import ProcessorMixin

from ..data.images import to_rgb
from ..data.prompts import as_text, system_message
from ..data.video import Video, video_arguments


# What tasks write where a picture stands, beside the picture itself: the place is the picture's own.
PLACEHOLDER = re.compile(r"<(image|video)>\n?")


@dataclass(frozen=True)
class Dialogue:
    """Messages for a chat template, with places for the pictures and videos, and these in their order."""

    messages: list[dict]
    images: tuple[Image.Image, ...]
    videos: tuple[Video, ...]

    @property
    def kinds(self) -> tuple[bool, bool]:
        """Whether there are pictures and whether there are videos. Not every processor takes a batch of several kinds."""
        return bool(self.images), bool(self.videos)


def read_dialogue(
    messages: Iterable[dict],
    processor: ProcessorMixin,
    load_video: Callable[[str], Video],
    system_prompt: str | None = None,
) -> Dialogue:
    """A task's messages, `{"role", "content": [{"type", "url" or "text"}]}`, pictures and text in the order they have there.

    Args:
        load_video: reads the video at a path.
        system_prompt: put before the messages, for templates that have a place for one.

    Raises:
        ValueError: for what is neither text, picture nor a whole video; as `to_rgb`, `load_video` and `as_text`.
    """
    read: list[dict] = []
    images: list[Image.Image] = []
    videos: list[Video] = []
    if system_prompt:
        read.append(system_message(system_prompt))
    for message in messages:
        content = []
        for part in message["content"]:
            kind = part["type"]
            if kind == "image":
                images.append(to_rgb(part["url"]))
            elif (
                kind == "video"
                and isinstance(part["url"], str)
                and not (part.get("start_time") or part.get("end_time"))
            ):
                videos.append(load_video(part["url"]))
            elif kind != "text":
                what = "a part of a video, or none in a file" if kind == "video" else kind
                raise ValueError(f"a question holds {what}; text, pictures and whole videos can be asked about")
            if kind == "text":
                content.append({"type": "text", "text": as_text(PLACEHOLDER.sub("", part["text"]), processor)})
            else:
                content.append({"type": kind})
        read.append({"role": message["role"], "content": content})
    return Dialogue(read, tuple(images), tuple(videos))


def encode_dialogues(dialogues: Sequence[Dialogue], processor: ProcessorMixin) -> dict:
    """Model inputs of a batch, padded on the left; the dialogues are all of the same `kinds`."""
    prompts = [processor.apply_chat_template(each.messages, add_generation_prompt=True) for each in dialogues]
    images = [list(each.images) for each in dialogues]
    given = {"images": images} if any(images) else {}
    videos = video_arguments([video for each in dialogues for video in each.videos])
    return dict(processor(text=prompts, **given, **videos, return_tensors="pt", padding=True, padding_side="left"))
