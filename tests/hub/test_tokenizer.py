"""A repo's tokenizer cuts text as its base's does, although upstream does not know the repo's model type."""

import json

import pytest
from helpers import FAMILIES, make_model
from processor_files import write_processor
from test_base_weights import write_checkpoint
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.auto import tokenization_auto

from shortv_hf.hub import build_repo
from shortv_hf.hub.trial import TEXTS


IGNORED = getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", None)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def same_ids(repo, base):
    ours, theirs = AutoTokenizer.from_pretrained(repo), AutoTokenizer.from_pretrained(base)
    processors = AutoProcessor.from_pretrained(repo), AutoProcessor.from_pretrained(base)
    for text in TEXTS:
        expected = theirs(text)
        assert dict(ours(text)) == dict(expected), text
        for processor in processors:
            assert processor.tokenizer(text)["input_ids"] == expected["input_ids"], text
    return True


@pytest.mark.parametrize("tokenizer", ["words", "prepend", "bytes"])
def test_built_repo(family, tokenizer, tmp_path):
    base = write_processor(write_checkpoint(tmp_path / "base", make_model(family)), family, tokenizer)
    config = FAMILIES[family][0].from_pretrained(base, shortv_layers=[1])
    repo = build_repo(config, tmp_path / "repo", processor_dir=base)
    assert same_ids(repo, base)
    declared = json.loads((repo / "tokenizer_config.json").read_text())
    assert declared["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (repo / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_repo_that_declares_what_its_base_does(family, tmp_path):
    """As repos built before 0.2.0 do. With the package, or with the code that the repo carries, it is read as the base."""
    base = write_processor(write_checkpoint(tmp_path / "base", make_model(family)), family, "prepend")
    config = FAMILIES[family][0].from_pretrained(base, shortv_layers=[1])
    repo = build_repo(config, tmp_path / "repo", processor_dir=base)
    (repo / "tokenizer_config.json").write_bytes((base / "tokenizer_config.json").read_bytes())
    assert same_ids(repo, base)


@pytest.mark.skipif(IGNORED is None, reason="this version believes every tokenizer_class")
def test_what_upstream_ignores(family):
    config_class = FAMILIES[family][0]
    assert config_class.tokenizer_is_the_file == (config_class.base_model_type in IGNORED)
    assert (config_class.model_type in IGNORED) == (config_class.base_model_type in IGNORED)
