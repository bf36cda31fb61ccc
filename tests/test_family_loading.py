"""Every family's checkpoints, in the layouts of the real repos: read by reference, saved, and read again.

Qwen2-VL's and Qwen2.5-VL's original configs are flat: the text model's fields stand beside the others.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build, inputs
from processor_files import IMAGE_PROCESSORS, PROCESSORS, write_processor
from safetensors.torch import load_file, save_file
from test_remote_code import run
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

import shortv_hf
from shortv_hf.hub import build_repo
from shortv_hf.hub.trial import TEXTS


LAYERS = [3, 1]
# Module names → keys of the original checkpoints; the first that matches.
NESTED = {
    r"^model\.language_model\.": "language_model.model.",
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.(multi_modal_projector|image_newline)": r"\1",
}
TOWER = {r"^model\.vision_tower\.(?:vision_model\.)?": "vision_tower."}
INNER_TOWER = {r"^model\.vision_tower\.(?:vision_model\.)?": "vision_tower.vision_model."}
FLAT = {r"^model\.language_model\.": "model.", r"^model\.visual\.": "visual."}
LAYOUTS = {
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "gemma3"), NESTED | INNER_TOWER),
    "internvl": NESTED | TOWER,
    "qwen2_vl": FLAT,
    "qwen2_5_vl": FLAT,
    "qwen3_vl": {},
}
QWEN_VISION = (
    "depth", "embed_dim", "fullatt_block_indexes", "hidden_act", "hidden_size", "intermediate_size", "mlp_ratio",
    "num_heads", "out_hidden_size", "patch_size", "spatial_merge_size", "temporal_patch_size", "window_size",
)  # fmt: skip
# What the original tokenizer files declare, and the words that their processors ask the tokenizer for.
TOKENIZERS = {
    "llava": "LlamaTokenizer",
    "llava_next": "LlamaTokenizer",
    "gemma3": "GemmaTokenizer",
}
WORDS = {
    "boi_token": "w20",
    "context_image_token": "<image>",
    "end_image_token": "w21",
    "eoi_token": "w21",
    "image_token": "<image>",
    "start_image_token": "w20",
    "video_token": "w22",
}
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def classes(family: str) -> tuple[type, type, type]:
    """Config, model without a head and model of a family."""
    names = ("Config", "Model", "ForConditionalGeneration")
    config, headless, model = (getattr(shortv_hf, FAMILIES[family].shortv + name) for name in names)
    return config, headless, model


def flat(config: dict) -> dict:
    """A config as Qwen2-VL's original repos have it."""
    text = dict(config["text_config"])
    rope = text.get("rope_parameters") or text["rope_scaling"]
    for name in ("architectures", "dtype", "layer_types", "model_type", "rope_parameters"):
        text.pop(name, None)
    text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta"))
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    vision = {name: value for name, value in config["vision_config"].items() if name in QWEN_VISION}
    others = {name: value for name, value in config.items() if name not in ("text_config", "dtype")}
    return {**others, **text, "tie_word_embeddings": False, "vision_config": vision}


def untie(model: PreTrainedModel) -> PreTrainedModel:
    """With a head of its own, whatever the installed version takes as a default."""
    if model.lm_head.weight is model.get_input_embeddings().weight:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    return model


