"""Where weights come from: layouts, references, overrides, refusals, and what is saved."""

import json
import logging
import shutil

import pytest
import torch
from helpers import FAMILIES, make_config, make_inputs, make_model, make_stock, reference_forward
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
    LlavaForConditionalGeneration,
)

from shortv_hf import ShortVLlavaConfig, ShortVLlavaForConditionalGeneration, ShortVLlavaModel
from shortv_hf.hub import build_repo


LAYERS = [3, 1]
LEGACY = [
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
]
CURRENT = [
    ("model.vision_tower.vision_model.", "model.vision_tower.vision_model."),
    LEGACY[3][:1] + ("model.vision_tower.vision_model.",),
]
NEWEST = [("model.vision_tower.vision_model.", "model.vision_tower.")]


def rename(state_dict, layout):
    renamed = {}
    for name, tensor in state_dict.items():
        for old, new in layout:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        renamed[name] = tensor.clone()
    return renamed


def write_checkpoint(folder, model, layout=LEGACY, shards=1, edit=None):
    """An original checkpoint with the weights of `model`, in a key layout, in one file or several."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make_stock(model).config
    config.architectures = [type(make_stock(model)).__name__]
    config.save_pretrained(folder)
    GenerationConfig(max_new_tokens=7).save_pretrained(folder)
    tensors = rename(model.state_dict(), layout)
    if edit:
        edit(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    index = {}
    for i in range(shards):
        names = sorted(tensors)[i::shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, file))
    content = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def write_reference(folder, base, layers=LAYERS, family="llava"):
    """A ShortV repo that references `base`."""
    config = FAMILIES[family][0].from_pretrained(base)
    config.shortv_layers = list(layers)
    return build_repo(config, folder)


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def checkpoint(tmp_path):
    model = make_model()
    return model, write_checkpoint(tmp_path / "base", model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", [LEGACY, CURRENT, NEWEST], ids=["legacy", "current", "newest"])
def test_layouts(tmp_path, family, shards, layout):
    model = make_model(family)
    base = write_checkpoint(tmp_path / "base", model, layout, shards)
    direct = FAMILIES[family][1].from_pretrained(base, shortv_layers=LAYERS)
    repo = write_reference(tmp_path / "repo", base, family=family)
    referenced = AutoModelForImageTextToText.from_pretrained(repo)
    for loaded in (direct, referenced):
        assert type(loaded) is FAMILIES[family][1] and not loaded.training
        assert same_weights(loaded, model)
        assert loaded.config.shortv_layers == LAYERS
        assert loaded.config.base_model_name_or_path == str(base)
    assert direct.name_or_path == str(base)
    assert referenced.name_or_path == referenced.config.name_or_path == str(repo)
    inputs = make_inputs(model, ["ttItt"])
    model.set_shortv_layers(LAYERS)
    with torch.no_grad():
        assert torch.equal(referenced(**inputs).logits, model(**inputs).logits)


def test_original_loads_without_a_warning_about_the_model_type(checkpoint, caplog):
    _, base = checkpoint
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        ShortVLlavaForConditionalGeneration.from_pretrained(base, shortv_layers=[0])
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("auto", [False, True])
def test_shortv_fields_can_be_overridden(checkpoint, tmp_path, auto):
    model, base = checkpoint
    repo = write_reference(tmp_path / "repo", base)
    copy = shutil.copytree(base, tmp_path / "copy")
    shutil.rmtree(base)
    cls = AutoModelForImageTextToText if auto else ShortVLlavaForConditionalGeneration
    loaded = cls.from_pretrained(repo, base_model_name_or_path=str(copy), shortv_layers=[2])
    assert same_weights(loaded, model)
    assert loaded.config.shortv_layers == [2] and loaded.config.base_model_name_or_path == str(copy)
    config = ShortVLlavaConfig.from_pretrained(repo)
    loaded = ShortVLlavaForConditionalGeneration.from_pretrained(
        repo, config=config, base_model_name_or_path=str(copy), shortv_layers=[0]
    )
    assert loaded.config.shortv_layers == [0] and config.shortv_layers == LAYERS


def test_weights_come_from_the_path_when_it_has_them(checkpoint, tmp_path):
    """A config made from one checkpoint and the path of another: the path's weights are loaded, not the config's."""
    _, base = checkpoint
    tuned = make_model(seed=1)
    write_checkpoint(tmp_path / "tuned", tuned)
    config = ShortVLlavaConfig.from_pretrained(base, shortv_layers=LAYERS)
    loaded = ShortVLlavaForConditionalGeneration.from_pretrained(tmp_path / "tuned", config=config)
    assert same_weights(loaded, tuned)
    assert loaded.config.shortv_layers == LAYERS
    assert loaded.config.base_model_name_or_path == str(tmp_path / "tuned")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_and_device_map(checkpoint, tmp_path, key):
    _, base = checkpoint
    repo = write_reference(tmp_path / "repo", base)
    loaded = AutoModelForImageTextToText.from_pretrained(repo, **{key: torch.bfloat16}, device_map="auto")
    assert loaded.dtype == torch.bfloat16
    assert not [name for name, tensor in loaded.named_parameters() if tensor.is_meta]
    assert AutoModelForImageTextToText.from_pretrained(repo, dtype="auto").dtype == torch.float32


def test_attention_implementation(checkpoint, tmp_path):
    _, base = checkpoint
    repo = write_reference(tmp_path / "repo", base)
    loaded = AutoModelForImageTextToText.from_pretrained(repo, attn_implementation="eager")
    assert loaded.model.language_model.config._attn_implementation == "eager"


def test_disk_offload(checkpoint, tmp_path):
    model, base = checkpoint
    repo = write_reference(tmp_path / "repo", base)
    inputs = make_inputs(model, ["ttItt"])
    model.set_shortv_layers(LAYERS)
    device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    language_model = "model.language_model"
    device_map |= {f"{language_model}.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")}
    device_map |= {f"{language_model}.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    loaded = AutoModelForImageTextToText.from_pretrained(
        repo, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantization_config(tmp_path, bits):
    """bitsandbytes on the CPU, from a legacy checkpoint by reference; the frozen layers call quantized linears."""
    pytest.importorskip("bitsandbytes")
    config = make_config()
    config.text_config.hidden_size, config.text_config.intermediate_size = 64, 128  # multiples of the block sizes
    config.text_config.head_dim = 16
    torch.manual_seed(0)
    base = write_checkpoint(tmp_path / "base", ShortVLlavaForConditionalGeneration(config))
    repo = write_reference(tmp_path / "repo", base)
    skipped = ["model.vision_tower", "model.multi_modal_projector", "vision_tower", "multi_modal_projector", "lm_head"]
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=skipped)
    options = {"quantization_config": config, "dtype": torch.float32, "device_map": "cpu"}
    loaded = AutoModelForImageTextToText.from_pretrained(repo, **options)
    stock = LlavaForConditionalGeneration.from_pretrained(base, **options)
    assert "bitsandbytes" in type(loaded.model.language_model.layers[1].mlp.up_proj).__module__
    inputs = make_inputs(loaded, ["ttItt"])
    with torch.no_grad():
        actual, expected = loaded(**inputs).logits, reference_forward(stock, LAYERS, inputs).logits
        loaded.set_shortv_layers([])
        assert torch.equal(loaded(**inputs).logits, stock(**inputs).logits)
    assert (actual - expected).norm() < 0.05 * expected.norm()  # 8-bit rounds activations per batch of tokens


def test_key_mapping_of_the_caller(tmp_path):
    model = make_model()
    layout = [("lm_head.", "head."), *LEGACY]
    base = write_checkpoint(tmp_path / "base", model, layout)
    repo = write_reference(tmp_path / "repo", base)
    with pytest.raises(ValueError, match="head"):
        AutoModelForImageTextToText.from_pretrained(repo)
    loaded = AutoModelForImageTextToText.from_pretrained(repo, key_mapping={"^head": "lm_head"})
    assert same_weights(loaded, model)
    loaded.save_pretrained(tmp_path / "own")  # in a layout that needs no mapping
    assert same_weights(AutoModelForImageTextToText.from_pretrained(tmp_path / "own"), model)


def test_loading_info_on_request(checkpoint, tmp_path):
    model, base = checkpoint
    loaded, info = ShortVLlavaForConditionalGeneration.from_pretrained(base, output_loading_info=True)
    assert same_weights(loaded, model) and not info["missing_keys"]


def test_generation_config_of_the_repo_wins(checkpoint, tmp_path):
    _, base = checkpoint
    repo = write_reference(tmp_path / "repo", base)
    load = AutoModelForImageTextToText.from_pretrained
    assert load(repo).generation_config.max_new_tokens == 7
    GenerationConfig(max_new_tokens=3).save_pretrained(repo)
    assert load(repo).generation_config.max_new_tokens == 3
    assert load(repo, generation_config=GenerationConfig(max_new_tokens=5)).generation_config.max_new_tokens == 5


def test_headless_model(checkpoint, tmp_path):
    model, base = checkpoint
    repo = write_reference(tmp_path / "repo", base)
    for loaded in (ShortVLlavaModel.from_pretrained(base), AutoModel.from_pretrained(repo)):
        assert type(loaded) is ShortVLlavaModel
        assert same_weights(loaded, model.model)


def test_state_dict_instead_of_a_path(checkpoint):
    model, _ = checkpoint
    loaded = ShortVLlavaForConditionalGeneration.from_pretrained(
        None, config=model.config, state_dict=model.state_dict()
    )
    assert same_weights(loaded, model)


def test_incomplete_state_dict(checkpoint):
    model, _ = checkpoint
    state_dict = {name: tensor for name, tensor in model.state_dict().items() if ".layers.2." not in name}
    with pytest.raises(ValueError, match="the state dict do not fit.*missing"):
        ShortVLlavaForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=state_dict)


@pytest.mark.parametrize("kind", ["reference", "own", "original"])
@pytest.mark.parametrize("auto", [False, True])
def test_adapter_directory(checkpoint, tmp_path, kind, auto):
    """A LoRA adapter names the repo it was trained on; loading the adapter loads both."""
    peft = pytest.importorskip("peft")
    _, base = checkpoint
    path = base if kind == "original" else write_reference(tmp_path / "repo", base)
    model = ShortVLlavaForConditionalGeneration.from_pretrained(path)
    if kind == "own":
        path = tmp_path / "own"
        model.save_pretrained(path)
        model = ShortVLlavaForConditionalGeneration.from_pretrained(path)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = make_inputs(model, ["ttItt"])
    with torch.no_grad():
        expected = adapted(**inputs).logits
        cls = AutoModelForImageTextToText if auto and kind != "original" else ShortVLlavaForConditionalGeneration
        loaded = cls.from_pretrained(tmp_path / "adapter")
        assert sum("lora_" in name for name, _ in loaded.named_parameters()) > 0
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_adapter_is_fetched_with_the_token(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    _, base = checkpoint
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    given = {}
    monkeypatch.setattr(ShortVLlavaForConditionalGeneration, "load_adapter", lambda *_, **kwargs: given.update(kwargs))
    ShortVLlavaForConditionalGeneration.from_pretrained(tmp_path / "adapter", token="hf_secret", adapter_name="mine")
    assert given == {"adapter_name": "mine", "adapter_kwargs": {"token": "hf_secret"}}


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_embeddings(family, tmp_path):
    config = make_config(family, "qwen2", tie_word_embeddings=True)
    config.text_config.tie_word_embeddings = True
    model = FAMILIES[family][1](config).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "own")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "own")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert same_weights(loaded, model)


def test_another_base_is_not_read_at_the_old_commit(checkpoint, tmp_path):
    model, base = checkpoint
    repo = write_reference(tmp_path / "repo", base)
    config = json.loads((repo / "config.json").read_text())
    config["base_model_revision"] = "a" * 40
    (repo / "config.json").write_text(json.dumps(config))
    copy = shutil.copytree(base, tmp_path / "copy")
    loaded = AutoModelForImageTextToText.from_pretrained(repo, base_model_name_or_path=str(copy))
    assert loaded.config.base_model_revision is None


def test_config_without_a_base_for_a_repo_that_has_one(checkpoint, tmp_path):
    model, base = checkpoint
    repo = write_reference(tmp_path / "repo", base)
    loaded = ShortVLlavaForConditionalGeneration.from_pretrained(repo, config=make_config(shortv_layers=[1]))
    assert same_weights(loaded, model) and loaded.config.base_model_name_or_path == str(base)


class TestSave:
    def test_reloads_without_the_base(self, checkpoint, tmp_path):
        model, base = checkpoint
        loaded = ShortVLlavaForConditionalGeneration.from_pretrained(base, shortv_layers=LAYERS)
        loaded.save_pretrained(tmp_path / "own", max_shard_size="50KB")
        shutil.rmtree(base)
        assert loaded.config.base_model_name_or_path == str(base)  # in memory it still knows where it came from
        config = json.loads((tmp_path / "own" / "config.json").read_text())
        assert config["base_model_name_or_path"] is None and config["base_model_revision"] is None
        assert config["shortv_layers"] == LAYERS
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "own")
        assert same_weights(again, model)
        assert again.config.shortv_layers == LAYERS and again.config.base_model_name_or_path is None
        assert (tmp_path / "own" / "decoder_layer.py").is_file()

    def test_trained_weights_are_saved_and_read_back(self, checkpoint, tmp_path):
        """The saved weights, not those of the base that is still there."""
        _, base = checkpoint
        loaded = ShortVLlavaForConditionalGeneration.from_pretrained(base, shortv_layers=LAYERS)
        with torch.no_grad():
            loaded.lm_head.weight.add_(1)
        loaded.save_pretrained(tmp_path / "own")
        again = ShortVLlavaForConditionalGeneration.from_pretrained(tmp_path / "own")
        assert same_weights(again, loaded)

    def test_layout_of_the_original_is_kept(self, checkpoint, tmp_path):
        """Legacy in, legacy out: stock classes of both lines can read the language model and the tower."""
        _, base = checkpoint
        ShortVLlavaForConditionalGeneration.from_pretrained(base).save_pretrained(tmp_path / "own")
        saved = load_file(tmp_path / "own" / "model.safetensors")
        assert saved.keys() == load_file(base / "model.safetensors").keys()


class TestRefusals:
    """Never a partly random model."""

    def load(self, tmp_path, edit=None, config_edit=None, **kwargs):
        base = write_checkpoint(tmp_path / "base", make_model(), edit=edit)
        repo = write_reference(tmp_path / "repo", base)
        if config_edit:
            config_edit(repo, base)
        return AutoModelForImageTextToText.from_pretrained(repo, **kwargs)

    def test_missing_weight(self, tmp_path):
        name = "language_model.model.layers.2.mlp.up_proj.weight"
        with pytest.raises(ValueError, match="1 missing keys: .*layers.2.mlp.up_proj.weight"):
            self.load(tmp_path, edit=lambda tensors: tensors.pop(name))

    def test_unexpected_weight(self, tmp_path):
        def edit(tensors):
            tensors["language_model.model.extra.weight"] = torch.ones(3)

        with pytest.raises(ValueError, match="1 unexpected keys: .*extra.weight"):
            self.load(tmp_path, edit=edit)

    def test_recomputed_buffers_of_old_checkpoints_are_no_error(self, tmp_path):
        def edit(tensors):
            tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
            tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

        self.load(tmp_path, edit=edit)

    @pytest.mark.parametrize("kwargs", [{}, {"ignore_mismatched_sizes": True}], ids=str)
    def test_mismatched_weight(self, tmp_path, kwargs):
        def edit(tensors):
            tensors["multi_modal_projector.linear_1.weight"] = torch.ones(2, 2)

        with pytest.raises((ValueError, RuntimeError), match="linear_1.weight|size mismatch|ignore_mismatched_sizes"):
            self.load(tmp_path, edit=edit, **kwargs)

    def test_other_family(self, tmp_path):
        base = write_checkpoint(tmp_path / "next", make_model("llava_next"))
        with pytest.raises(ValueError, match="'llava_next'.*'shortv_llava'"):
            ShortVLlavaForConditionalGeneration.from_pretrained(base)

    def test_base_of_another_architecture(self, tmp_path):
        def edit(repo, base):
            config = json.loads((base / "config.json").read_text())
            config["text_config"]["num_hidden_layers"] = 3
            (base / "config.json").write_text(json.dumps(config))

        with pytest.raises(ValueError, match="num_hidden_layers is 3, the ShortV config needs 4"):
            self.load(tmp_path, config_edit=edit)

    def test_base_whose_weights_mean_something_else(self, tmp_path):
        def edit(repo, base):
            config = json.loads((base / "config.json").read_text())
            config["text_config"]["rms_norm_eps"] = 0.5
            (base / "config.json").write_text(json.dumps(config))

        with pytest.raises(ValueError, match="rms_norm_eps is 0.5"):
            self.load(tmp_path, config_edit=edit)

    def test_bad_layers_before_any_weight_is_read(self, tmp_path):
        def edit(repo, base):
            (base / "model.safetensors").unlink()

        with pytest.raises(ValueError, match="99.*0 to 3"):
            self.load(tmp_path, config_edit=edit, shortv_layers=[99])

    def test_only_safetensors(self, tmp_path):
        with pytest.raises(ValueError, match="safetensors"):
            self.load(tmp_path, use_safetensors=False)

        def edit(repo, base):
            torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
            (base / "model.safetensors").unlink()

        with pytest.raises(OSError, match="safetensors"):
            self.load(tmp_path, config_edit=edit)

    def test_base_is_gone(self, tmp_path):
        with pytest.raises((OSError, ValueError), match="base"):
            self.load(tmp_path, config_edit=lambda repo, base: shutil.rmtree(base))

    def test_stock_config(self, tmp_path):
        model = make_model()
        base = write_checkpoint(tmp_path / "base", model)
        with pytest.raises(ValueError, match="'llava'"):
            ShortVLlavaForConditionalGeneration.from_pretrained(base, config=make_stock(model).config)
