"""Weights by reference over HTTP: real client code against a small Hub on 127.0.0.1."""

import json
import os
import subprocess
import sys

import pytest
from helpers import FAMILIES, make_model
from local_hub import LocalHub
from processor_files import write_processor
from test_base_weights import write_checkpoint
from test_remote_code import run

from shortv_hf.hub import build_repo


@pytest.fixture
def hub(tmp_path):
    """`org/base` (private, two commits) and `org/shortv` (public, two commits) that references its first one."""
    with LocalHub() as server:
        first, second = make_model(seed=1), make_model(seed=2)
        folder = write_checkpoint(tmp_path / "first", first)
        write_processor(folder)
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoModelForImageTextToText": "evil.Model"}  # never looked at
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text("raise SystemExit('code of the base was run')")
        pinned = server.commit("org/base", folder, token="secret")
        server.commit("org/base", write_checkpoint(tmp_path / "second", second))
        config = FAMILIES["llava"][0].from_pretrained(folder, shortv_layers=[3, 1])
        config.base_model_name_or_path, config.base_model_revision = "org/base", pinned
        old = build_repo(config, tmp_path / "repo_old", processor_dir=folder)
        server.old_commit = server.commit("org/shortv", old)
        config.shortv_layers = [2]
        server.commit("org/shortv", build_repo(config, tmp_path / "repo_new", processor_dir=folder))
        server.pinned, server.first, server.second = pinned, first, second
        yield server


def environment(hub, tmp_path):
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


SCRIPT = """
import json, os
load = AutoModelForImageTextToText.from_pretrained
where = sys.argv[1]
def facts(model):
    return [model.lm_head.weight.sum().item(), model.config.shortv_layers, model.config.base_model_revision, model.name_or_path]
options = {"trust_remote_code": True, "token": "secret", "cache_dir": where, "dtype": torch.float32}
found = {"main": facts(load("org/shortv", **options))}
found["revision"] = facts(load("org/shortv", revision=sys.argv[2], **options))
found["offline"] = facts(load("org/shortv", local_files_only=True, **options))
found["unpinned"] = facts(load("org/shortv", base_model_revision=None, **options))
processor = AutoProcessor.from_pretrained("org/shortv", trust_remote_code=True, token="secret", cache_dir=where)
found["processor"] = type(processor).__name__
try:
    load("org/shortv", **{**options, "token": False, "cache_dir": where + "_empty"})
except OSError as error:
    found["no token"] = str(error)[:300]
found["home is unused"] = not os.path.exists(os.path.join(os.environ["HF_HOME"], "hub", "models--org--base"))
print(json.dumps(found))
"""


def test_pinned_commit_token_and_cache(hub, tmp_path):
    found = run(SCRIPT, tmp_path / "cache", hub.old_commit, **environment(hub, tmp_path))
    first, second = (model.lm_head.weight.sum().item() for model in (hub.first, hub.second))
    assert found["main"] == [pytest.approx(first), [2], hub.pinned, "org/shortv"]
    assert found["revision"] == [pytest.approx(first), [3, 1], hub.pinned, "org/shortv"]
    assert found["offline"] == found["main"]
    assert found["unpinned"][:2] == [pytest.approx(second), [2]]
    assert found["processor"] == "LlavaProcessor"
    assert "org/base" in found["no token"]
    assert found["home is unused"]
    tokens = {token for _, path, token in hub.requests if "resolve" in path and token is not None}
    assert tokens == {"secret"}
    assert not [path for _, path, _ in hub.requests if path.endswith("evil.py")]
    weights = {path for method, path, _ in hub.requests if method == "GET" and path.endswith(".safetensors")}
    assert f"org/base/resolve/{hub.pinned}/model.safetensors" in weights


DIRECT = """
import json
sys.modules.pop("shortv_hf")
sys.path.insert(0, sys.argv[1])
from shortv_hf import ShortVLlavaConfig, ShortVLlavaForConditionalGeneration
found = {}
for name, revision in (("main", None), ("pinned", sys.argv[2])):
    options = {"token": "secret", "revision": revision} if revision else {"token": "secret"}
    model = ShortVLlavaForConditionalGeneration.from_pretrained("org/base", shortv_layers=[1], **options)
    found[name] = [model.lm_head.weight.sum().item(), model.config.base_model_name_or_path, model.config.base_model_revision]
    config = ShortVLlavaConfig.from_pretrained("org/base", **options)
    found[name].append(config.base_model_revision)
print(json.dumps(found))
"""


def test_original_from_the_hub_pins_its_commit(hub, tmp_path, request):
    found = run(DIRECT, request.config.rootpath, hub.pinned, **environment(hub, tmp_path))
    newest = hub.head("org/base")
    first, second = (model.lm_head.weight.sum().item() for model in (hub.first, hub.second))
    assert found["main"] == [pytest.approx(second), "org/base", newest, newest]
    assert found["pinned"] == [pytest.approx(first), "org/base", hub.pinned, hub.pinned]


BROKEN = """
import json
try:
    AutoModelForImageTextToText.from_pretrained("org/shortv", trust_remote_code=True, token="secret")
except (OSError, ValueError) as error:
    print(json.dumps(str(error)))
"""


def test_build_repo_from_the_hub(hub, tmp_path, request):
    """The command of the README: config, processor files and commit come from the Hub; the result loads elsewhere."""
    output = tmp_path / "built"
    command = [sys.executable, "-m", "shortv_hf.cli", "build-repo", "org/base", "--layers", "3,1"]
    command += ["--revision", hub.pinned, "--output", str(output)]
    variables = {**os.environ, **environment(hub, tmp_path), "HF_TOKEN": "secret"}
    subprocess.run(command, check=True, env=variables, cwd=request.config.rootpath)
    config = json.loads((output / "config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_model_revision"]) == ("org/base", hub.pinned)
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja", "generation_config.json"):
        assert (output / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    assert not list(output.glob("*.safetensors")) and not (output / "evil.py").exists()
    script = """
    import json
    pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True, token="secret")
    options = {"do_sample": False, "eos_token_id": -1, "suppress_tokens": [98], "max_new_tokens": 3}
    reply = pipe(text=messages, generate_kwargs=options, return_full_text=False)
    print(json.dumps([reply[0]["generated_text"], pipe.model.config.shortv_layers]))
    """
    text, layers = run(script, output, **environment(hub, tmp_path), HF_TOKEN="secret")
    assert text.strip() and layers == [3, 1]


def test_base_without_the_pinned_commit(hub, tmp_path):
    del hub.repos["org/base"]["commits"][hub.pinned]
    assert hub.pinned in run(BROKEN, **environment(hub, tmp_path))


def test_base_is_gone(hub, tmp_path):
    del hub.repos["org/base"]
    assert "org/base" in run(BROKEN, **environment(hub, tmp_path))


def test_subfolder_is_that_of_the_shortv_repo(tmp_path):
    """Also of the local kind: `subfolder` finds the config, not the weights."""
    from transformers import AutoModelForImageTextToText

    base = write_checkpoint(tmp_path / "base", make_model())
    build_repo(FAMILIES["llava"][0].from_pretrained(base, shortv_layers=[1]), tmp_path / "repo" / "inner")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "repo", subfolder="inner")
    assert model.config.shortv_layers == [1]
