"""What a stranger does: load a built repo, with `trust_remote_code`, in a process that does not have the package."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import FAMILIES, make_model, make_stock
from processor_files import write_processor
from test_base_weights import write_checkpoint

from shortv_hf import AutoModelForVision2Seq
from shortv_hf.hub import build_repo
from shortv_hf.hub.build import code_files


PRELUDE = """
import sys
sys.modules["shortv_hf"] = None  # importing the package fails
import torch, transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline
from PIL import Image
image = Image.new("RGB", (20, 14), (200, 30, 30))
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is this ?"}]}]
def answer(model, processor):
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=-1, suppress_tokens=[98])
"""


def run(script, *arguments, **environment):
    """Run `script` in a new process, away from the checkout and on the same Transformers; its last line of output, from
    JSON."""
    environment = os.environ | environment
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


LOAD = """
import json
repo = sys.argv[1]
found = {"version": transformers.__version__}
config = AutoConfig.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
found["config"] = [type(config).__name__, config.shortv_layers, config.base_model_name_or_path]
auto_classes = ["AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForVision2Seq"]
for name in auto_classes:
    if hasattr(transformers, name):
        model = getattr(transformers, name).from_pretrained(repo, trust_remote_code=True, dtype=torch.float32)
        assert type(model).__module__.startswith("transformers_modules.")
        found[name] = [type(model).__name__, answer(model, processor).tolist()]
model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, shortv_layers=[0], dtype=torch.float32)
found["override"] = model.config.shortv_layers
pipe = pipeline("image-text-to-text", model=repo, trust_remote_code=True, dtype=torch.float32)
options = {"do_sample": False, "eos_token_id": -1, "suppress_tokens": [98], "max_new_tokens": 5}
reply = pipe(text=messages, generate_kwargs=options, return_full_text=False)
found["pipeline"] = reply[0]["generated_text"].split()
ids = answer(pipe.model, processor)
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
n_prompt = processor(images=image, text=prompt, return_tensors="pt")["input_ids"].shape[1]
found["decoded"] = processor.batch_decode(ids[:, n_prompt:], skip_special_tokens=True)[0].split()
model.save_pretrained(sys.argv[2])  # from remote code: the copy carries the code too
print(json.dumps(found))
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_built_repo(family, tmp_path):
    model = make_model(family, shortv_layers=[3, 1])
    base = write_checkpoint(tmp_path / "base", model)
    write_processor(base, family)
    (base / "generation_config.json").write_text(json.dumps({"pad_token_id": 0}))
    config = FAMILIES[family][0].from_pretrained(base, shortv_layers=[3, 1])
    repo = build_repo(config, tmp_path / "repo", processor_dir=base)
    files = sorted(file.name for file in repo.iterdir())
    assert not [name for name in files if name.endswith((".safetensors", ".bin"))]

    found = run(LOAD, repo, tmp_path / "saved")
    expected = run(
        """
        import json
        stock = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32)
        print(json.dumps(answer(stock, AutoProcessor.from_pretrained(sys.argv[1])).shape[1]))
        """,
        base,
    )
    model_class = FAMILIES[family][1].__name__
    assert found["config"] == [FAMILIES[family][0].__name__, [3, 1], str(base)]
    version = found.pop("version")
    loaded = {name for name in found if name.startswith("AutoModelFor")}
    assert "AutoModelForImageTextToText" in loaded
    assert ("AutoModelForVision2Seq" in loaded) == version.startswith("4.")
    assert ("AutoModelForMultimodalLM" in loaded) == version.startswith("5.")
    answers = [found[name] for name in sorted(loaded)]
    assert all(each == answers[0] for each in answers) and answers[0][0] == model_class
    assert len(answers[0][1][0]) == expected
    assert found["override"] == [0]
    assert found["pipeline"] == found["decoded"]

    saved = sorted(file.name for file in (tmp_path / "saved").iterdir())
    assert {file.name for file in code_files()} <= set(saved) and "model.safetensors" in saved
    again = run(
        """
        import json
        model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
        print(json.dumps([model.config.shortv_layers, model.config.base_model_name_or_path]))
        """,
        tmp_path / "saved",
    )
    assert again == [[0], None]


