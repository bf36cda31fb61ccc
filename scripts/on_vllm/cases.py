"""Prompts of all kinds, and this package's answers to them: what vLLM's are compared with."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging


NEW_TOKENS = 12
SIZES = [(64, 64), (100, 64), (64, 64), (56, 90)]  # width, height; models of one size an image resize them

# Prompts of one batch, each with its pictures. IMAGE becomes the model's placeholder.
CASES = {
    "one image": [("USER: IMAGE\nHow many red objects are there? ASSISTANT:", [0])],
    "two at once": [
        ("USER: IMAGE\nHow many red objects are there? ASSISTANT:", [1]),
        ("USER: IMAGE\nIs there a large blue circle left of the yellow square? ASSISTANT:", [2]),
    ],
    "text only": [("USER: How many red objects are there? ASSISTANT:", [])],
    "image in the middle": [
        ("USER: Is there a red circle? Look at this. IMAGE What color is the square? ASSISTANT:", [0])
    ],
    "image at the end": [("USER: What color is the square? ASSISTANT: IMAGE", [3])],
    "text between images": [
        (
            "USER: IMAGE\nHow many red objects are there? ASSISTANT: two USER: IMAGE\nWhat color is the circle? ASSISTANT:",
            [0, 1],
        )
    ],
    "five images": [("USER: IMAGE a IMAGE b IMAGE c IMAGE d IMAGE How many? ASSISTANT:", [0, 1, 2, 3, 0])],
    "images and text only": [
        ("USER: IMAGE\nWhat color is the circle? ASSISTANT:", [1]),
        ("USER: What is this? ASSISTANT:", []),
        ("USER: IMAGEIMAGE\nHow many? ASSISTANT:", [2, 0]),
    ],
}


def picture(i: int) -> Image.Image:
    """A circle and a square on white."""
    image = Image.new("RGB", SIZES[i], "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((5 * i + 4, 8, 5 * i + 24, 28), fill=("blue", "green", "red", "orange")[i])
    draw.rectangle((30, 35, 50, 55), fill="yellow")
    return image


def prompts(placeholder: str) -> list[tuple[str, str, list[Image.Image]]]:
    """All prompts: case, text, pictures."""
    return [
        (name, text.replace("IMAGE", placeholder), [picture(i) for i in pictures])
        for name, batch in CASES.items()
        for text, pictures in batch
    ]


def batches(placeholder: str) -> list[list[tuple[str, str, list[Image.Image]]]]:
    """The same, as they are sent together."""
    flat = iter(prompts(placeholder))
    return [[next(flat) for _ in batch] for batch in CASES.values()]


@torch.no_grad()
def answers(repo: Path, placeholder: str, layers: list | None = None) -> list[dict]:
    """Per prompt: its ids, the log probabilities of its tokens but the first, greedily decoded ids. In float32; `layers` other
    than the repo's, if given."""
    logging.set_verbosity_error()  # of an end of text that no model says
    model = AutoModelForImageTextToText.from_pretrained(repo, dtype=torch.float32).eval()
    if layers is not None:
        model.set_shortv_layers(layers)
    processor = AutoProcessor.from_pretrained(repo)
    results = []
    for _, text, pictures in prompts(placeholder):
        inputs = processor(text=text, return_tensors="pt", **({"images": pictures} if pictures else {}))
        ids = inputs["input_ids"][0]
        log_probabilities = model(**inputs).logits[0].log_softmax(-1)
        output = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        results.append(
            {
                "prompt": ids.tolist(),
                "logprobs": log_probabilities[:-1].gather(1, ids[1:, None])[:, 0].tolist(),
                "new": output[0, len(ids) :].tolist(),
            }
        )
    return results
