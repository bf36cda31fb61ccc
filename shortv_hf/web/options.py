"""What the page offers of each method of token reduction: its options, where they start, and which of them are sliders."""

import json
from dataclasses import dataclass, fields
from typing import Any

from ..configuration_shortv import validate_visual_reduction
from ..flops.equations import visual_tokens_of
from ..reduction import METHODS, ModelSizes, Reduction


NONE = "none"
ABOUT = {
    NONE: "All visual tokens stay. In frozen layers they are not computed.",
    "fastv": "From layer k on, the share `ratio` of the visual tokens is dropped: those that the question attends to least.",
    "illava": "Patches are merged in the vision tower's layers vit_k, tokens in the decoder's layers llm_k.",
    "vtw": "From layer k on, there is no visual token at all.",
    "vtc_cls": "Only the token_num patches that the vision tower itself attends to most reach the decoder.",
    "prumerge": "Patches that stand out stay, with their neighbours merged into them.",
    "prumerge_plus": "As prumerge, and patches on a regular grid stay too.",
    "random": "A baseline: token_num random patches stay.",
    "downsample": "A baseline: squares of factor x factor patches are averaged.",
}


@dataclass(frozen=True)
class Option:
    """An option of a method, as a control of the page.

    Attributes:
        value: where it starts, for this model.
        low, high: the range of a slider; `None`: the option is a field of text, which [`read`] reads.
        step: of the slider.
    """

    name: str
    value: Any
    low: float | None = None
    high: float | None = None
    step: float | None = None

    @property
    def text(self) -> str:
        """The value as a field shows it."""
        return "" if self.value is None else self.value if isinstance(self.value, str) else json.dumps(self.value)


def options_of(name: str, config: Any, given: dict | None = None) -> list[Option]:
    """The controls of a method for a model, with the `given` options instead of the start's, if they are this method's.

    What `Reduction.candidates` varies is a slider between its ends.
    """
    method, sizes = METHODS[name], ModelSizes.of(config)
    start = given if given is not None and given["method"] == name else start_of(name, config)
    values = {field.name: start.get(field.name, field.default) for field in fields(method)}  # type: ignore[arg-type]
    found = []
    for option, value in values.items():
        value = list(value) if isinstance(value, tuple) else value
        tried = {each[option] for each in _candidates(method, sizes, config) if _is_number(each.get(option))}
        if len(tried) > 1 and _is_number(value):
            whole = all(isinstance(each, int) for each in tried)
            low, high = min(*tried, value), max(*tried, value)
            found.append(Option(option, value, low if whole else round(low, 2), high, 1 if whole else 0.01))
        else:
            found.append(Option(option, value))
    return found


def start_of(name: str, config: Any) -> dict[str, Any]:
    """Options to begin with: the method's own where the model can have them, else the middle one of its candidates."""
    method, sizes = METHODS[name], ModelSizes.of(config)
    own = {field.name: field.default for field in fields(method)}  # type: ignore[arg-type]  # methods are dataclasses
    start = {**own, **method.defaults(config)}
    candidates = _candidates(method, sizes, config)
    middle = {"method": name, **candidates[len(candidates) // 2]}
    for options in (start, middle):
        try:
            return validate_visual_reduction(options, config) or start
        except ValueError:
            pass
    return start  # this model cannot have the method, and says so when it is chosen


def _candidates(method: type[Reduction], sizes: ModelSizes, config: Any) -> list[dict[str, Any]]:
    return method.candidates(sizes, visual_tokens_of(config))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read(name: str, values: dict[str, Any]) -> dict[str, Any] | None:
    """`config.visual_reduction` from a method's name and what its controls hold: numbers, or text in JSON, quotes left out at
    will. Empty fields leave the option to the method. Whether a model can have it is not checked."""
    if name == NONE:
        return None
    options: dict[str, Any] = {"method": name}
    for option, value in values.items():
        if isinstance(value, str):
            if not value.strip():
                continue
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                value = value.strip()
        if value is not None:
            options[option] = int(value) if isinstance(value, float) and value.is_integer() and value > 1 else value
    return options
