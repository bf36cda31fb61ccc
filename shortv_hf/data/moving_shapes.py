"""Short clips of moving shapes with questions, answers and descriptions: the video counterpart of `shapes`.

Everything is a function of a `random.Random`, so a seed names a clip together with its questions. Seeds below
`HELD_OUT_SEED` are for training and calibration, those from `HELD_OUT_SEED` on for evaluation only.

    rng = random.Random(7)
    clip = make_clip(rng)
    frames = draw(clip, 256)          # eight PIL.Image
    for question in questions(clip, rng, 3):
        print(question.type, question.text, question.answer)
    print(describe(clip))

Several pictures in one prompt have questions here too: `ask_of_several`.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from . import shapes
from .shapes import COLORS, HELD_OUT_SEED, NUMBERS, SHAPES, Object, Question, Scene


N_FRAMES = 8
MAX_OBJECTS = 3
WIDTHS = (0.2, 0.3)  # in units of the frame's side
WAYS = (0.3, 0.55)  # how far an object moves in all, in the same units: more than its own width
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
STILL = "it does not move"
STILL_SHARE = 0.2
DESCRIPTION_PROMPTS = ("Describe the video.", "What happens?", "What happens in the video?")
ORDINALS = ("first", "second", "third")


@dataclass(frozen=True)
class Mover:
    """A shape that appears in frame `start` and moves by (`step_x`, `step_y`) from each frame to the next."""

    obj: Object  # as in frame `start`
    start: int
    direction: str | None  # a key of `DIRECTIONS`, or `None` for an object that stays where it is
    step_x: float
    step_y: float

    @property
    def color(self) -> str:
        return self.obj.color

    @property
    def shape(self) -> str:
        return self.obj.shape

    def at(self, frame: int) -> Object:
        steps = frame - self.start
        x, y = self.obj.x + steps * self.step_x, self.obj.y + steps * self.step_y
        return replace(self.obj, x=x, y=y, place=_place(x, y))


@dataclass(frozen=True)
class Clip:
    """Movers in the order in which they appear, each in a frame of its own; the first is there from frame 0 on."""

    movers: tuple[Mover, ...]
    background: tuple[int, int, int]

    def scene(self, frame: int) -> Scene:
        """What frame number `frame` shows."""
        seen = [mover.at(frame) for mover in self.movers if mover.start <= frame]
        return Scene(tuple(sorted(seen, key=lambda obj: obj.place)), self.background)


# ----------------------------------------------------------------------------------------------------------- clips


def make_clip(rng: random.Random) -> Clip:
    """A clip of one to three objects that differ in colour or shape and never overlap."""
    n_movers = rng.choice((1, 2, 2, 3, 3))  # a single object leaves little to ask
    colors = rng.sample(list(COLORS), rng.choice((2, 3, 4)))  # few, so that objects share attributes
    kinds = rng.sample([(color, shape) for color in colors for shape in SHAPES], n_movers)
    starts = (0, *sorted(rng.sample((2, 3, 4), n_movers - 1)))
    movers: list[Mover] = []
    while len(movers) < n_movers:
        for _ in range(40):
            color, shape = kinds[len(movers)]
            candidate = _make_mover(rng, color, shape, starts[len(movers)])
            if not any(_meet(candidate, other) for other in movers):
                movers.append(candidate)
                break
        else:  # no way is left free: begin anew
            movers.clear()
    return Clip(tuple(movers), shapes.make_background(rng))


def _make_mover(rng: random.Random, color: str, shape: str, start: int) -> Mover:
    direction = None if rng.random() < STILL_SHARE else rng.choice(list(DIRECTIONS))
    way = rng.uniform(*WAYS) if direction else 0.0
    way_x, way_y = (way * part for part in DIRECTIONS.get(direction or "", (0, 0)))
    width = rng.uniform(*WIDTHS)
    height = width * rng.uniform(0.9, 1.1)
    x = _free_start(rng, width, way_x)
    y = _free_start(rng, height, way_y)
    obj = Object(color, shape, "large", _place(x, y), x, y, width, height, shapes.shade(rng, color))
    steps = N_FRAMES - 1 - start
    return Mover(obj, start, direction, way_x / steps, way_y / steps)


def _free_start(rng: random.Random, extent: float, way: float) -> float:
    """Where along an axis an object can begin, so that its whole way lies inside the frame."""
    return rng.uniform(extent / 2 + 0.01 - min(way, 0), 0.99 - extent / 2 - max(way, 0))


def _meet(a: Mover, b: Mover) -> bool:
    return any(shapes.overlap(a.at(frame), b.at(frame)) for frame in range(max(a.start, b.start), N_FRAMES))


def _place(x: float, y: float) -> int:
    return 3 * int(3 * y) + int(3 * x)


def draw(clip: Clip, size: int = 256) -> list[Image.Image]:
    """The frames of a clip, `size` x `size` pixels each."""
    return [shapes.draw(clip.scene(frame), size) for frame in range(N_FRAMES)]


# ----------------------------------------------------------------------------------------- descriptions, questions


def describe(clip: Clip) -> str:
    """Every object in order of appearance, such as "a red circle moves left, then a blue cross does not move"."""
    return _describe(clip.movers)


def _describe(movers: Sequence[Mover]) -> str:
    parts = []
    for mover in movers:
        name = f"{mover.color} {mover.shape}"
        motion = f"moves {mover.direction}" if mover.direction else "does not move"
        parts.append(f"{shapes.article(name)} {name} {motion}")
    return ", then ".join(parts)


def listing(clip: Clip, rng: random.Random) -> tuple[str, str]:
    """A prompt that asks to describe the objects of a colour, a shape or both, and the answer: those, as in a
    description."""
    mover = rng.choice(clip.movers)
    names = rng.choice((("color",), ("shape",), ("shape",), ("color", "shape")))
    attributes = {name: getattr(mover, name) for name in names}
    found = _matches(clip, **attributes)
    return f"Describe the {shapes.noun_phrase(attributes, plural=len(found) > 1)}.", _describe(found)


def _refer(clip: Clip, mover: Mover, rng: random.Random, names: tuple[str, ...] = ("color", "shape")) -> str | None:
    """An expression that only `mover` fits, made of attributes in `names`."""
    subsets = [names, *([(name,) for name in names] if len(names) > 1 else [])]
    rng.shuffle(subsets)
    for subset in subsets:
        attributes = {name: getattr(mover, name) for name in subset}
        if len(_matches(clip, **attributes)) == 1:
            return shapes.noun_phrase(attributes)
    return None


def _matches(clip: Clip, **attributes: str) -> list[Mover]:
    return [mover for mover in clip.movers if all(getattr(mover, name) == value for name, value in attributes.items())]


def _ask_color(clip: Clip, rng: random.Random):
    mover = rng.choice(clip.movers)
    reference = _refer(clip, mover, rng, ("shape",))
    if reference is None:
        return None
    return rng.choice(("What color is the {}?", "Which color does the {} have?")).format(reference), mover.color


def _ask_shape(clip: Clip, rng: random.Random):
    mover = rng.choice(clip.movers)
    reference = _refer(clip, mover, rng, ("color",))
    if reference is None:
        return None
    return rng.choice(("What shape is the {}?", "Which shape does the {} have?")).format(reference), mover.shape


def _ask_direction(clip: Clip, rng: random.Random):
    mover = rng.choice(clip.movers)
    question = rng.choice(("In which direction does the {} move?", "Where does the {} move?"))
    return question.format(_refer(clip, mover, rng)), mover.direction or STILL


def _ask_order(clip: Clip, rng: random.Random):
    if len(clip.movers) < 2:
        return None
    if rng.random() < 0.5:
        index, word = rng.choice(((0, "first"), (-1, "last")))
        mover = clip.movers[index]
        return f"Which object appears {word}?", f"the {mover.color} {mover.shape}"
    one, other = rng.sample(clip.movers, 2)
    word = rng.choice(("before", "after"))
    question = f"Does the {_refer(clip, one, rng)} appear {word} the {_refer(clip, other, rng)}?"
    return question, "yes" if (one.start < other.start) == (word == "before") else "no"


def _ask_count(clip: Clip, rng: random.Random):
    names = rng.choice(((), ("color",), ("shape",)))
    attributes = {name: getattr(rng.choice(clip.movers), name) for name in names}
    if names and rng.random() < 0.15:
        attributes = {name: rng.choice({"color": list(COLORS), "shape": SHAPES}[name]) for name in names}
    question = rng.choice(("How many {} are there?", "How many {} are in the video?", "How many {} do you see?"))
    return question.format(shapes.noun_phrase(attributes, plural=True)), NUMBERS[len(_matches(clip, **attributes))]


QUESTION_TYPES: dict[str, Callable] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "direction": _ask_direction,
    "order": _ask_order,
    "count": _ask_count,
}


def ask(clip: Clip, rng: random.Random, question_type: str) -> Question | None:
    """A question of one type, or `None` if the clip has none (an order needs two objects, for example)."""
    for _ in range(8):
        pair = QUESTION_TYPES[question_type](clip, rng)
        if pair is not None:
            return Question(question_type, *pair)
    return None


def questions(clip: Clip, rng: random.Random, n: int, weights: dict[str, float] | None = None) -> list[Question]:
    """`n` questions that the clip allows, of random types: all alike, or as often as `weights` says."""
    found: list[Question] = []
    types = list(QUESTION_TYPES)
    while len(found) < n:
        question = ask(clip, rng, rng.choices(types, [weights[t] for t in types] if weights else None)[0])
        if question is not None:
            found.append(question)
    return found


def conversation(
    clip: Clip,
    rng: random.Random,
    descriptions: float = 0.15,
    listings: float = 0.0,
    weights: dict[str, float] | None = None,
) -> list[tuple[str, str]]:
    """Turns (prompt, answer): a description of the clip with probability `descriptions`, a listing with `listings`, or
    else a question, sometimes (10 %) two or three. `weights` as for `questions`."""
    kind = rng.random()
    if kind < descriptions:
        return [(rng.choice(DESCRIPTION_PROMPTS), describe(clip))]
    if kind < descriptions + listings:
        return [listing(clip, rng)]
    n_questions = rng.randint(2, 3) if rng.random() < 0.1 else 1
    return [(question.text, question.answer) for question in questions(clip, rng, n_questions, weights)]


def ask_of_several(scenes: Sequence[Scene], rng: random.Random, question_type: str) -> Question | None:
    """A question of a type of `shapes` about one of several pictures, such as "What color is the circle in the second
    picture?"."""
    index = rng.randrange(len(scenes))
    question = shapes.ask(scenes[index], rng, question_type)
    if question is None:
        return None
    text = question.text.removesuffix("?").removesuffix(" in the picture")
    return replace(question, text=f"{text} in the {ORDINALS[index]} picture?")


