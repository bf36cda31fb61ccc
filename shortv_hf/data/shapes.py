"""Pictures of coloured shapes with questions, answers and captions: data that needs no download.

Everything is a function of a `random.Random`, so a seed names a scene together with its questions. Seeds below
`HELD_OUT_SEED` are for training and calibration, those from `HELD_OUT_SEED` on for evaluation only.

    rng = random.Random(7)
    scene = make_scene(rng)
    picture = draw(scene, 256)          # PIL.Image
    for question in questions(scene, rng, 3):
        print(question.type, question.text, question.answer)
    print(caption(scene))
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .images import to_rgb


HELD_OUT_SEED = 1_000_000_000
COLORS = {
    "red": (215, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 215, 50),
    "green": (45, 160, 65),
    "blue": (45, 85, 215),
    "purple": (140, 55, 170),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": (0.14, 0.19), "large": (0.27, 0.38)}  # widths, in units of the picture's
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")
MAX_OBJECTS = 4
CAPTION_PROMPTS = ("Describe the picture.", "What do you see?", "What is in the picture?")


@dataclass(frozen=True)
class Object:
    """A shape. `x`, `y` (its centre), `width` and `height` are in units of the picture's side."""

    color: str
    shape: str
    size: str
    place: int  # cell of the 3 x 3 grid, an index of `PLACES`
    x: float
    y: float
    width: float
    height: float
    rgb: tuple[int, int, int]  # a shade of `color`

    @property
    def name(self) -> str:
        return f"{self.size} {self.color} {self.shape}"

    def box(self, scale: float = 1.0) -> tuple[float, float, float, float]:
        """Left, top, right and bottom edge."""
        half_width, half_height = self.width / 2, self.height / 2
        edges = self.x - half_width, self.y - half_height, self.x + half_width, self.y + half_height
        left, top, right, bottom = (edge * scale for edge in edges)
        return left, top, right, bottom


@dataclass(frozen=True)
class Scene:
    """Objects in raster order (row by row, at most one in each cell of the grid) on a plain background."""

    objects: tuple[Object, ...]
    background: tuple[int, int, int]


@dataclass(frozen=True)
class Question:
    """A question about one scene. `type` is a key of `QUESTION_TYPES`."""

    type: str
    text: str
    answer: str


# ---------------------------------------------------------------------------------------------------------- scenes


def make_scene(rng: random.Random) -> Scene:
    """A scene of one to four objects that do not overlap."""
    colors = rng.sample(list(COLORS), rng.choice((2, 3, 4)))  # few, so that objects share attributes
    shapes = rng.sample(SHAPES, rng.choice((2, 3, 4)))
    n_objects = rng.randint(1, MAX_OBJECTS)
    cells = rng.sample(range(len(PLACES)), len(PLACES))
    objects: list[Object] = []
    while len(objects) < n_objects and cells:
        candidate = _make_object(rng, rng.choice(colors), rng.choice(shapes), cells.pop())
        if not any(overlap(candidate, other) for other in objects):
            objects.append(candidate)
    return Scene(tuple(sorted(objects, key=lambda o: o.place)), make_background(rng))


def _make_object(rng: random.Random, color: str, shape: str, place: int) -> Object:
    size = rng.choice(list(SIZES))
    width = rng.uniform(*SIZES[size])
    height = width * rng.uniform(0.9, 1.1)
    row, column = divmod(place, 3)
    x, y = ((2 * cell + 1) / 6 + rng.uniform(-0.08, 0.08) for cell in (column, row))
    x = min(max(x, width / 2 + 0.01), 0.99 - width / 2)
    y = min(max(y, height / 2 + 0.01), 0.99 - height / 2)
    return Object(color, shape, size, place, x, y, width, height, shade(rng, color))


def shade(rng: random.Random, color: str) -> tuple[int, int, int]:
    """A red, green and blue near `color`."""
    red, green, blue = (min(255, max(0, round(value + rng.uniform(-22, 22)))) for value in COLORS[color])
    return red, green, blue


def overlap(a: Object, b: Object, gap: float = 0.02) -> bool:
    """Whether the boxes of two objects come closer than `gap`."""
    apart = abs(a.x - b.x) > (a.width + b.width) / 2 + gap or abs(a.y - b.y) > (a.height + b.height) / 2 + gap
    return not apart