def write_checkpoint(folder: Path, family: str, shards: int = 1, tied: bool = False) -> PreTrainedModel:
    """An original checkpoint with random weights; returns the stock model that it was made from."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = build.__wrapped__(family)
    config = json.loads(json.dumps(fresh.config.to_dict(), default=str))
    if family == "gemma3" or tied:
        fresh.lm_head.weight = fresh.get_input_embeddings().weight
    else:
        untie(fresh)
    config["architectures"] = [type(fresh).__name__]
    for part in (config, config["text_config"]):
        part["tie_word_embeddings"] = family == "gemma3" or tied
    if LAYOUTS[family] is FLAT:
        config = flat(config)
        config["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in fresh.state_dict().items():
        for old, new in LAYOUTS[family].items():
            name, found = re.subn(old, new, name)
            if found:
                break
        tensors[name] = tensor.clone()
    if family == "gemma3" or tied:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("lm_head.weight")}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return fresh
    index = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return fresh


def same_logits(model: PreTrainedModel, stock: PreTrainedModel, family: str) -> bool:
    """Bit for bit, without frozen layers."""
    model.config.shortv_layers = []
    given = inputs(family, "images")
    with torch.no_grad():
        return torch.equal(model(**given).logits, stock(**given).logits)


def keys(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


@FAMILY
@pytest.mark.parametrize("shards", [1, 3])
def test_original_and_reference(family, shards, tmp_path):
    config_class, headless_class, model_class = classes(family)
    stock = write_checkpoint(tmp_path / "base", family, shards)
    original, info = model_class.from_pretrained(tmp_path / "base", shortv_layers=LAYERS, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(original) is model_class and type(original.config) is config_class
    assert original.config.model_type == f"shortv_{family}" and original.config.shortv_layers == LAYERS
    repo = build_repo(original.config, tmp_path / "repo")
    assert not list(repo.glob("*.safetensors"))
    referenced = AutoModelForImageTextToText.from_pretrained(repo)
    assert type(referenced) is model_class and referenced.config.shortv_layers == LAYERS
    assert referenced.config.base_model_name_or_path == str(tmp_path / "base")
    for loaded in (original, referenced):
        assert same_logits(loaded, stock, family)
    for headless in (headless_class.from_pretrained(tmp_path / "base"), AutoModel.from_pretrained(repo)):
        assert type(headless) is headless_class
        expected = stock.model.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in headless.state_dict().items())


@FAMILY
def test_save_and_reload(family, tmp_path):
    _, headless_class, model_class = classes(family)
    stock = write_checkpoint(tmp_path / "base", family)
    original_keys = keys(tmp_path / "base")
    loaded = model_class.from_pretrained(tmp_path / "base", shortv_layers=LAYERS)
    loaded.save_pretrained(tmp_path / "own", max_shard_size="100KB")
    shutil.rmtree(tmp_path / "base")
    assert len(list((tmp_path / "own").glob("*.safetensors"))) > 1
    assert keys(tmp_path / "own") == original_keys  # which the stock classes of both lines read
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert config["architectures"] == [model_class.__name__] and config["model_type"] == f"shortv_{family}"
    assert config["base_model_name_or_path"] is None and config["shortv_layers"] == LAYERS
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "own")
    assert type(again) is model_class and again.config.shortv_layers == LAYERS
    assert same_logits(again, stock, family)
    headless_class.from_pretrained(tmp_path / "own").save_pretrained(tmp_path / "headless")
    headless = AutoModel.from_pretrained(tmp_path / "headless")
    assert all(torch.equal(tensor, stock.model.state_dict()[name]) for name, tensor in headless.state_dict().items())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3"])
def test_tied_head(family, tmp_path):
    """The file has no head, as those of the smallest Qwens."""
    stock = write_checkpoint(tmp_path / "base", family, tied=True)
    loaded = classes(family)[2].from_pretrained(tmp_path / "base")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert same_logits(loaded, stock, family)
    loaded.save_pretrained(tmp_path / "own")
    saved = json.loads((tmp_path / "own" / "config.json").read_text())
    assert saved.get("tie_word_embeddings", True) and saved["text_config"].get("tie_word_embeddings")
    assert same_logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "own"), stock, family)
    repo = build_repo(loaded.config, tmp_path / "again", weights_dir=tmp_path / "base")
    assert same_logits(AutoModelForImageTextToText.from_pretrained(repo), stock, family)


# A field of the vision tower, by the name that the family has for it, and another value.
OTHER_TOWERS = {
    "internvl": ("num_hidden_layers", 3),
    "qwen2_vl": ("embed_dim", 32),
    "qwen2_5_vl": ("fullatt_block_indexes", [0]),
    "qwen3_vl": ("deepstack_visual_indexes", [0, 1]),
}


@FAMILY
@pytest.mark.parametrize("part", ["text", "vision"])
def test_base_of_another_architecture(family, part, tmp_path):
    write_checkpoint(tmp_path / "base", family)
    repo = build_repo(classes(family)[0].from_pretrained(tmp_path / "base"), tmp_path / "repo")
    file = tmp_path / "base" / "config.json"
    content = json.loads(file.read_text())
    name, value = ("num_attention_heads", 2) if part == "text" else OTHER_TOWERS.get(family, ("patch_size", 8))
    place = content["vision_config"] if part == "vision" else content.get("text_config", content)
    place[name] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{part}_config.{name} is"):
        AutoModelForImageTextToText.from_pretrained(repo)


@FAMILY
def test_bad_layers_before_any_weight_is_read(family, tmp_path):
    write_checkpoint(tmp_path / "base", family)
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="99.*0 to 3"):
        classes(family)[2].from_pretrained(tmp_path / "base", shortv_layers=[99])


@FAMILY
def test_missing_weight(family, tmp_path):
    write_checkpoint(tmp_path / "base", family)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.2.mlp.up_proj.weight"))
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing keys: .*layers.2.mlp.up_proj.weight"):
        classes(family)[2].from_pretrained(tmp_path / "base")


def rotary(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inverse frequencies, by a name that is the same on both lines."""
    found = {}
    for name, tensor in model.model.language_model.named_buffers():
        if "inv_freq" in name and "original" not in name:
            local = "local" in name or "sliding" in name
            found["local" if local else "global"] = tensor
    return found


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
    ],
    ids=["4.x", "5.x"],
)
def test_gemma_rotary_settings_of_either_line(rope, tmp_path):
    write_checkpoint(tmp_path / "base", "gemma3")
    file = tmp_path / "base" / "config.json"
    content = json.loads(file.read_text())
    for name in ("rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters"):
        content["text_config"].pop(name, None)
    content["text_config"] |= rope
    file.write_text(json.dumps(content))
    loaded = classes("gemma3")[2].from_pretrained(tmp_path / "base")
    expected = torch.arange(0, 8, 2) / 8
    torch.testing.assert_close(rotary(loaded)["global"], 5e5**-expected / 8)
    torch.testing.assert_close(rotary(loaded)["local"], 2e4**-expected)
    loaded.config.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["text_config"]
    assert (saved["rope_theta"], saved["rope_local_base_freq"]) == (5e5, 2e4)
    assert saved["rope_scaling"]["factor"] == 8.0


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_sections_of_rotary_dimensions_are_written_for_both_lines(family, tmp_path):
    write_checkpoint(tmp_path / "base", family)
    config = classes(family)[0].from_pretrained(tmp_path / "base")
    config.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["text_config"]
    assert saved["rope_scaling"]["mrope_section"] == [2, 1, 1] and saved["rope_theta"] == 1e4


