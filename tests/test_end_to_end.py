"""From an original checkpoint to a stranger's answer, over HTTP: upload the base, build, check and publish a ShortV repo,
load it in clean processes; and what each thing that can go wrong says."""

import json
import os
import subprocess
import sys

import pytest
from helpers import make_model
from hub_shell import HubShell, hub_environment
from local_hub import LocalHub
from processor_files import write_processor
from test_base_weights import write_checkpoint
from test_remote_code import run

from shortv_hf.data.outputs import RECORD
from shortv_hf.hub.build import code_files
from shortv_hf.layer_contribution import LayerRanking


pytest.importorskip("typer")
TOKEN = "hf_a_secret_that_nobody_sees"
UPLOAD = """
import sys
from huggingface_hub import HfApi
api = HfApi(token=sys.argv[2])
api.create_repo("org/base")
api.upload_folder(repo_id="org/base", folder_path=sys.argv[1])
"""


class World:
    """A Hub with `org/base` (legacy layout, uploaded by the real client; its main has moved since) and `me/shortv`
    (built and published by the command, pinned to the first commit of the base)."""

    def __init__(self, hub, shell, folder):
        self.hub, self.shell, self.folder = hub, shell, folder
        self.first, self.second = make_model(seed=1), make_model(seed=2)
        self.base = write_processor(write_checkpoint(folder / "base", self.first))
        (self.base / "README.md").write_text("---\nlicense: llama2\n---\n\nA base.\n")
        command = [sys.executable, "-c", UPLOAD, str(self.base), TOKEN]
        subprocess.run(command, check=True, env={**os.environ, **self.environment()}, cwd="/")
        self.pinned = hub.head("org/base")
        LayerRanking([0.3, 0.1, 0.4, 0.0], [3, 1, 0, 2], "lc", "visual", "forward", 0).save(folder / "ranking.json")
        self.repo = folder / "shortv"
        options = ["--ranking", folder / "ranking.json", "--num-layers", 2, "--base-revision", "main"]
        self.built = shell("build-repo", "org/base", *options, "--output", self.repo)
        self.published = shell("publish", self.repo, "--repo-id", "me/shortv", token=TOKEN)
        hub.commit("org/base", write_checkpoint(folder / "second", self.second))

    def environment(self, **more):
        return hub_environment(self.hub, self.folder / "home") | more

    def add_variant(self, name: str, base: str, revision: str | None = None):
        """`me/<name>`: a copy of `me/shortv` that references another base, by default at its newest commit."""
        files = dict(self.hub.files("me/shortv"))
        config = json.loads(files["config.json"])
        config |= {"base_model_name_or_path": base, "base_model_revision": revision or self.hub.head(base)}
        self.hub.create(f"me/{name}", files | {"config.json": json.dumps(config).encode()})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with LocalHub(write_token=TOKEN) as hub, HubShell(hub, folder / "home of the shell") as shell:
        yield World(hub, shell, folder)


def test_build_and_publish(world):
    code, output, error = world.built
    assert (code, error) == (
        0,
        "",
    ) and f"freezes layers [3, 1], weights from org/base at commit {world.pinned}" in output
    names = {file.name for file in world.repo.iterdir()} - {RECORD}  # which is not published
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", *(file.name for file in code_files()),
        "preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json", "ranking.json", "layer_scores.png",
    }  # fmt: skip
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja", "generation_config.json"):
        assert (world.repo / name).read_bytes() == (world.base / name).read_bytes()
    card = (world.repo / "README.md").read_text()
    assert "base_model: org/base" in card and "license: llama2" in card and world.pinned in card
    code, output, _ = world.published
    assert code == 0 and f"published: me/shortv is at commit {world.hub.head('me/shortv')}" in output
    assert set(world.hub.files("me/shortv")) == names | {".gitattributes"}


LOAD = """
import json
revision = sys.argv[1]
options = {"trust_remote_code": True, "revision": revision}
config = AutoConfig.from_pretrained("me/shortv", **options)
processor = AutoProcessor.from_pretrained("me/shortv", **options)
found = {"config": [type(config).__name__, config.shortv_layers], "processor": type(processor).__name__, "answers": {}}
for name in ("AutoModelForImageTextToText", "AutoModelForVision2Seq"):
    if hasattr(transformers, name):
        model = getattr(transformers, name).from_pretrained("me/shortv", dtype=torch.float32, **options)
        assert type(model).__module__.startswith("transformers_modules.")
        found["answers"][name] = processor.decode(answer(model, processor)[0, -5:], skip_special_tokens=True).split()
found["weights"] = model.lm_head.weight.sum().item()
found["base"] = [model.config.base_model_name_or_path, model.config.base_model_revision]
pipe = pipeline("image-text-to-text", model="me/shortv", dtype=torch.float32, **options)
generate = {"do_sample": False, "eos_token_id": -1, "suppress_tokens": [98], "max_new_tokens": 5}
found["pipeline"] = pipe(text=messages, generate_kwargs=generate, return_full_text=False)[0]["generated_text"].split()
found["version"] = transformers.__version__
print(json.dumps(found))
"""


def test_a_stranger_loads_it_and_again_offline(world):
    commit = world.hub.head("me/shortv")
    found = run(LOAD, commit, **world.environment())
    assert found["config"] == ["ShortVLlavaConfig", [3, 1]] and found["processor"] == "LlavaProcessor"
    # the base's main has moved on; the pinned commit is what counts
    assert found["weights"] == pytest.approx(world.first.lm_head.weight.sum().item())
    assert found["weights"] != pytest.approx(world.second.lm_head.weight.sum().item())
    assert found["base"] == ["org/base", world.pinned]
    on_4 = found["version"].startswith("4.")
    assert set(found["answers"]) == {"AutoModelForImageTextToText"} | ({"AutoModelForVision2Seq"} if on_4 else set())
    for answer in found["answers"].values():
        assert answer == found["pipeline"]

    before = len(world.hub.requests)
    again = run(LOAD, commit, **world.environment(HF_HUB_OFFLINE="1"))
    assert again == found and len(world.hub.requests) == before


