"""Processors of families with videos where torchvision is missing: a frame is what a picture is, and models take it."""

import json

import numpy as np
import pytest
import torch
from families import END, FAMILIES, IMAGE, START, VIDEO, build
from PIL import Image
from processor_files import write_processor
from transformers.utils import is_torchvision_available

from shortv_hf.data.inputs import encode_messages
from shortv_hf.data.plain_processor import FrameProcessor, plain_class
from shortv_hf.data.prompts import user_message
from shortv_hf.data.video import Video


pytestmark = pytest.mark.skipif(is_torchvision_available(), reason="upstream's own processors are used")

IDS = {"<image>": IMAGE, "<video>": VIDEO, "<start>": START, "<end>": END}
WITH_VIDEOS = [family for family in FAMILIES if FAMILIES[family].video]


def clip(n: int, fps: float = 2.0) -> Video:
    frames = [Image.linear_gradient("L").convert("RGB").resize((20, 14)).rotate(90 * i) for i in range(n)]
    return Video(tuple(frames), tuple(i / fps for i in range(n)))


def load(family, folder):
    stock = build(family)
    return stock, plain_class(stock.config).from_pretrained(write_processor(folder, family, ids=IDS))


def encode(processor, images, videos):
    return encode_messages([user_message("what is this ?", images, processor, videos)], processor, images, videos)


def test_upstream_is_used_where_it_can_be():
    assert plain_class(build("llava").config) is None and plain_class(build("gemma3").config) is None


@pytest.mark.parametrize("family", WITH_VIDEOS)
@pytest.mark.parametrize("what", ["I", "II", "V", "VV", "IV", ""])
def test_models_take_what_it_makes(tmp_path, family, what):
    """The stock model itself compares the placeholders with the features."""
    stock, processor = load(family, tmp_path)
    images, videos = [clip(1).frames[0]] * what.count("I"), [clip(3, fps=4.0)] * what.count("V")
    inputs = encode(processor, images, videos)
    assert ("pixel_values" in inputs) == bool(images) and ("pixel_values_videos" in inputs) == bool(videos)
    with torch.no_grad():
        assert stock(**inputs).logits.isfinite().all()
    if "second_per_grid_ts" in inputs:
        assert [float(each) for each in inputs["second_per_grid_ts"]] == [0.5] * len(videos)


def test_whole_frames(tmp_path):
    """Each as upstream's video processor makes it: resized whatever its shape, and normalised."""
    _, processor = load("llava_onevision", tmp_path)
    video = clip(4)
    inputs = encode(processor, [], [video])
    pixels = inputs["pixel_values_videos"]
    assert pixels.shape == (1, 4, 3, 16, 16)
    assert int((inputs["input_ids"] == VIDEO).sum()) == 4 * 2 * 2 + 1  # 16 patches pooled, and a newline
    for frame, made in zip(video.frames, pixels[0], strict=True):
        resized = torch.tensor(np.array(frame.resize((16, 16), Image.Resampling.BICUBIC)))
        assert torch.allclose(made.permute(1, 2, 0), resized / 127.5 - 1, atol=0.02)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_patches_of_frames(tmp_path, n):
    """Two frames that follow each other share a patch, and the last one of an odd number is repeated: its halves are the
    patches of the frames as pictures."""
    _, processor = load("qwen2_vl", tmp_path)
    video = clip(n)
    inputs = encode(processor, [], [video])
    time, height, width = inputs["video_grid_thw"][0].tolist()
    assert time == (n + 1) // 2 and int((inputs["input_ids"] == VIDEO).sum()) == time * height * width // 4
    patches = inputs["pixel_values_videos"].view(time, height * width, 3, 2, -1)
    for i in range(2 * time):
        frame = video.frames[min(i, n - 1)]
        picture = processor.image_processor(images=[frame], return_tensors="pt")["pixel_values"]
        assert torch.equal(patches[i // 2, :, :, i % 2], picture.view(height * width, 3, 2, -1)[:, :, 0])


def test_settings_for_videos_are_those_of_the_files(tmp_path):
    _, processor = load("llava_onevision", tmp_path)
    processor.save_pretrained(tmp_path / "again")
    again = plain_class(build("llava_onevision").config).from_pretrained(tmp_path / "again")
    assert type(again).__name__ == "LlavaOnevisionProcessor" and isinstance(again.video_processor, FrameProcessor)
    one, other = (encode(each, [clip(1).frames[0]], [clip(2)]) for each in (processor, again))
    assert all(torch.equal(one[name], other[name]) for name in one)

    fields = {"size": {"height": 8, "width": 8}, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    fields["video_processor_type"] = "LlavaOnevisionVideoProcessor"
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(fields))
    other = plain_class(build("llava_onevision").config).from_pretrained(tmp_path)
    pixels = encode(other, [], [clip(2)])["pixel_values_videos"]
    assert pixels.shape == (1, 2, 3, 8, 8) and 0 <= pixels.min() and pixels.max() <= 1
    assert encode(other, [clip(1).frames[0]], [])["pixel_values"].shape[-2:] == (16, 16)