def make_background(rng: random.Random) -> tuple[int, int, int]:
    """White, a light tint, grey, or nearly black."""
    low, high = rng.choice(((255, 255), (225, 255), (225, 255), (165, 205), (0, 45)))
    grey = rng.uniform(low, high)
    red, green, blue = (min(255, max(0, round(grey + (rng.uniform(-8, 8) if low < high else 0)))) for _ in range(3))
    return red, green, blue


def draw(scene: Scene, size: int = 256) -> Image.Image:
    """The picture of a scene, `size` x `size` pixels."""
    picture = Image.new("RGB", (size, size), scene.background)
    canvas = ImageDraw.Draw(picture)
    for obj in scene.objects:
        left, top, right, bottom = obj.box(size)
        if obj.shape == "circle":
            canvas.ellipse((left, top, right, bottom), fill=obj.rgb)
        elif obj.shape == "square":
            canvas.rectangle((left, top, right, bottom), fill=obj.rgb)
        elif obj.shape == "triangle":
            canvas.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=obj.rgb)
        else:
            third_x, third_y = (right - left) / 3, (bottom - top) / 3
            canvas.rectangle((left, top + third_y, right, bottom - third_y), fill=obj.rgb)
            canvas.rectangle((left + third_x, top, right - third_x, bottom), fill=obj.rgb)
    return picture


# Of 600 scenes the least share is 0.84; blurred by 2 pixels 0.79, as JPEG of quality 60 0.77.
LEAST_PLAIN_SHARE = 0.75


def plain_share(picture: Image.Image) -> float:
    """Share of a picture's area in plain colours, between 0 and 1: of the 8 x 8 blocks of the picture at 256 x 256, those
    in which no channel varies by more than 24. Photographs with any texture fall below `LEAST_PLAIN_SHARE`; a picture
    above it need not be one of shapes."""
    picture = to_rgb(picture).resize((256, 256), Image.Resampling.BILINEAR)
    plain = 0
    for top in range(0, 256, 8):
        for left in range(0, 256, 8):
            block = picture.crop((left, top, left + 8, top + 8))
            plain += all(high - low <= 24 for low, high in block.getextrema())  # type: ignore[misc]  # a pair per channel
    return plain / 32**2


# ------------------------------------------------------------------------------------------- captions and questions


def caption(scene: Scene) -> str:
    """Every object in raster order, such as "a small red circle at the top left, a large blue cross in the center"."""
    return _describe(scene.objects)


def _describe(objects: Sequence[Object]) -> str:
    return ", ".join(f"{article(obj.name)} {obj.name} {_at(obj.place)}" for obj in objects)


def _at(place: int) -> str:
    return f"{'in' if PLACES[place] == 'center' else 'at'} the {PLACES[place]}"


def article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _matches(scene: Scene, **attributes: str) -> list[Object]:
    return [obj for obj in scene.objects if all(getattr(obj, name) == value for name, value in attributes.items())]


def noun_phrase(attributes: dict[str, str], plural: bool = False) -> str:
    """ "large red circle" or, without a shape, "large red object"."""
    words = [attributes[name] for name in ("size", "color") if name in attributes]
    noun = attributes.get("shape", "object")
    if plural:
        noun += "es" if noun == "cross" else "s"
    return " ".join((*words, noun))


def _refer(scene: Scene, obj: Object, rng: random.Random, names: tuple[str, ...], place: bool = True) -> str | None:
    """An expression that only `obj` fits, made of attributes in `names`, or else of its place if `place` allows it."""
    subsets = [{name for i, name in enumerate(names) if bits >> i & 1} for bits in range(1, 2 ** len(names))]
    rng.shuffle(subsets)
    for subset in subsets:
        attributes = {name: getattr(obj, name) for name in subset}
        if len(_matches(scene, **attributes)) == 1:
            return noun_phrase(attributes)
    return f"object {_at(obj.place)}" if place else None


def _ask_color(scene: Scene, rng: random.Random):
    obj = rng.choice(scene.objects)
    reference = _refer(scene, obj, rng, ("size", "shape") if rng.random() < 0.8 else ())
    return rng.choice(("What color is the {}?", "Which color does the {} have?")).format(reference), obj.color


