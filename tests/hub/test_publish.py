"""`shortv publish` with the real `huggingface_hub` client, in processes of its own, against a Hub on 127.0.0.1."""

import json
import os
import subprocess
import sys

import pytest
from helpers import FAMILIES, make_model
from hub_shell import ROOT, HubShell
from local_hub import LocalHub
from processor_files import write_processor
from test_base_weights import write_checkpoint

from shortv_hf.data.outputs import RECORD
from shortv_hf.hub import build_repo


pytestmark = pytest.mark.once

pytest.importorskip("typer")
TOKEN = "hf_a_secret_that_nobody_sees"
COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def server():
    with LocalHub(write_token=TOKEN) as hub:
        yield hub


@pytest.fixture
def hub(server):
    """The Hub, empty."""
    server.repos.clear()
    server.lfs.clear()
    server.requests.clear()
    server.fault = lambda method, path: None
    return server


@pytest.fixture(scope="module")
def shell(server, tmp_path_factory):
    with HubShell(server, tmp_path_factory.mktemp("home")) as run:
        yield run


@pytest.fixture
def shortv(shell):
    """Runs the command and tells on it if it shows or stores the token."""

    def run(*arguments, token=TOKEN):
        code, output, error = shell(*arguments, token=token)
        assert TOKEN not in output + error
        stored = [file for file in shell.home.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
        assert not stored
        return code, output, error

    return run


@pytest.fixture
def refused(shortv):
    """Runs `shortv publish`, which is to fail with one line; that line."""

    def run(*arguments, **options):
        code, _, error = shortv("publish", *arguments, **options)
        assert code == 1 and error.startswith("shortv: ") and len(error.splitlines()) == 1
        return error

    return run


@pytest.fixture
def repo(tmp_path):
    """A built repo that references `org/base`."""
    processor = write_processor(tmp_path / "processor")
    config = make_model(shortv_layers=[3, 1]).config
    config.base_model_name_or_path, config.base_model_revision = "org/base", COMMIT
    return build_repo(config, tmp_path / "my-shortv", processor_dir=processor)


def commits(hub):
    return [path for method, path, _ in hub.requests if "/commit/" in path and method == "POST"]


def test_plan_publish_repeat_update(hub, repo, shortv):
    code, output, _ = shortv("publish", repo, "--repo-id", "me/mine", "--private", "--dry-run")
    assert code == 0 and "create   the repo, private" in output and "nothing was changed" in output
    assert "add      config.json" in output and "add      modeling_shortv.py" in output
    assert hub.repos == {} and {method for method, _, _ in hub.requests} <= {"GET", "HEAD"}

    code, output, _ = shortv("publish", repo, "--repo-id", "me/mine", "--private")
    assert code == 0 and f"published: me/mine is at commit {hub.head('me/mine')}" in output
    assert len(commits(hub)) == 1 and hub.repos["me/mine"]["token"] == TOKEN
    published = hub.files("me/mine")
    local = {file.name: file.read_bytes() for file in repo.iterdir() if file.name != RECORD}
    assert set(published) == {*local, ".gitattributes"}
    assert all(published[name] == content for name, content in local.items() if name != "README.md")
    assert b'repo = "me/mine"' in published["README.md"] and b"ORG/" not in published["README.md"]

    code, output, _ = shortv("publish", repo, "--repo-id", "me/mine", "--private")
    assert code == 0 and "nothing to do" in output and len(commits(hub)) == 1

    (repo / "notes.txt").write_text("new\n")
    (repo / "chat_template.jinja").write_text("{{ messages }}")
    (repo / "__pycache__").mkdir()
    (repo / "__pycache__" / "x.pyc").write_text("")
    (repo / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    hub.files("me/mine")["old.txt"] = b"published by hand"
    code, output, _ = shortv("publish", repo, "--repo-id", "me/mine")
    assert code == 0 and "add      notes.txt" in output and "update   chat_template.jinja" in output
    assert "leave    old.txt" in output and "pycache" not in output and ".env" not in output
    assert len(commits(hub)) == 2 and len(hub.repos["me/mine"]["commits"]) == 3
    assert set(hub.files("me/mine")) == {*published, "notes.txt", "old.txt"}


def test_a_branch(hub, repo, shortv):
    assert shortv("publish", repo, "--repo-id", "me/mine")[0] == 0
    (repo / "notes.txt").write_text("only there\n")
    code, output, _ = shortv("publish", repo, "--repo-id", "me/mine", "--revision", "next")
    assert code == 0 and "create   the branch" in output and "add      notes.txt" in output
    assert "notes.txt" in hub.files("me/mine", "next") and "notes.txt" not in hub.files("me/mine")

    code, output, _ = shortv("publish", repo, "--repo-id", "me/new", "--revision", "next")
    assert code == 0 and "notes.txt" in hub.files("me/new", "next") and set(hub.files("me/new")) == {".gitattributes"}


def test_does_not_write_over_what_came_in_between(hub, repo, shortv):
    assert shortv("publish", repo, "--repo-id", "me/mine")[0] == 0

    def somebody_else(method, path):
        if "/preupload/" in path:
            hub.add_commit("me/mine", "main", {**hub.files("me/mine"), "theirs.txt": b"theirs"})

    hub.fault = somebody_else
    (repo / "theirs.txt").write_text("ours")
    code, _, error = shortv("publish", repo, "--repo-id", "me/mine")
    assert code == 1 and "HTTP 412, A commit has happened since" in error
    assert hub.files("me/mine")["theirs.txt"] == b"theirs"


def test_goes_on_after_a_broken_upload(hub, shortv, tmp_path):
    base = write_checkpoint(tmp_path / "base", make_model(), shards=3)
    config = FAMILIES["llava"][0].from_pretrained(base, shortv_layers=[1])
    repo = build_repo(config, tmp_path / "repo", weights_dir=base)
    uploads = []

    def break_the_second(method, path):
        if method == "PUT":
            uploads.append(path)
            return 403 if len(uploads) == 2 else None

    hub.fault = break_the_second
    code, _, error = shortv("publish", repo, "--repo-id", "me/mine")
    assert code == 1 and len(error.splitlines()) == 1
    assert "broke off" in error and "403" in error and "goes on where it stopped" in error
    assert set(hub.files("me/mine")) == {".gitattributes"}  # nothing half-published
    arrived = len(hub.lfs)
    assert 0 < arrived < 3

    uploads.clear()
    hub.fault = lambda method, path: uploads.append(path) if method == "PUT" else None
    code, output, _ = shortv("publish", repo, "--repo-id", "me/mine")
    assert code == 0 and "published" in output and len(uploads) == 3 - arrived
    weights = {file.name: file.read_bytes() for file in base.glob("*.safetensors")}
    assert weights.items() <= hub.files("me/mine").items()


def test_refusals_of_the_hub(hub, repo, refused, shortv):
    assert "there is no token" in refused(repo, "--repo-id", "me/mine", token=None)
    wrong = refused(repo, "--repo-id", "me/mine", token="hf_wrong")
    assert "publishing to me/mine broke off: HTTP 401, Invalid user token. The" in wrong and "hf_wrong" not in wrong
    assert hub.repos == {}
    hub.commit("me/mine", repo)
    assert "exists and is public" in refused(repo, "--repo-id", "me/mine", "--private")
    hub.fault = lambda method, path: 500 if method == "GET" else None
    assert "cannot look at me/mine: HTTP 500" in refused(repo, "--repo-id", "me/mine")
    code, output, _ = shortv("publish", repo, "--repo-id", "me/mine", "--dry-run")
    assert code == 0 and "unknown  what is there already: cannot look at me/mine: HTTP 500" in output
    assert "add      config.json" in output and "dry run: nothing was changed" in output


def test_a_hub_that_does_not_answer(hub, repo, shortv):
    hub.fault = lambda method, path: 0
    for command in (["publish", repo, "--repo-id", "me/mine"], ["check-repo", "me/mine"]):
        code, _, error = shortv(*command)
        assert code == 1 and len(error.splitlines()) == 1 and "me/mine" in error


def test_refuses_what_strangers_cannot_load_or_trust(hub, repo, refused, tmp_path):
    assert "no such directory" in refused(tmp_path / "nothing", "--repo-id", "me/mine")
    assert "owner/name" in refused(repo, "--repo-id", "mine")
    code_file = repo / "plan.py"
    code_file.write_text(code_file.read_text() + "import os\n")
    assert "plan.py differs from shortv_hf" in refused(repo, "--repo-id", "me/mine")
    local = build_repo(FAMILIES["llava"][0].from_pretrained(
        write_checkpoint(tmp_path / "base", make_model())), tmp_path / "local")  # fmt: skip
    assert "not a repo on the Hub" in refused(local, "--repo-id", "me/mine")
    config = json.loads((local / "config.json").read_text())
    config |= {"base_model_name_or_path": "org/base", "base_model_revision": "main"}
    (local / "config.json").write_text(json.dumps(config))
    assert "not pinned to a commit" in refused(local, "--repo-id", "me/mine")
    assert hub.repos == {}


SPACE = ROOT / "hub_configs" / "space-shortv-demo"


def test_a_space_goes_with_the_package_and_the_demonstration_model(hub, shortv, tmp_path):
    arguments = ("publish", SPACE, "--space", "--repo-id", "me/demo")
    code, output, _ = shortv(*arguments, "--dry-run")
    assert code == 0 and "/spaces/me/demo, branch main" in output and "add      app.py" in output and hub.repos == {}
    code, output, _ = shortv(*arguments)
    assert (
        code == 0 and f"is at commit {hub.head('spaces/me/demo')}" in output and list(hub.repos) == ["spaces/me/demo"]
    )
    published = hub.files("spaces/me/demo")
    for name in ("README.md", "app.py", "requirements.txt"):
        assert published[name] == (SPACE / name).read_bytes()
    assert published["shortv_hf/plan.py"] == (ROOT / "shortv_hf" / "plan.py").read_bytes()
    assert not [name for name in published if "__pycache__" in name or "/." in name]
    code, output, _ = shortv(*arguments)
    assert code == 0 and "nothing to do" in output and len(commits(hub)) == 1

    for name, content in published.items():  # what the Hub has runs by itself
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    code = "from shortv_hf.hub.loading import demo_model, load; print(demo_model()); load(demo_model())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True
    )
    assert done.stdout.strip() == str(tmp_path / "shortv_hf" / "demo"), done.stderr


def clean_environment():
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONSAFEPATH": ""}


def test_what_is_no_space(hub, repo, refused, tmp_path):
    assert "is no Space: app.py, requirements.txt are missing" in refused(repo, "--space", "--repo-id", "me/demo")
    for name in ("README.md", "app.py", "requirements.txt"):
        (tmp_path / name).write_text("# ShortV\n---\nsdk: gradio\n---\n")
    assert "does not begin with metadata" in refused(tmp_path, "--space", "--repo-id", "me/demo")
    assert hub.repos == {}
