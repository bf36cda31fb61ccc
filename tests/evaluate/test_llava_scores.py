"""POPE's and GQA's published rules, against cases that were worked out by hand."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortv_hf.evaluate.llava_scores import PopeScore, pope_score, says_no, score_gqa, score_pope


pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("text", "no"),
    [
        ("No", True),
        ("no", True),
        ("No.", True),
        ("No, there is not.", True),
        ("It is not there", True),
        ("There is no dog. Yes", True),
        ("Yes", False),
        ("yes. No", False),  # only what is before the first full stop counts
        (".no", False),
        ("NO", False),  # not one of the words
        ("nothing", False),
        ("No!", False),
        ("No\nidea", False),  # words are parted by spaces only
        ("Yes,no", False),  # commas go, and leave one word
        ("", False),
        ("I don't know", False),
    ],
)
def test_says_no(text, no):
    assert says_no(text) == no


def test_pope_score():
    """3 right yes, 1 wrong yes, 2 right no, 2 wrong no."""
    texts = ["Yes", "a dog", "", "Yes, it is.", "No", "no.", "It is not", "No, none"]
    score = pope_score(texts, ["yes", "yes", "yes", "no", "no", "no", "yes", "yes"])
    assert score == PopeScore(tp=3, fp=1, tn=2, fn=2) and score.total == 8
    assert score.accuracy == 5 / 8 and score.precision == 3 / 4 and score.recall == 3 / 5 and score.yes_ratio == 1 / 2
    assert score.f1 == pytest.approx(2 * 0.75 * 0.6 / 1.35)


@pytest.mark.parametrize(
    ("texts", "labels", "precision", "recall", "f1"),
    [
        (["no", "no"], ["yes", "no"], None, 0, None),  # no answer is yes
        (["yes", "no"], ["no", "no"], 0, None, None),  # no label is
        (["yes", "no"], ["no", "yes"], 0, 0, None),  # no yes is right
        (["yes", "no"], ["yes", "no"], 1, 1, 1),
        ([], [], None, None, None),
    ],
)
def test_shares_that_divide_by_zero(texts, labels, precision, recall, f1):
    score = pope_score(texts, labels)
    assert (score.precision, score.recall, score.f1) == (precision, recall, f1)


@given(st.lists(st.tuples(st.sampled_from(["yes", "no", "No.", ""]), st.sampled_from(["yes", "no"])), min_size=1))
def test_against_llavas_arithmetic(pairs):
    score = pope_score([text for text, _ in pairs], [label for _, label in pairs])
    said = [text in ("yes", "") for text, _ in pairs]
    right = [label == "yes" for _, label in pairs]
    tp = sum(a and b for a, b in zip(said, right, strict=True))
    assert score.accuracy == sum(a == b for a, b in zip(said, right, strict=True)) / len(pairs)
    assert score.yes_ratio == sum(said) / len(pairs)
    if tp:
        precision, recall = tp / sum(said), tp / sum(right)
        assert (score.precision, score.recall) == (precision, recall)
        assert score.f1 == pytest.approx(2 * precision * recall / (precision + recall))


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def pope(tmp_path):
    """Five answers of two categories, mixed, and their labels, whose ids are others."""
    categories = ["random", "popular", "random", "popular", "random"]
    texts = ["Yes", "Yes", "No", "No", "No"]
    questions = [{"question_id": 10 + i, "category": category} for i, category in enumerate(categories)]
    answers = [{"question_id": 10 + i, "text": text} for i, text in enumerate(texts)]
    labels = tmp_path / "coco"
    labels.mkdir()
    for category, right in {"random": ["yes", "no", "yes"], "popular": ["no", "no"]}.items():
        write_lines(labels / f"coco_pope_{category}.json", [{"question_id": 1, "label": label} for label in right])
    return write_lines(tmp_path / "a.jsonl", answers), write_lines(tmp_path / "q.jsonl", questions), labels


def test_score_pope(pope):
    """By category and by order, not by id."""
    scores = score_pope(*pope)
    assert list(scores) == ["popular", "random", "all"]
    assert scores["random"] == PopeScore(tp=1, tn=1, fn=1) and scores["popular"] == PopeScore(fp=1, tn=1)
    assert scores["all"] == PopeScore(tp=1, fp=1, tn=2, fn=1) and scores["all"].accuracy == 3 / 5


def test_the_order_decides(pope):
    answers, *others = pope
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join([lines[2], lines[1], lines[0], *lines[3:]]))
    assert score_pope(answers, *others)["random"] == PopeScore(fp=1, fn=2)


def test_answers_to_other_texts_of_the_same_ids_are_refused(pope, tmp_path):
    answers, questions, labels = pope
    other = tmp_path / "other.jsonl"
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    other.write_text("\n".join(json.dumps({**row, "text": row.get("text", "") + "!"}) for row in rows))
    told = tmp_path / "told.jsonl"
    by_id = {row["question_id"]: row.get("text", "") for row in rows}
    given = [json.loads(line) for line in answers.read_text().splitlines()]
    told.write_text("\n".join(json.dumps({**row, "prompt": by_id[row["question_id"]]}) for row in given))
    assert score_pope(told, questions, labels) == score_pope(*pope)
    with pytest.raises(ValueError, match="the texts differ"):
        score_pope(told, other, labels)


def test_pope_refuses(pope, tmp_path):
    answers, questions, labels = pope
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:-1]))
    with pytest.raises(
        ValueError, match="a.jsonl has 2 answers of category 'random', and .*coco_pope_random.json has 3"
    ):
        score_pope(answers, questions, labels)
    answers.write_text("".join(lines))
    (labels / "coco_pope_popular.json").rename(tmp_path / "popular.json")
    with pytest.raises(ValueError, match="a.jsonl, line 2: question 11 has category 'popular', of which .* no labels"):
        score_pope(answers, questions, labels)
    (labels / "coco_pope_popular.json").write_text('{"label": "No"}\n')
    with pytest.raises(ValueError, match="popular.json, line 1: \"label\" is 'No', neither"):
        score_pope(answers, questions, labels)
    with pytest.raises(ValueError, match="there is no coco_pope_CATEGORY.json in .*labels"):
        score_pope(answers, questions, tmp_path)
    answers.write_text('{"question_id": 9, "text": "Yes"}')
    with pytest.raises(ValueError, match="a.jsonl, line 1: question 9 is not in .*q.jsonl"):
        score_pope(answers, questions, labels)
    answers.write_text('{"question_id": 9}')
    with pytest.raises(ValueError, match="a.jsonl, line 1: it is no answer such as"):
        score_pope(answers, questions, labels)
    with pytest.raises(ValueError, match="cannot read .*no.jsonl: No such file"):
        score_pope(tmp_path / "no.jsonl", questions, labels)


GQA = {
    "1": ("yes", "Yes.", True),
    "2": ("dog", "dog...", True),
    "3": ("dog", "dog ", False),  # spaces stay
    "4": ("dog", "a dog", False),
    "5": ("t-shirt", "T-Shirt", True),
    "6": ("dog", "dog,", False),  # lmms-eval removes all punctuation
    "7": ("", "", True),
}


def test_score_gqa(tmp_path):
    labels = {id: {"answer": answer, "isBalanced": True} for id, (answer, _, _) in GQA.items()}
    labels["8"] = {"answer": "x", "isBalanced": False}  # counts no more than an answer to none of the questions
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    rows = [{"question_id": id, "text": text} for id, (_, text, _) in GQA.items()]
    answers = write_lines(tmp_path / "a.jsonl", [*rows, {"question_id": 9, "text": "y"}])
    assert (
        score_gqa(answers, tmp_path / "labels.json") == (4, 7) == (sum(right for *_, right in GQA.values()), len(GQA))
    )
    write_lines(answers, rows[:-2])
    with pytest.raises(ValueError, match="a.jsonl has no answer to 2 of 7 questions, such as 6"):
        score_gqa(answers, tmp_path / "labels.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is no JSON object of questions with their answers"),
        ('{"1": {}}', "is no JSON object of questions with their answers"),
        ("{", "it is no JSON"),
        ("{}", "holds no balanced questions"),
    ],
)
def test_gqa_refuses_labels(tmp_path, content, message):
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ValueError, match=f"labels.json.*{message}"):
        score_gqa(write_lines(tmp_path / "a.jsonl", []), tmp_path / "labels.json")