def _ask_shape(scene: Scene, rng: random.Random):
    obj = rng.choice(scene.objects)
    reference = _refer(scene, obj, rng, ("size", "color") if rng.random() < 0.8 else ())
    return rng.choice(("What shape is the {}?", "Which shape does the {} have?")).format(reference), obj.shape


def _ask_size(scene: Scene, rng: random.Random):
    obj = rng.choice(scene.objects)
    reference = _refer(scene, obj, rng, ("color", "shape") if rng.random() < 0.8 else ())
    return rng.choice(("What size is the {}?", "How big is the {}?")).format(reference), obj.size


def _ask_count(scene: Scene, rng: random.Random):
    names = rng.choice(((), ("color",), ("shape",), ("size",), ("color", "shape")))
    attributes = {name: getattr(rng.choice(scene.objects), name) for name in names}
    if names and rng.random() < 0.15:
        attributes = _random_attributes(rng, names)
    phrase = noun_phrase(attributes, plural=True)
    question = rng.choice(("How many {} are there?", "How many {} are in the picture?", "How many {} do you see?"))
    return question.format(phrase), NUMBERS[len(_matches(scene, **attributes))]


def _random_attributes(rng: random.Random, names: tuple[str, ...]) -> dict[str, str]:
    return {name: rng.choice({"color": list(COLORS), "shape": SHAPES, "size": list(SIZES)}[name]) for name in names}


def _ask_existence(scene: Scene, rng: random.Random):
    names = rng.choice((("shape",), ("color",), ("color", "shape"), ("color", "shape"), ("size", "color", "shape")))
    wanted = rng.random() < 0.5
    for _ in range(20):
        if wanted:
            obj = rng.choice(scene.objects)
            attributes = {name: getattr(obj, name) for name in names}
        elif rng.random() < 0.6:  # attributes that are all there, but not together
            attributes = {name: getattr(rng.choice(scene.objects), name) for name in names}
        else:
            attributes = _random_attributes(rng, names)
        if bool(_matches(scene, **attributes)) == wanted:
            break
    phrase = noun_phrase(attributes)
    question = rng.choice(("Is there {} {}?", "Do you see {} {}?", "Is there {} {} in the picture?"))
    return question.format(article(phrase), phrase), "yes" if _matches(scene, **attributes) else "no"


def _ask_place(scene: Scene, rng: random.Random):
    obj = rng.choice(scene.objects)
    reference = _refer(scene, obj, rng, ("size", "color", "shape"), place=False)
    if reference is None:
        return None
    return f"Where is the {reference}?", PLACES[obj.place]


def _ask_relation(scene: Scene, rng: random.Random):
    if len(scene.objects) < 2:
        return None
    first, second = rng.sample(scene.objects, 2)
    references = [_refer(scene, obj, rng, ("size", "color", "shape"), place=False) for obj in (first, second)]
    rows, columns = zip(*(divmod(obj.place, 3) for obj in (first, second)), strict=True)
    order, words = rng.choice(((columns, ("left of", "right of")), (rows, ("above", "below"))))
    if None in references or order[0] == order[1]:
        return None
    asked = rng.randrange(2)
    side = "to the " if order is columns and rng.random() < 0.4 else ""
    question = f"Is the {references[0]} {side}{words[asked]} the {references[1]}?"
    return question, "yes" if asked == int(order[0] > order[1]) else "no"


QUESTION_TYPES: dict[str, Callable] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "size": _ask_size,
    "count": _ask_count,
    "existence": _ask_existence,
    "place": _ask_place,
    "relation": _ask_relation,
}


def ask(scene: Scene, rng: random.Random, question_type: str) -> Question | None:
    """A question of one type, or `None` if the scene has none (a relation needs two objects, for example)."""
    for _ in range(8):
        pair = QUESTION_TYPES[question_type](scene, rng)
        if pair is not None:
            return Question(question_type, *pair)
    return None


def questions(scene: Scene, rng: random.Random, n: int, weights: dict[str, float] | None = None) -> list[Question]:
    """`n` questions that the scene allows, of random types: all alike, or as often as `weights` says."""
    found: list[Question] = []
    types = list(QUESTION_TYPES)
    while len(found) < n:
        question = ask(scene, rng, rng.choices(types, [weights[t] for t in types] if weights else None)[0])
        if question is not None:
            found.append(question)
    return found


