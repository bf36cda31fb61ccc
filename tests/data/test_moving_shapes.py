"""The generator of clips and questions: reproducible, and right about its own clips."""

import random

import pytest

from shortv_hf.data import moving_shapes, shapes


pytestmark = pytest.mark.once
SEEDS = range(150)


def sample(seed):
    rng = random.Random(seed)
    return moving_shapes.make_clip(rng), rng


def seen_in(clip, frame):
    """Names of the objects of a frame to where they are, read from the frame itself."""
    return {f"{obj.color} {obj.shape}": (obj.x, obj.y) for obj in clip.scene(frame).objects}


def referred(clip, words):
    """The one object that an expression such as "red circle", "circle" or "red object" fits."""
    names = [name for name in seen_in(clip, -1 + moving_shapes.N_FRAMES) if fits(name, words)]
    assert len(names) == 1, (words, names)
    return names[0]


def fits(name, words):
    return set(words.split()) - {"object"} <= set(name.split())


def first_frame(clip, name):
    return next(frame for frame in range(moving_shapes.N_FRAMES) if name in seen_in(clip, frame))


def asked(question_type, seeds=SEEDS):
    for seed in seeds:
        clip, rng = sample(seed)
        question = moving_shapes.ask(clip, rng, question_type)
        if question is not None:
            assert question.type == question_type
            yield clip, question.text.rstrip("?"), question.answer


def test_a_seed_names_a_clip_and_its_questions():
    for seed in range(20):
        (one, rng), (other, other_rng) = sample(seed), sample(seed)
        assert one == other
        assert moving_shapes.questions(one, rng, 5) == moving_shapes.questions(other, other_rng, 5)
        frames, again = moving_shapes.draw(one, 64), moving_shapes.draw(other, 64)
        assert len(frames) == moving_shapes.N_FRAMES
        assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in again]


def test_objects_stay_inside_apart_and_different():
    for seed in SEEDS:
        clip, _ = sample(seed)
        assert 1 <= len(clip.movers) <= moving_shapes.MAX_OBJECTS
        assert len(seen_in(clip, moving_shapes.N_FRAMES - 1)) == len(clip.movers)
        for frame in range(moving_shapes.N_FRAMES):
            objects = clip.scene(frame).objects
            for i, obj in enumerate(objects):
                assert min(obj.box()) >= 0 and max(obj.box()) <= 1
                assert obj.place == 3 * int(3 * obj.y) + int(3 * obj.x)
                assert not any(shapes.overlap(obj, other) for other in objects[:i])


def test_objects_appear_one_by_one_and_stay():
    for seed in SEEDS:
        clip, _ = sample(seed)
        counts = [len(seen_in(clip, frame)) for frame in range(moving_shapes.N_FRAMES)]
        assert counts[0] == 1 and counts == sorted(counts)
        assert all(after - before <= 1 for before, after in zip(counts, counts[1:], strict=False))


def test_objects_are_drawn_where_they_are():
    for seed in range(30):
        clip, _ = sample(seed)
        for frame, picture in enumerate(moving_shapes.draw(clip, 300)):
            for obj in clip.scene(frame).objects:
                assert picture.getpixel((round(obj.x * 300), round(obj.y * 300))) == obj.rgb


def test_directions_are_those_of_the_frames():
    answers = set()
    for clip, text, answer in asked("direction"):
        name = referred(clip, text.partition(" the ")[2].removesuffix(" move"))
        (x, y), (last_x, last_y) = (
            seen_in(clip, f)[name] for f in (first_frame(clip, name), moving_shapes.N_FRAMES - 1)
        )
        way_x, way_y = last_x - x, last_y - y
        if max(abs(way_x), abs(way_y)) < 1e-9:
            expected = moving_shapes.STILL
        else:
            assert min(abs(way_x), abs(way_y)) < 1e-9 and max(abs(way_x), abs(way_y)) > 0.29
            expected = ("left", "right")[way_x > 0] if abs(way_x) > abs(way_y) else ("up", "down")[way_y > 0]
        assert answer == expected
        answers.add(answer)
    assert answers == {*moving_shapes.DIRECTIONS, moving_shapes.STILL}