def test_check_repo(world):
    code, output, _ = world.shell("check-repo", "me/shortv")
    assert code == 0, output
    lines = output.splitlines()
    assert len(lines) == 13 and lines[-1] == "me/shortv: in order" and all(line[:5] == "ok   " for line in lines[:-1])
    assert (
        f"{len(code_files())} files, equal to those of shortv_hf" in output and f"org/base at {world.pinned}" in output
    )
    assert (
        "none missing" in output
        and "8 out, equal with and without a cache" in output
        and "12 texts, the same ids" in output
    )

    code, _, error = world.shell("check-repo", "me/nothing")
    assert (code, error) == (1, "shortv: there is no repo me/nothing, or the present token may not read it\n")
    code, _, error = world.shell("check-repo", "me/shortv", "--revision", "0" * 40)
    assert (code, error) == (1, f"shortv: me/shortv has no revision {'0' * 40}\n")


CHANGED = """
import json
model = AutoModelForImageTextToText.from_pretrained("me/changed", trust_remote_code=True, revision=sys.argv[1])
print(json.dumps(model.config.shortv_layers))
"""


def test_changed_code_file(world):
    """A pinned revision keeps running the code that was read; the check refuses the new code without running it."""
    files = dict(world.hub.files("me/shortv"))
    world.hub.create("me/changed", files)
    commit = world.hub.head("me/changed")
    ran = world.folder / "ran"
    evil = f"open({str(ran)!r}, 'w')\n".encode() + files["configuration_shortv.py"]
    world.hub.add_commit("me/changed", "main", files | {"configuration_shortv.py": evil})
    assert run(CHANGED, commit, **world.environment()) == [3, 1]
    code, output, _ = world.shell("check-repo", "me/changed")
    assert code == 1 and "FAIL code files: configuration_shortv.py differs from shortv_hf" in output
    assert output.splitlines()[-1] == "me/changed: not to be trusted as it is: code files"
    assert not ran.exists()


FAILURES = """
import json

found = {}
for repo in sys.argv[1:]:
    name, _, token = repo.partition(":")
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, token=token or None)
        found[repo] = ["loaded", model.lm_head.weight.sum().item()]
    except Exception as error:
        found[repo] = [type(error).__name__, str(error)]
print(json.dumps(found))
"""


def test_failures(world):
    hub = world.hub
    hub.commit("org/other-family", write_checkpoint(world.folder / "other", make_model("llava_next")))
    hub.commit("org/other-model", write_checkpoint(world.folder / "size", make_model(text="qwen2")))
    hub.commit("org/truncated", world.base)
    hub.files("org/truncated")["model.safetensors"] = hub.files("org/truncated")["model.safetensors"][:-1000]
    hub.commit("org/secret", world.base, token="hf_of_somebody_else")
    hub.commit("org/old", world.base)
    for name in ("other-family", "other-model", "truncated", "secret"):
        world.add_variant(name, f"org/{name}")
    world.add_variant("renamed", "org/old")
    hub.rename("org/old", "org/new")
    world.add_variant("missing", "org/gone", world.pinned)
    world.add_variant("no-commit", "org/base", "0" * 40)
    code, output, _ = world.shell("publish", world.repo, "--repo-id", "me/private", "--private", token=TOKEN)
    assert code == 0 and "create   the repo, private" in output

    names = ["missing", "no-commit", "other-family", "other-model", "truncated", "secret", "renamed", "private"]
    found = run(
        FAILURES, *[f"me/{name}" for name in names], f"me/private:{TOKEN}", "me/nothing", **world.environment()
    )
    for name, kind, message in (
        ("missing", "OSError", f"me/missing reads its weights from org/gone at commit {world.pinned}, which failed: "),
        ("no-commit", "OSError", f"reads its weights from org/base at commit {'0' * 40}, which failed: "),
        ("other-family", "ValueError", "me/other-family reads its weights from org/other-family at commit "),
        ("other-family", "ValueError", "org/other-family has model_type 'llava_next'"),
        ("other-model", "ValueError", "org/other-model does not fit me/other-model: its text_config.model_type is 'qwen2'"),
        ("truncated", "ValueError", "a weight file of org/truncated is damaged or cut short"),
        ("secret", "OSError", "me/secret reads its weights from org/secret at commit "),
        ("secret", "OSError", "make sure to pass a token having permission"),
    ):  # fmt: skip
        assert found[f"me/{name}"][0] == kind and message in found[f"me/{name}"][1]
        assert len(found[f"me/{name}"][1].splitlines()) == 1
    for name in ("private", "nothing"):  # Transformers' own words
        assert found[f"me/{name}"][0] == "OSError" and f"me/{name} is not a local folder" in found[f"me/{name}"][1]
    expected = ["loaded", pytest.approx(world.first.lm_head.weight.sum().item())]
    assert found["me/renamed"] == expected  # the Hub leads from the old name to the new one
    assert found[f"me/private:{TOKEN}"] == expected

    assert world.shell("check-repo", "me/private")[::2] == (
        1, "shortv: there is no repo me/private, or the present token may not read it\n"
    )  # fmt: skip
    code, output, _ = world.shell("check-repo", "me/missing")
    assert code == 1 and "FAIL pinned commit: org/gone at" in output and "fresh process" not in output
    code, output, _ = world.shell("check-repo", "me/truncated")
    assert (
        code == 1 and "FAIL loads in a fresh process: ValueError: a weight file of org/truncated is damaged" in output
    )
