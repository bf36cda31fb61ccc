"""What `shortv check-repo` finds in the files of a repo, and that it runs no code that is not the package's."""

import json

import pytest
from helpers import FAMILIES, make_config, make_inputs, make_model
from PIL import Image
from processor_files import write_processor
from test_base_weights import write_checkpoint

from shortv_hf.hub import build_repo
from shortv_hf.hub.check import _try, check_files, check_repo
from shortv_hf.layer_contribution import LayerRanking, rank_layers


@pytest.fixture
def repo(tmp_path):
    config = make_config(shortv_layers=[3, 1])
    config.base_model_name_or_path, config.base_model_revision = "org/base", "0123456789" * 4
    return build_repo(config, tmp_path / "repo")


def problems(folder):
    return {check.name: check.problem for check in check_files(folder) if check.problem}


def edit_config(repo, **fields):
    config = json.loads((repo / "config.json").read_text())
    (repo / "config.json").write_text(json.dumps({**config, **fields}))


def test_a_built_repo_is_in_order(repo):
    checks = check_files(repo)
    assert not problems(repo)
    assert [check.name for check in checks] == ["config", "base", "code files", "imports", "other code"]
    assert "shortv_llava, 2 of 4 layers frozen: [3, 1]" in str(checks[0]) and "org/base at 0123456789" in str(
        checks[1]
    )


@pytest.mark.parametrize(
    ("fields", "name", "message"),
    [
        ({"model_type": "llava"}, "config", "model_type is 'llava', which is not ShortV's"),
        ({"shortv_layers": [9]}, "config", "shortv_layers holds 9, which is out of range"),
        ({"auto_map": {"AutoConfig": "other/repo--code.Config"}}, "config", "auto_map does not name ShortV's classes"),
        ({"base_model_revision": "main"}, "base", "not pinned to a commit: base_model_revision is 'main'"),
        ({"base_model_name_or_path": "/home/me/llava"}, "base", "which is not a repo on the Hub"),
        ({"base_model_name_or_path": None}, "base", "references no base checkpoint, and holds no safetensors"),
    ],
    ids=str,
)
def test_config(repo, fields, name, message):
    edit_config(repo, **fields)
    assert message in problems(repo)[name]


def test_code(repo):
    code = repo / "decoder_layer.py"
    original = code.read_text()
    code.write_text(original + "\nimport numpy.linalg\n")
    assert problems(repo)["imports"] == "code imports numpy"
    assert problems(repo)["code files"].startswith("decoder_layer.py differs from shortv_hf ")
    code.write_text(original)
    (repo / "upstream.py").rename(repo / "freezing.py")  # what code of 0.1 lacked
    assert problems(repo)["code files"].startswith("upstream.py is missing; freezing.py is not ShortV's")
    assert problems(repo)["code files"].endswith("wrong answers without an error): build the repo again")
    (repo / "freezing.py").rename(repo / "upstream.py")
    (repo / "extra.py").write_text("from ..elsewhere import x\n")
    assert problems(repo) == {"code files": "extra.py is not ShortV's", "imports": "extra.py imports from ..elsewhere"}
    (repo / "extra.py").write_text("def broken(:\n")
    assert "invalid syntax" in problems(repo)["imports"]
    (repo / "extra.py").unlink()
    code.unlink()
    assert problems(repo)["code files"] == "decoder_layer.py is missing"


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_code_that_other_files_name_is_refused(repo, tmp_path, file):
    """`trust_remote_code=True` would run it, wherever it is: here, and when a repo is built from such a checkpoint."""
    content = json.loads((repo / file).read_text()) if (repo / file).is_file() else {}
    (repo / file).write_text(json.dumps({**content, "auto_map": {"AutoProcessor": "other/repo--code.Processor"}}))
    assert f"{file} names code to run: auto_map" in problems(repo)["other code"]
    with pytest.raises(ValueError, match=f"{file} names code to run"):
        build_repo(make_config(shortv_layers=[1]), tmp_path / "again", repo)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "fields", [{"_attn_implementation": "other/kernel"}, {"text_config": {"auto_map": {"A": "b"}}}]
)
def test_code_in_the_config_is_refused(repo, fields):
    config = json.loads((repo / "config.json").read_text())
    nested = {
        name: {**config.get(name, {}), **value} if isinstance(value, dict) else value for name, value in fields.items()
    }
    edit_config(repo, **nested)
    assert "config.json names code to run" in problems(repo)["other code"]


def test_weights_beside_a_reference_are_refused(repo):
    (repo / "model.safetensors").write_bytes(b"")
    assert "holds some itself: model.safetensors" in problems(repo)["base"]
    (repo / "pytorch_model.bin").write_bytes(b"")
    assert "not safetensors: pytorch_model.bin" in problems(repo)["base"]


def test_malformed_config(repo):
    (repo / "config.json").write_text("[]")
    assert {"config", "base"} <= problems(repo).keys()


def test_changed_code_is_not_run(tmp_path):
    repo = tmp_path / "repo"
    make_model().save_pretrained(repo)
    write_processor(repo)
    ran = tmp_path / "ran"
    code = repo / "configuration_shortv.py"
    code.write_text(f"open({str(ran)!r}, 'w')\n" + code.read_text())
    checks = check_repo(str(repo))
    assert [check.name for check in checks if check.problem] == ["code files"]
    assert not ran.exists()


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    assert problems(tmp_path / "empty")["config"] == "there is no config.json"
    with pytest.raises(ValueError, match="no such directory"):
        check_repo(str(tmp_path / "missing"))


TRIAL = ["loads in a fresh process", "weights", "tokenizer", "text-only prompt", "image prompt"]


