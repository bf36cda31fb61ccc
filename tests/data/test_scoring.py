"""Answers to many cases, and their accuracy."""

import random

import pytest
from helpers import make_model
from processor_files import write_processor
from transformers import AutoProcessor

from shortv_hf.data import scoring as evaluation
from shortv_hf.data import shapes
from shortv_hf.data.sources import Case, load_cases


pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def model_and_processor(tmp_path_factory):
    folder = write_processor(tmp_path_factory.mktemp("processor"))
    model = make_model(shortv_layers=[1, 2])
    model.generation_config.suppress_tokens = [0, 1, 2, 3, 98]
    return model, AutoProcessor.from_pretrained(folder)


def test_batched_answers_are_those_of_single_cases(model_and_processor):
    cases = list(load_cases("shapes", 5)) + [
        Case((), "what is this ?"),
        Case((shapes.draw(shapes.make_scene(random.Random(0))),) * 2, "w3"),
    ]
    together = evaluation.answer(*model_and_processor, cases, batch_size=4, max_new_tokens=4)
    apart = [evaluation.answer(*model_and_processor, [case], max_new_tokens=4)[0] for case in cases]
    assert together == apart and len(set(together)) > 2


def test_arguments_by_batch(model_and_processor):
    cases, seen = list(load_cases("shapes", 3)), []
    evaluation.answer(
        *model_and_processor,
        cases,
        batch_size=2,
        max_new_tokens=1,
        make_kwargs=lambda inputs: seen.append(inputs) or {},
    )
    assert [len(inputs["input_ids"]) for inputs in seen] == [2, 1]


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [("Two", "two", True), (" top left. ", "top left", True), ("top", "top left", False), ("", "no", False)],
)
def test_is_right(given, expected, right):
    assert evaluation.is_right(given, expected) == right


def test_accuracy_by_type():
    cases = [Case((), "", "yes", "a"), Case((), "", "no", "a"), Case((), "", "red", "b")]
    assert evaluation.accuracy(["yes", "yes", "Red"], cases) == {"overall": 2 / 3, "a": 0.5, "b": 1.0}
    with pytest.raises(ValueError, match="no answer"):
        evaluation.accuracy(["yes"], [Case((), "why?")])


def test_held_out_cases_are_the_generators():
    cases = evaluation.held_out_cases(14)
    assert [case.type for case in cases] == [*shapes.QUESTION_TYPES] * 2
    assert [case.answer for case in cases] == [question.answer for _, question in shapes.held_out_questions(14)]
