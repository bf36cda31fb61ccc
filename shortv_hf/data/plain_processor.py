"""Upstream's processors of families with videos, without torchvision: they ask for a video processor, and upstream's need it.

Here each frame is made by the family's image processor (Pillow's and NumPy's), so what a frame becomes is what a picture
becomes. With torchvision installed, nothing here is used.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    ImageProcessingMixin,
    PretrainedConfig,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import make_batched_metadata


def plain_class(config: PretrainedConfig) -> type[ProcessorMixin] | None:
    """The processor class of a model's family, with a video processor that works without torchvision; `None` where
    upstream's own can be loaded."""
    model_type = getattr(config, "base_model_type", config.model_type)
    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if is_torchvision_available() or name is None:
        return None
    stock = processor_class_from_name(name)
    if stock is None or "video_processor" not in inspect.signature(stock.__init__).parameters:
        return None
    return type(stock.__name__, (_WithoutTorchvision, stock), {})


class _WithoutTorchvision(ProcessorMixin):
    """Modifications: the image processor is the plain one, and the video processor a [`FrameProcessor`] around it."""

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: str, processor_dict=None, **kwargs) -> list:
        images = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        # The files' settings for videos, or those for images where there are none: upstream's rule, that needs no torchvision
        settings, _ = BaseVideoProcessor.get_video_processor_dict(pretrained_model_name_or_path, **kwargs)
        return [images, tokenizer, FrameProcessor(type(images).from_dict(settings))]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """Anything is: upstream's class of video processors cannot be had, and the parts are those from above."""
        return type(argument)


class FrameProcessor(ImageProcessingMixin):
    """A video processor made of an image processor, of one of two kinds.

    Where that makes flat patches, each of `temporal_patch_size` equal frames (the Qwens), a patch of a video holds as many
    frames that follow each other; the last one is repeated until they are enough. Otherwise a frame is what a picture is
    as a whole, without the tiles.
    """

    def __init__(self, frames: Any):
        super().__init__()
        self.frames = frames
        self.merge_size = getattr(frames, "merge_size", None)
        self.temporal_patch_size: Any = getattr(frames, "temporal_patch_size", None)
        self.options: dict[str, Any] = {"return_tensors": "pt"}
        if hasattr(frames, "image_grid_pinpoints"):  # a frame's tiles are not used, so there is one that costs little
            size = dict(frames.size)
            edge = size.get("shortest_edge")
            self.options["image_grid_pinpoints"] = [[size.get("height") or edge, size.get("width") or edge]]

    def __call__(
        self, videos: Sequence[Sequence[Image.Image]], video_metadata=None, return_metadata: bool = False, **_: Any
    ) -> BatchFeature:
        """
        Args:
            videos: of each, its sampled frames, all of one size.

        Returns:
            `pixel_values_videos`: `[videos, F, 3, H, W]`; of patches `[patches, 3 * T * p * p]`, and their
            `video_grid_thw` `[videos, 3]`. `video_metadata` if asked for.
        """
        make = self._whole if self.temporal_patch_size is None else self._patches
        made = [make(self.frames(images=list(frames), **self.options)) for frames in videos]
        data: dict[str, Any] = {name: torch.cat([each[name] for each in made]) for name in made[0]}
        if return_metadata:
            data["video_metadata"] = make_batched_metadata([list(each) for each in videos], video_metadata)
        return BatchFeature(data)

    def _whole(self, images: BatchFeature) -> dict[str, Tensor]:
        pixels = images["pixel_values"]
        return {"pixel_values_videos": (pixels[:, 0] if pixels.ndim == 5 else pixels)[None]}

    def _patches(self, images: BatchFeature) -> dict[str, Tensor]:
        grids, length = images["image_grid_thw"], self.temporal_patch_size
        _, height, width = grids[0].tolist()
        channels = len(self.frames.image_mean)
        # One of the equal frames in each patch: [F, patches, channels, p * p]
        frames = images["pixel_values"].view(len(grids), height * width, channels, length, -1)[:, :, :, 0]
        frames = torch.cat([frames, *[frames[-1:]] * (-len(frames) % length)])
        patches = frames.unflatten(0, (-1, length)).permute(
            0, 2, 3, 1, 4
        )  # [F / length, patches, channels, length, p * p]
        grid = torch.tensor([[len(patches), height, width]])
        return {"pixel_values_videos": patches.flatten(0, 1).flatten(1), "video_grid_thw": grid}

    def to_dict(self) -> dict[str, Any]:
        return self.frames.to_dict()
