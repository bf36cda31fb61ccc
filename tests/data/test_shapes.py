"""The generator of pictures and questions: reproducible, and right about its own scenes."""

import random

import pytest
from PIL import Image

from shortv_hf.data import shapes


pytestmark = pytest.mark.once


def sample(seed):
    rng = random.Random(seed)
    return shapes.make_scene(rng), rng


def test_a_seed_names_a_scene_and_its_questions():
    for seed in range(20):
        (one, rng), (other, other_rng) = sample(seed), sample(seed)
        assert one == other
        assert shapes.questions(one, rng, 5) == shapes.questions(other, other_rng, 5)
        assert shapes.draw(one, 64).tobytes() == shapes.draw(other, 64).tobytes()


def test_objects_do_not_overlap_and_lie_inside():
    for seed in range(200):
        scene, _ = sample(seed)
        assert 1 <= len(scene.objects) <= shapes.MAX_OBJECTS
        assert [obj.place for obj in scene.objects] == sorted({obj.place for obj in scene.objects})
        for i, obj in enumerate(scene.objects):
            assert min(obj.box()) >= 0 and max(obj.box()) <= 1
            for other in scene.objects[:i]:
                left, top, right, bottom = other.box()
                assert obj.box()[2] < left or right < obj.box()[0] or obj.box()[3] < top or bottom < obj.box()[1]


def test_objects_are_drawn_in_their_colour():
    for seed in range(50):
        scene, _ = sample(seed)
        picture = shapes.draw(scene, 300)
        for obj in scene.objects:
            assert picture.getpixel((round(obj.x * 300), round(obj.y * 300))) == obj.rgb


@pytest.mark.parametrize("question_type", shapes.QUESTION_TYPES)
def test_answers_are_of_their_kind(question_type):
    allowed = {
        "color": set(shapes.COLORS),
        "shape": set(shapes.SHAPES),
        "size": set(shapes.SIZES),
        "count": set(shapes.NUMBERS),
        "existence": {"yes", "no"},
        "place": set(shapes.PLACES),
        "relation": {"yes", "no"},
    }[question_type]
    seen = set()
    for seed in range(400):
        scene, rng = sample(seed)
        question = shapes.ask(scene, rng, question_type)
        if question is not None:
            assert question.type == question_type and question.answer in allowed
            seen.add(question.answer)
    assert len(seen) > len(allowed) / 2  # answers vary


def test_counts_and_existence_are_true():
    """Re-derived from the words of the question."""
    for seed in range(300):
        scene, rng = sample(seed)
        for question_type in ("count", "existence"):
            question = shapes.ask(scene, rng, question_type)
            words = question.text.lower().replace("?", "").split()
            matching = [
                obj
                for obj in scene.objects
                if all(c == obj.color for c in shapes.COLORS if c in words)
                and all(s == obj.size for s in shapes.SIZES if s in words)
                and all(s == obj.shape for s in shapes.SHAPES if {s, f"{s}s", f"{s}es"} & set(words))
            ]
            expected = shapes.NUMBERS[len(matching)] if question_type == "count" else "yes" if matching else "no"
            assert question.answer == expected, question


def test_held_out_scenes_are_not_for_training():
    questions = list(shapes.held_out_questions(70))
    assert [question.type for _, question in questions] == list(shapes.QUESTION_TYPES) * 10
    training = {sample(seed)[0] for seed in range(500)}
    assert not training & {scene for scene, _ in questions}


def test_comparisons_are_true():
    """Re-derived from the centres of the two objects."""
    found = 0
    for seed in range(300):
        scene, rng = sample(seed)
        pair = shapes.comparison(scene, rng)
        if pair is None:
            continue
        found += 1
        first, second = (
            pair[0].removeprefix("Is the ").removesuffix("?").split(" left of, right of, above, below the ")
        )

        a, b = (
            next(o for o in scene.objects if set(words) <= {o.color, o.size, o.shape, "object"})
            for words in (first.split(), second.split())
        )
        expected = [] if a.place % 3 == b.place % 3 else ["left of" if a.x < b.x else "right of"]
        expected += [] if a.place // 3 == b.place // 3 else ["above" if a.y < b.y else "below"]
        assert pair[1] == ", ".join(expected) != ""
    assert found > 100


def test_plain_share_tells_textured_pictures_from_scenes():
    for seed in range(40):
        scene, _ = sample(seed)
        picture = shapes.draw(scene)
        assert shapes.plain_share(picture) >= shapes.LEAST_PLAIN_SHARE
        assert shapes.plain_share(picture.resize((400, 300))) >= shapes.LEAST_PLAIN_SHARE
        noisy = Image.blend(picture, Image.effect_noise(picture.size, 90).convert("RGB"), 0.4)
        assert shapes.plain_share(noisy) < shapes.LEAST_PLAIN_SHARE
    assert shapes.plain_share(Image.new("RGB", (30, 500), "red")) == 1