def held_out_questions(n: int, seed: int = 0) -> Iterator[tuple[Clip, Question]]:
    """`n` questions of all types in turn, each about another clip that no training seed makes."""
    types, found = list(QUESTION_TYPES), 0
    index = HELD_OUT_SEED + seed * 1_000_000
    while found < n:
        rng = random.Random(index)
        clip, index = make_clip(rng), index + 1
        question = ask(clip, rng, types[found % len(types)])
        if question is not None:
            yield clip, question
            found += 1


def all_texts() -> list[str]:
    """Texts that together hold every word of the generator, for building a vocabulary."""
    texts = [
        *shapes.all_texts(),
        *DESCRIPTION_PROMPTS,
        " ".join((*DIRECTIONS, STILL, *ORDINALS)),
        "in the first picture",
    ]
    for seed in range(500):
        rng = random.Random(seed)
        clip = make_clip(rng)
        texts += [describe(clip), *(question.text for question in questions(clip, rng, 4))]
    return texts


__all__ = [
    "DIRECTIONS",
    "HELD_OUT_SEED",
    "N_FRAMES",
    "QUESTION_TYPES",
    "STILL",
    "Clip",
    "Mover",
    "all_texts",
    "ask",
    "ask_of_several",
    "conversation",
    "describe",
    "draw",
    "held_out_questions",
    "listing",
    "make_clip",
    "questions",
]
