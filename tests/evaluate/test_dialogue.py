"""Questions as lmms-eval states them, as model inputs."""

import pytest
import torch
from PIL import Image
from processor_files import write_processor
from transformers import AutoProcessor

from shortv_hf.data.video import Video
from shortv_hf.evaluate.dialogue import encode_dialogues, read_dialogue


pytestmark = pytest.mark.once
RED, BLUE = Image.new("RGB", (16, 16), "red"), Image.new("RGBA", (16, 16), "blue")
CLIP = Video((RED,), (0.0,))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return AutoProcessor.from_pretrained(write_processor(tmp_path_factory.mktemp("processor")))


def read(processor, *parts, **kwargs):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return read_dialogue([{"role": "user", "content": content}], processor, lambda name: CLIP, **kwargs)


def picture(image):
    return {"type": "image", "url": image}


def test_pictures_and_text_stay_in_their_order(processor):
    found = read(processor, "what is", picture(RED), "a", picture(BLUE), "?")
    assert [part["type"] for part in found.messages[0]["content"]] == ["text", "image", "text", "image", "text"]
    assert [image.getpixel((0, 0)) for image in found.images] == [(255, 0, 0), (0, 0, 255)]
    assert found.kinds == (True, False) and read(processor, "?").kinds == (False, False)
    assert read(processor, {"type": "video", "url": "a.mp4"}, "?").videos == (CLIP,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nwhat is this ?", "what is this ?"),
        ("what <image> is <video>\nthis ?\n", "what  is this ?\n"),
        ("what is </s> ?", "what is < /s> ?"),
        ("what is this ?\nAnswer", "what is this ?\nAnswer"),
    ],
)
def test_the_text_holds_no_special_token(processor, text, expected):
    found = read(processor, picture(RED), text)
    assert found.messages[0]["content"][1] == {"type": "text", "text": expected}
    ids = encode_dialogues([found], processor)["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == 16


def test_a_system_prompt_comes_first(processor):
    found = read(processor, "?", system_prompt="what is this ?")
    assert [message["role"] for message in found.messages] == ["system", "user"]
    assert read(processor, "?", system_prompt="").messages[0]["role"] == "user"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "audio", "url": "a.wav"}, "a question holds audio; text, pictures and whole videos"),
        ({"type": "video", "url": "a.mp4", "end_time": 3.0}, "a question holds a part of a video"),
        (picture("a.png"), "a picture must be a Pillow image, not str"),
        ("\udc80", "not valid UTF-8"),
    ],
)
def test_what_cannot_be_asked(processor, part, message):
    with pytest.raises(ValueError, match=message):
        read(processor, part)


def test_batches_are_padded_on_the_left_whatever_the_tokenizer_says(processor):
    processor.tokenizer.padding_side = "right"
    asked = [read(processor, picture(RED), "what is this ?"), read(processor, picture(RED), picture(BLUE), "a ?")]
    together = encode_dialogues(asked, processor)
    assert together["attention_mask"][:, -1].tolist() == [1, 1] and not together["attention_mask"][0, 0]
    for row, alone in enumerate(asked):
        ids = encode_dialogues([alone], processor)["input_ids"][0]
        torch.testing.assert_close(together["input_ids"][row, -len(ids) :], ids)
    assert len(together["pixel_values"]) == 3
