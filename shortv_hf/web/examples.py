"""Questions that the page has ready, about pictures that are drawn here."""

import random
from pathlib import Path

from ..data import shapes


SEEDS = (12, 17, 21)  # of scenes that no training seed makes
QUESTIONS = ("Describe the picture.", "How many objects are there?", "What color is the {}?")
SIZE = 256  # pixels


def write_examples(folder: Path) -> list[dict]:
    """Draw the pictures into a `folder`; `{"text": ..., "files": [path]}` for each example."""
    found = []
    for seed, question in zip(SEEDS, QUESTIONS, strict=True):
        scene = shapes.make_scene(random.Random(shapes.HELD_OUT_SEED + seed))
        file = folder / f"shapes-{seed}.png"
        shapes.draw(scene, SIZE).save(file)
        found.append({"text": question.format(scene.objects[0].shape), "files": [str(file)]})
    return found