def test_answer_equals_the_installed_package(tmp_path):
    model = make_model(shortv_layers=[3, 1])
    base = write_checkpoint(tmp_path / "base", model)
    repo = build_repo(FAMILIES["llava"][0].from_pretrained(base, shortv_layers=[3, 1]), tmp_path / "repo")
    logits = run(
        """
        import json
        model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
        torch.manual_seed(0)
        ids = torch.tensor([[5, 6] + [98] * 16 + [7]])
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=torch.linspace(-1, 1, 768).view(1, 3, 16, 16)).logits
        print(json.dumps(logits[0, -1].tolist()))
        """,
        repo,
    )
    loaded = AutoModelForVision2Seq.from_pretrained(repo)  # on 5.x the package's own
    ids = torch.tensor([[5, 6] + [98] * 16 + [7]])
    with torch.no_grad():
        here = loaded(input_ids=ids, pixel_values=torch.linspace(-1, 1, 768).view(1, 3, 16, 16)).logits[0, -1]
    assert torch.equal(here, torch.tensor(logits))


def test_without_trust_there_is_a_clear_error(tmp_path):
    base = write_checkpoint(tmp_path / "base", make_model())
    repo = build_repo(FAMILIES["llava"][0].from_pretrained(base), tmp_path / "repo")
    message = run(
        """
        import json
        try:
            AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=False)
        except ValueError as error:
            print(json.dumps(str(error)))
        """,
        repo,
    )
    assert "trust_remote_code" in message


def test_closure_imports_only_torch_and_transformers():
    import ast

    names, direct = set(), {}
    for file in code_files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and "." not in node.module, "only flat relative imports are copied"
                direct.setdefault(file.stem, set()).add(node.module)
    assert names - set(sys.stdlib_module_names) == {"torch", "transformers"}
    assert {file.name for file in code_files()} == {
        "base_weights.py", "cache.py", "configuration_shortv.py", "decoder_layer.py", "modeling_shortv.py", "plan.py",
        "reduction.py", "reduction_downsample.py", "reduction_fastv.py", "reduction_illava.py", "reduction_prumerge.py",
        "reduction_random.py", "reduction_vtc_cls.py", "reduction_vtw.py", "rows.py", "stream.py", "tower.py",
        "upstream.py", "vision.py", "windows.py",
    }  # fmt: skip

    # 4.x copies what the loaded file imports itself, and not what its imports import.
    copied = direct["modeling_shortv"] | direct["configuration_shortv"]  # the configuration's comes first
    assert copied == {file.stem for file in code_files()} - {"modeling_shortv"}
    for name in direct.keys() & direct["configuration_shortv"]:
        assert direct[name] <= direct["configuration_shortv"]


class TestBuildRepo:
    def test_not_a_shortv_config(self, tmp_path):
        with pytest.raises(ValueError, match="ShortV config"):
            build_repo(make_stock(make_model()).config, tmp_path / "repo")

    def test_bad_layers_write_nothing(self, tmp_path):
        config = make_model().config
        config.shortv_layers = [7]
        with pytest.raises(ValueError, match="0 to 3"):
            build_repo(config, tmp_path / "repo")
        assert not (tmp_path / "repo").exists()

    def test_no_processor_there(self, tmp_path):
        with pytest.raises(ValueError, match="no processor files"):
            build_repo(make_model().config, tmp_path / "repo", processor_dir=tmp_path)

    def test_twice_and_in_place(self, tmp_path):
        processor = write_processor(tmp_path / "processor")
        for _ in range(2):
            build_repo(make_model().config, tmp_path / "repo", processor_dir=processor)
        build_repo(make_model().config, processor, processor_dir=processor)
        copied = {file.name for file in processor.iterdir()}
        assert {file.name for file in (tmp_path / "repo").iterdir()} == copied
        for name in ("tokenizer.json", "chat_template.jinja"):
            assert (tmp_path / "repo" / name).read_bytes() == (processor / name).read_bytes()