# ------------------------------------------------------------------------------------------------ processors, remotely


def write_processor_files(folder: Path, family: str) -> Path:
    """With the class names that the original repos have in them."""
    write_processor(folder, family, "prepend" if TOKENIZERS.get(family) == "LlamaTokenizer" else "bytes")
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text()) | {"extra_special_tokens": WORDS}
    file.write_text(json.dumps(content | {"tokenizer_class": TOKENIZERS.get(family, "Qwen2Tokenizer")}))
    names = {"image_processor_type": IMAGE_PROCESSORS[family], "processor_class": PROCESSORS[family]}
    (folder / "preprocessor_config.json").write_text(json.dumps(names))  # sizes are the class's own
    return folder


def processor_of(repo: Path) -> list[str]:
    """The classes of a repo's processor and its parts; or why it cannot be loaded."""
    try:
        processor = AutoProcessor.from_pretrained(repo)
    except (ImportError, ValueError) as error:  # those with videos need torchvision
        assert "torchvision" in str(error).lower()
        return [type(error).__name__]
    parts = [getattr(processor, name, None) for name in ("image_processor", "video_processor")]
    return [type(part).__name__ for part in (processor, *parts)]


@FAMILY
def test_processor_is_that_of_the_base(family, tmp_path):
    write_checkpoint(tmp_path / "base", family)
    base = write_processor_files(tmp_path / "base", family)
    config = classes(family)[0].from_pretrained(base)
    repo = build_repo(config, tmp_path / "repo", processor_dir=base)
    assert processor_of(repo) == processor_of(base)
    # Of LLaVA's tokenizer, the class that is declared is another one: see `build_repo`.
    ours, theirs = AutoTokenizer.from_pretrained(repo), AutoTokenizer.from_pretrained(base)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text


@FAMILY
def test_files_that_name_no_class(family):
    """Are read by the class of the original model type, which is looked up when it is asked for."""
    config_class = classes(family)[0]
    parent = config_class.__mro__[2]
    assert parent.model_type == config_class.base_model_type == family
    for table in (PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING, TOKENIZER_MAPPING):
        assert (config_class in table) == (parent in table)
        if parent in table:
            assert table[config_class] == table[parent]
    assert config_class in PROCESSOR_MAPPING


def test_import_without_torchvision(request):
    script = "import sys; sys.modules['torchvision'] = None; import shortv_hf; print(len(shortv_hf.__all__))"
    found = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=request.config.rootpath
    )
    assert int(found.stdout.splitlines()[-1]) > 24


REMOTE = """
import json
repo, inputs = sys.argv[1:3]
inputs, expected = torch.load(inputs)
found = {}
for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForVision2Seq"):
    if hasattr(transformers, name):
        model = getattr(transformers, name).from_pretrained(repo, trust_remote_code=True, dtype=torch.float32)
        with torch.no_grad():
            logits = model(**inputs).logits
        found[name] = [type(model).__name__, type(model).__module__.split(".")[0], torch.equal(logits, expected)]
        found[name].append(model.config.shortv_layers)
headless = transformers.AutoModel.from_pretrained(repo, trust_remote_code=True)
found["AutoModel"] = [type(headless).__name__, type(headless).__module__.split(".")[0]]
model.save_pretrained(sys.argv[3])
print(json.dumps(found))
"""


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])  # slow; `test_remote_code.py` has the LLaVAs
def test_without_the_package(family, tmp_path):
    """By reference, and then what the remote code has saved."""
    _, headless_class, model_class = classes(family)
    write_checkpoint(tmp_path / "base", family)
    model = model_class.from_pretrained(tmp_path / "base", shortv_layers=LAYERS)
    given = inputs(family, "images")
    with torch.no_grad():
        torch.save((given, model(**given).logits), tmp_path / "inputs.pt")
    repo = build_repo(model.config, tmp_path / "repo")
    for saved in (tmp_path / "saved", tmp_path / "saved_again"):
        found = run(REMOTE, repo, tmp_path / "inputs.pt", saved)
        assert found.pop("AutoModel") == [headless_class.__name__, "transformers_modules"]
        assert len(found) == 2
        for name, answer in found.items():
            assert answer == [model_class.__name__, "transformers_modules", True, LAYERS], name
        repo = saved
