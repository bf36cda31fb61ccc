"""A tiny model to share."""

import pytest
from helpers import make_model
from PIL import Image
from processor_files import write_processor

from shortv_hf.web.shared import load_shared


@pytest.fixture
def repo(tmp_path):
    model = make_model(shortv_layers=[3, 1])
    model.generation_config.suppress_tokens = [0, 1, 2, 3, 98]
    model.save_pretrained(tmp_path / "repo")
    write_processor(tmp_path / "repo")
    return tmp_path / "repo"


@pytest.fixture
def shared(repo):
    return load_shared(str(repo), "tiny")


@pytest.fixture
def picture():
    return Image.linear_gradient("L").resize((20, 14)).convert("RGB")
