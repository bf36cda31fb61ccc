"""`shortv demo`, up to where the page is served."""

import sys

import pytest
from helpers import make_model
from processor_files import write_processor


testing = pytest.importorskip("typer.testing")
from shortv_hf import cli  # noqa: E402


@pytest.fixture
def repo(tmp_path):
    make_model(shortv_layers=[3, 1]).save_pretrained(tmp_path / "tiny")
    return write_processor(tmp_path / "tiny")


def invoke(*arguments):
    return testing.CliRunner().invoke(cli.app, ["demo", *map(str, arguments)])


def test_without_gradio_it_says_what_to_install(repo, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "shortv_hf.web.app", raising=False)
    monkeypatch.setattr("shortv_hf.web.shared.load_shared", lambda *_: pytest.fail("the weights were loaded"))
    error = invoke(repo).exception
    assert isinstance(error, ValueError) and "pip install '.[cli,demo]'" in str(error) and "\n" not in str(error)


@pytest.fixture
def served(monkeypatch):
    """What would be served: host, port, the sessions."""
    pytest.importorskip("gradio")
    from shortv_hf.web import app

    found, build = {}, app.build

    def note(sessions, is_demonstration_model):
        found.update(sessions=sessions, is_demonstration_model=is_demonstration_model)
        return build(sessions, is_demonstration_model)

    monkeypatch.setattr(app, "build", note)
    monkeypatch.setattr(app, "serve", lambda page, host, port: found.update(page=page, host=host, port=port))
    return found


def test_defaults_are_local(served, repo):
    assert invoke(repo).exit_code == 0
    assert served["host"] == "127.0.0.1" and served["port"] is None and not served["is_demonstration_model"]
    assert served["sessions"].shared.start.layers == (3, 1) and served["sessions"].shared.name == "tiny"


def test_options(served, repo):
    arguments = (
        "--layers", "2,0", "--reduction", "vtw:k=2", "--port", 8000, "--host", "0.0.0.0", "--max-new-tokens", 7
    )  # fmt: skip
    assert invoke(repo, *arguments).exit_code == 0
    shared = served["sessions"].shared
    assert shared.order == [2, 0] and shared.start.reduction == {"method": "vtw", "k": 2}
    assert (served["host"], served["port"], served["sessions"].max_new_tokens) == ("0.0.0.0", 8000, 7)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--layers", "9"], "9"), (["--reduction", "vtw:k=77"], "k is 77"), (["--layers", "x"], "x")],
)
def test_bad_settings_are_said_before_the_page_is_there(served, repo, arguments, said):
    result = invoke(repo, *arguments)
    assert isinstance(result.exception, ValueError) and said in str(result.exception) and served == {}


def test_the_page_asks_nobody_and_shows_text(served, repo):
    """Analytics are off, nothing is open as an API, and the chat is no Markdown."""
    invoke(repo)
    config = served["page"].get_config_file()
    assert config["analytics_enabled"] is False
    assert "public" not in {each["api_visibility"] for each in config["dependencies"]}
    (chat,) = (each["props"] for each in config["components"] if each["type"] == "chatbot")
    assert chat["render_markdown"] is False and chat["sanitize_html"] is True and chat["buttons"] == []