@pytest.mark.parametrize("tokenizer", ["words", "prepend"])
def test_trial_of_a_self_contained_repo(tmp_path, tokenizer):
    base = write_processor(write_checkpoint(tmp_path / "base", make_model()), tokenizer=tokenizer)
    config = FAMILIES["llava"][0].from_pretrained(base, shortv_layers=[1])
    repo = build_repo(config, tmp_path / "repo", processor_dir=base, weights_dir=base)
    checks = check_repo(str(repo))
    assert [str(check) for check in checks if check.problem] == []
    assert [check.name for check in checks][6:] == TRIAL
    assert "none missing" in checks[7].note and "12 texts, the same ids" in checks[8].note
    assert "8 out, equal with and without a cache" in checks[10].note


def trial_of(tmp_path, edit, **fields):
    """What the trial finds in a repo that references a local base, after `edit(repo)`."""
    base = write_processor(write_checkpoint(tmp_path / "base", make_model()), tokenizer="prepend")
    config = FAMILIES["llava"][0].from_pretrained(base, shortv_layers=[1, 2], **fields)
    repo = build_repo(config, tmp_path / "repo", processor_dir=base)
    edit(repo)
    return _try(str(repo), None, "cpu")


def test_trial_under_a_method_that_looks_at_the_last_token(tmp_path):
    checks = trial_of(tmp_path, lambda repo: None, visual_reduction={"method": "fastv", "k": 2})
    assert [check.name for check in checks] == TRIAL and not [check for check in checks if check.problem]
    assert checks[-1].note.endswith("equal with and without a cache, fastv off")


def test_trial_finds_other_tokens(tmp_path):
    def without_normalizer(repo):
        content = json.loads((repo / "tokenizer.json").read_text())
        (repo / "tokenizer.json").write_text(json.dumps({**content, "normalizer": None}))

    last = trial_of(tmp_path, without_normalizer)[-1]
    assert last.name == "tokenizer" and "the repo cuts 'What is this?' into [" in last.problem


@pytest.mark.parametrize(
    ("stored", "problem"),
    [("", "has seen 0 tokens after a pass"), ("update_cache(cache, key, value * 0, *more)", "other logits")],
    ids=["stores nothing", "stores something else"],
)
def test_trial_finds_wrong_decoding(tmp_path, stored, problem):
    def damage(repo):
        code = (repo / "decoder_layer.py").read_text()
        old, new = "key, value = update_cache(", "key, value = own_rows("
        assert old in code
        own_rows = f"def own_rows(cache, key, value, *more):\n    {stored}\n    return key, value\n"
        (repo / "decoder_layer.py").write_text(f"{code.replace(old, new)}\n\n{own_rows}")

    last = trial_of(tmp_path, damage)[-1]
    assert last.name == "image prompt" and problem in last.problem


class TestRanking:
    """Where the layers come from travels with the repo."""

    @pytest.fixture(scope="class")
    def ranking(self):
        model = make_model()
        return rank_layers(model, [make_inputs(model, ["tItt", "ttIt"])], kl="reverse", data="two made-up questions")

    @pytest.fixture
    def repo(self, tmp_path, ranking):
        config = make_config(shortv_layers=ranking.layers(2))
        config.base_model_name_or_path, config.base_model_revision = "org/base", "0123456789" * 4
        return build_repo(config, tmp_path / "repo", ranking=ranking)

    def test_is_in_the_repo_and_on_its_card(self, repo, ranking):
        assert LayerRanking.load(repo / "ranking.json") == ranking
        card = (repo / "README.md").read_text()
        for fact in (
            "Layer Contribution, KL reverse", "two made-up questions", ranking.data["sha256"], "seed: 0", "samples: 2,",
            f"transformers: `{ranking.versions['transformers']}`", "torch: `", "float32",
            f"Frozen layers and their scores: {ranking.order[0]} (", "![Score of each decoder layer](layer_scores.png)",
        ):  # fmt: skip
            assert fact in card, fact
        with Image.open(repo / "layer_scores.png") as picture:
            assert picture.width > 500
        (verdict,) = [check for check in check_files(repo) if check.name == "ranking"]
        assert not problems(repo) and "layers by lc, 2 samples (two made-up questions)" in str(verdict)

    def test_other_layers_than_the_ranking_says(self, repo, ranking):
        wrong = ranking.order[1::-1]
        edit_config(repo, shortv_layers=wrong)
        assert f"the config freezes layers {wrong}; the first 2 of the ranking are" in problems(repo)["ranking"]
        (repo / "ranking.json").write_text("{}")
        assert "is not a saved LayerRanking" in problems(repo)["ranking"]

    def test_a_repo_with_other_layers_is_not_built(self, tmp_path, ranking):
        with pytest.raises(ValueError, match="the first 2 of the ranking are"):
            build_repo(make_config(shortv_layers=ranking.order[1:3]), tmp_path / "repo", ranking=ranking)
        assert not (tmp_path / "repo").exists()

    def test_a_repo_that_is_built_again_without_it(self, repo):
        """What it no longer needs goes."""
        config = make_config(shortv_layers=[0])
        config.base_model_name_or_path, config.base_model_revision = "org/base", "0123456789" * 4
        build_repo(config, repo)
        assert not {"ranking.json", "layer_scores.png"} & {file.name for file in repo.iterdir()} and not problems(repo)

    def test_without_matplotlib_there_is_no_picture(self, tmp_path, ranking, monkeypatch):
        monkeypatch.setattr("shortv_hf.pictures.plots.can_draw", lambda: False)
        repo = build_repo(make_config(shortv_layers=ranking.layers(1)), tmp_path / "repo", ranking=ranking)
        assert (repo / "ranking.json").is_file() and not (repo / "layer_scores.png").exists()
        assert "layer_scores.png" not in (repo / "README.md").read_text()
