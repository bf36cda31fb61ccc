"""Model inputs as a processor returns them: where they hold visual tokens, where they end, and how they get to a model."""

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from ..upstream import visual_token_ids
from .video import Video, video_arguments


def encode_messages(
    messages: list[dict],
    processor: ProcessorMixin,
    images: Sequence[Image.Image | list[Image.Image]] = (),
    videos: Sequence[Video] = (),
) -> dict:
    """Model inputs of a conversation, by the processor's chat template, with all the images and videos in it, the images
    each for itself or in one list."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    given = {"images": list(images)} if images else {}
    return dict(processor(text=text, return_tensors="pt", **given, **video_arguments(videos)))


def visual_mask(config: PretrainedConfig, input_ids: torch.Tensor) -> torch.Tensor:
    """Where `input_ids` hold placeholders of images and videos, bool of the same shape."""
    return torch.isin(input_ids, torch.tensor(list(visual_token_ids(config).values()), device=input_ids.device))


def feature_mask(config: PretrainedConfig, inputs: dict) -> torch.Tensor:
    """Positions that hold image features, `[B, S]` bool."""
    if inputs.get("visual_mask") is not None:
        return inputs["visual_mask"].bool()
    if inputs.get("input_ids") is None:
        raise ValueError("samples with inputs_embeds need a visual_mask that says where the image features are")
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    encoded = inputs.get("mm_encoder_outputs") or {}  # what `generate` of 5.x passes instead of pixels
    pixels = {"image": inputs.get("pixel_values"), "video": inputs.get("pixel_values_videos")}
    for kind, placeholder in visual_token_ids(config).items():
        if pixels[kind] is not None or encoded.get(kind) is not None:
            mask = mask | (inputs["input_ids"] == placeholder)
    return mask


def last_positions(like: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """Position of the last token of each row that is not padding, `[B]`."""
    if padding_mask is None:
        return torch.full(like.shape[:1], like.shape[1] - 1, device=like.device)
    positions = torch.arange(like.shape[1], device=like.device)
    return (positions * padding_mask.to(like.device)).argmax(dim=1)


def to_device(model: PreTrainedModel, sample: dict) -> dict:
    moved = {}
    device = None if model.device.type == "meta" else model.device  # offloaded: the model's own hooks move inputs
    for name, value in sample.items():
        if torch.is_tensor(value):
            value = value.to(device=device, dtype=model.dtype if value.is_floating_point() else None)
        moved[name] = value
    return moved
