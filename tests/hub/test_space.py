"""The Space's folder: versions that are pinned as they were tested, an app that starts the page."""

import re
import runpy
from pathlib import Path

import pytest

from shortv_hf.hub.loading import demo_model
from shortv_hf.hub.space import check_space


pytestmark = pytest.mark.once
ROOT = Path(__file__).parents[2]
SPACE = ROOT / "hub_configs" / "space-shortv-demo"


def versions(file: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)$", file.read_text(), re.M))


def test_versions_are_the_tested_ones():
    wanted, tested = versions(SPACE / "requirements.txt"), versions(ROOT / "tests" / "constraints-demo.txt")
    assert wanted.items() <= tested.items() and {"gradio", "torch", "transformers"} <= set(wanted)
    metadata = dict(re.findall(r"^(\w+): (.*)$", (SPACE / "README.md").read_text(), re.M))
    assert metadata["sdk_version"] == wanted["gradio"]
    check_space(SPACE)


def test_both_files_of_constraints_agree_but_for_what_gradio_does_not_take():
    one, other = (versions(ROOT / "tests" / name) for name in ("constraints.txt", "constraints-demo.txt"))
    assert {name for name in one.keys() & other.keys() if one[name] != other[name]} == {"pillow"}


@pytest.mark.parametrize(("model", "dtype"), [(None, "float32"), ("me/other", "auto")])
def test_the_app_starts_the_page(monkeypatch, model, dtype):
    command = pytest.importorskip("shortv_hf.web.command")
    asked = []
    monkeypatch.setattr(command, "demo", lambda *arguments, **options: asked.append((arguments, options)))
    monkeypatch.delenv("SHORTV_MODEL", raising=False)
    if model:
        monkeypatch.setenv("SHORTV_MODEL", model)
    runpy.run_path(str(SPACE / "app.py"))
    assert asked == [((model,), {"host": "0.0.0.0", "port": 7860, "dtype": dtype})]
    assert Path(demo_model()).is_dir()