def test_orders_are_those_of_the_frames():
    answers = set()
    for clip, text, answer in asked("order"):
        if text.startswith("Which"):
            order = sorted(seen_in(clip, moving_shapes.N_FRAMES - 1), key=lambda name: first_frame(clip, name))
            assert answer == f"the {order[0 if text.endswith('first') else -1]}"
            continue
        word = "before" if " before " in text else "after"
        one, other = (referred(clip, part) for part in text.removeprefix("Does the ").split(f" appear {word} the "))
        is_before = first_frame(clip, one) < first_frame(clip, other)
        assert answer == ("yes" if is_before == (word == "before") else "no")
        answers.add((word, answer))
    assert len(answers) == 4


def test_counts_are_those_of_the_last_frame():
    answers = set()
    for clip, text, answer in asked("count"):
        words = text.removeprefix("How many ").split(" are ")[0].split(" do ")[0]
        words = words.removesuffix("es") if words.endswith("crosses") else words.removesuffix("s")
        n = sum(fits(name, words) for name in seen_in(clip, moving_shapes.N_FRAMES - 1))
        assert answer == shapes.NUMBERS[n]
        answers.add(answer)
    assert answers == set(shapes.NUMBERS[: moving_shapes.MAX_OBJECTS + 1])


@pytest.mark.parametrize("question_type", ["color", "shape"])
def test_attributes_are_those_of_the_object(question_type):
    for clip, text, answer in asked(question_type):
        words = text.partition(" the ")[2].removesuffix(" have")
        assert answer in referred(clip, words).split()
        assert answer not in words


def test_descriptions_name_every_object_in_its_turn():
    for seed in SEEDS:
        clip, rng = sample(seed)
        parts = moving_shapes.describe(clip).split(", then ")
        assert len(parts) == len(clip.movers)
        for part, mover in zip(parts, clip.movers, strict=True):
            assert part.split()[1:3] == [mover.color, mover.shape]
            assert part.endswith(f"moves {mover.direction}" if mover.direction else "does not move")
        prompt, answer = moving_shapes.conversation(clip, rng, descriptions=1)[0]
        assert prompt in moving_shapes.DESCRIPTION_PROMPTS and answer == moving_shapes.describe(clip)


def test_listings_name_the_objects_asked_for():
    for seed in SEEDS:
        clip, rng = sample(seed)
        text, answer = moving_shapes.listing(clip, rng)
        words = text.removeprefix("Describe the ").removesuffix(".")
        plural = words.endswith("s") and not words.endswith("cross")
        if plural:
            words = words.removesuffix("es") if words.endswith("crosses") else words.removesuffix("s")
        parts = [part for part in moving_shapes.describe(clip).split(", then ") if fits(part, words)]
        assert answer == ", then ".join(parts) and plural == (len(parts) > 1)
        assert moving_shapes.conversation(clip, rng, descriptions=0, listings=1)[0][0].startswith("Describe the ")


def test_weights_leave_types_out():
    for seed in range(20):
        clip, rng = sample(seed)
        weights = dict.fromkeys(moving_shapes.QUESTION_TYPES, 0) | {"count": 1}
        assert {q.type for q in moving_shapes.questions(clip, rng, 5, weights)} == {"count"}


def test_questions_about_several_pictures_say_which():
    for seed in SEEDS:
        rng = random.Random(seed)
        scenes = [shapes.make_scene(rng) for _ in range(3)]
        question = moving_shapes.ask_of_several(scenes, rng, "count")
        index = next(i for i, word in enumerate(moving_shapes.ORDINALS) if f" in the {word} picture?" in question.text)
        if "many objects" in question.text:
            assert question.answer == shapes.NUMBERS[len(scenes[index].objects)]


def test_held_out_questions_are_apart_and_of_all_types():
    found = list(moving_shapes.held_out_questions(20))
    assert found == list(moving_shapes.held_out_questions(20))
    assert [question.type for _, question in found] == list(moving_shapes.QUESTION_TYPES) * 4
    clips = [clip for clip, _ in found]
    others = [clip for clip, _ in moving_shapes.held_out_questions(20, seed=1)]
    trained = [sample(seed)[0] for seed in range(20)]
    assert len({*clips, *others, *trained}) == 60


def test_the_vocabulary_is_whole():
    words = {
        word for text in moving_shapes.all_texts() for word in text.lower().replace("?", "").replace(",", "").split()
    }
    for seed in range(1000, 1100):
        clip, rng = sample(seed)
        texts = [moving_shapes.describe(clip)]
        texts += [text for q in moving_shapes.questions(clip, rng, 4) for text in (q.text, q.answer)]
        assert {word for text in texts for word in text.lower().replace("?", "").replace(",", "").split()} <= words