def listing(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A prompt that asks to describe the objects with some attributes, and the answer: those, as in a caption."""
    names = rng.choice((("color",), ("shape",), ("size",), ("color", "shape"), ("size", "shape"), ("size", "color")))
    attributes = {name: getattr(rng.choice(scene.objects), name) for name in names}
    if rng.random() < 0.1:
        attributes = _random_attributes(rng, names)
    found = _matches(scene, **attributes)
    phrase = noun_phrase(attributes, plural=len(found) != 1)
    return f"Describe the {phrase}.", _describe(found) if found else f"no {phrase}"


def comparison(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """A prompt that asks how two objects lie to each other, and the answer, such as "left of, above". `None` if the
    scene has no two objects that can be told apart."""
    if len(scene.objects) < 2:
        return None
    first, second = rng.sample(scene.objects, 2)
    references = [_refer(scene, obj, rng, ("size", "color", "shape"), place=False) for obj in (first, second)]
    if None in references:
        return None
    (row, column), (other_row, other_column) = divmod(first.place, 3), divmod(second.place, 3)
    sides = [("left of", "right of")[column > other_column]] if column != other_column else []
    sides += [("above", "below")[row > other_row]] if row != other_row else []
    return f"Is the {references[0]} left of, right of, above, below the {references[1]}?", ", ".join(sides)


def conversation(
    scene: Scene,
    rng: random.Random,
    captions: float = 0.15,
    listings: float = 0.0,
    comparisons: float = 0.0,
    weights: dict[str, float] | None = None,
) -> list[tuple[str, str]]:
    """Turns (prompt, answer): mostly a single question, sometimes (10 %) two or three. With probability `captions` it
    is a caption, which one or two questions may follow, with `listings` a listing, with `comparisons` a comparison.
    `weights` as for `questions`."""
    kind, turns = rng.random(), []
    if kind < captions:
        turns.append((rng.choice(CAPTION_PROMPTS), caption(scene)))
        n_questions = rng.choice((0, 0, 1, 2))
    elif kind < captions + listings:
        turns.append(listing(scene, rng))
        n_questions = 0
    elif kind < captions + listings + comparisons and (pair := comparison(scene, rng)) is not None:
        turns.append(pair)
        n_questions = 0
    else:
        n_questions = rng.randint(2, 3) if rng.random() < 0.1 else 1
    return turns + [(question.text, question.answer) for question in questions(scene, rng, n_questions, weights)]


def held_out_questions(n: int, seed: int = 0) -> Iterator[tuple[Scene, Question]]:
    """`n` questions of all types in turn, each about another scene that no training seed makes."""
    types, found = list(QUESTION_TYPES), 0
    index = HELD_OUT_SEED + seed * 1_000_000
    while found < n:
        rng = random.Random(index)
        scene, index = make_scene(rng), index + 1
        question = ask(scene, rng, types[found % len(types)])
        if question is not None:
            yield scene, question
            found += 1


def all_texts() -> list[str]:
    """Texts that together hold every word of the generator, for building a vocabulary."""
    words = [*COLORS, *SHAPES, *(f"{s}{'es' if s == 'cross' else 's'}" for s in SHAPES), *SIZES, *PLACES, *NUMBERS]
    words += ["yes", "no", "object", "objects", "a", "an", ",", "above", "below", "to the left of"]
    texts = [" ".join(words), *CAPTION_PROMPTS]
    for seed in range(500):
        rng = random.Random(seed)
        scene = make_scene(rng)
        texts += [caption(scene), *(question.text for question in questions(scene, rng, 4))]
    return texts


__all__ = [
    "COLORS",
    "HELD_OUT_SEED",
    "PLACES",
    "QUESTION_TYPES",
    "SHAPES",
    "SIZES",
    "Object",
    "Question",
    "Scene",
    "all_texts",
    "article",
    "ask",
    "caption",
    "comparison",
    "conversation",
    "draw",
    "held_out_questions",
    "listing",
    "make_background",
    "make_scene",
    "noun_phrase",
    "overlap",
    "questions",
    "shade",
]
