"""What keeps ShortV right on versions of Transformers that it was not written for."""

import inspect
import json
import logging
import os
import pkgutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from helpers import FAMILIES, make_inputs, make_model
from PIL import Image
from processor_files import write_processor
from transformers.cache_utils import DynamicCache
from transformers.utils import logging as transformers_logging

import shortv_hf
from shortv_hf import upstream
from shortv_hf.chat.conversation import Conversation
from shortv_hf.hub.loading import load
from shortv_hf.upstream import CACHE


ROOT = Path(shortv_hf.__file__).parent
OURS = {"plan", "skip_padding", "visual_mask"}
COMMON = {"hidden_states", "input_ids", "inputs_embeds", "pixel_values"}  # in every version, for years


def forwards():
    """Every `forward` that the package defines."""
    for module in pkgutil.iter_modules(shortv_hf.__path__):
        for value in vars(import_module(f"shortv_hf.{module.name}")).values():
            if inspect.isclass(value) and value.__module__ == f"shortv_hf.{module.name}" and "forward" in vars(value):
                yield value


def test_no_forward_names_an_argument_of_upstreams():
    """An argument that is named and then renamed upstream arrives in `kwargs`, and ours silently keeps its default."""
    found = {cls.__name__: inspect.signature(vars(cls)["forward"]) for cls in forwards()}
    assert {
        "ShortVAttentionMixin",
        "ShortVDecoderLayerMixin",
        "ShortVTextModelMixin",
        "ShortVModelMixin",
    } <= found.keys()
    for name, signature in found.items():
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        assert {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds, name
        assert signature.parameters.keys() - {"self", "args", "kwargs"} <= OURS | COMMON, name


def test_our_arguments_are_no_names_of_upstreams():
    model = make_model()
    for module in (model, model.model, model.model.language_model, *model.model.language_model.layers[0].children()):
        for cls in type(module).__mro__:
            if cls.__module__.startswith("transformers.") and "forward" in vars(cls):
                assert not OURS & inspect.signature(cls.forward).parameters.keys()


def test_one_file_knows_the_versions_names():
    names = ("past_key_values", "image_hidden_states", "image_outputs", "pooler_output", "__version__.startswith")
    for file in ROOT.rglob("*.py"):
        if file.name != "upstream.py":
            assert not [name for name in names if name in file.read_text(encoding="utf-8")], file.name


# Edits of upstream's modules: [module, region, pattern, replacement].
LLAMA, LLAVA, CACHES = "models.llama.modeling_llama", "models.llava.modeling_llava", "cache_utils"
LAYERS = r"\nclass LlamaAttention.*?\nclass LlamaPreTrainedModel"
CALL = r" decoder_layer\(.*?\n            \)"
TEXT_MODEL = r"(?<=\nclass LlamaModel\().*?\nclass "
UPDATE = r"\nclass Cache:.*?    def update\(.*?return keys, values"
IGNORED_UPDATE = "def update(self, key_states, value_states, *args, **kwargs): return key_states, value_states\n\n    "


def renamed(name):
    """An argument that the text model hands to its layers, and they to their attention."""
    return [[LLAMA, LAYERS, rf"\b{name}\b", "renamed"], [LLAMA, CALL, rf"\b{name}=", "renamed="]]


EDITS = {
    "the cache's argument has another name": renamed(CACHE),
    "the rotary tables' argument has another name": renamed("position_embeddings"),
    "the mask's argument has another name": renamed("attention_mask"),
    "the positions' argument has another name": [
        [LLAMA, LAYERS, r"\bposition_ids\b", "renamed"],
        [LLAMA, CALL, r"\bposition_ids=", "renamed="],
        [LLAMA, TEXT_MODEL, r"(?s)( +)position_ids(: [^\n]*,\n.*?\n +)(if \(input_ids)", r"\1places\2position_ids = places\n        \3"],
        [LLAVA, r"self\.language_model\(.*?\n        \)", r"position_ids=", "places="],
    ],
    "the text model's output holds no cache": [
        [LLAMA, r"\nclass LlamaModel\(.*?\nclass ", rf"\b{CACHE}={CACHE}(?= if use_cache|,?\s+\)\n\n)", f"{CACHE}=None and {CACHE}"]
    ],
    "keys and values are stored by another method": [
        [LLAMA, LAYERS, r"\.update\(", ".store("],
        [CACHES, UPDATE, r"def update\(", IGNORED_UPDATE + "def store("],
    ],
    "update takes the layer first": [
        [LLAMA, LAYERS, r"\.update\(key_states, value_states, self.layer_idx", ".update(self.layer_idx, key_states, value_states"],
        [CACHES, UPDATE, r"(key_states: torch.Tensor,\s+value_states: torch.Tensor,\s+)(layer_idx: int,\s+)", r"\2\1"],
    ],
    "update returns an object": [
        [CACHES, UPDATE, r"return keys, values", "return {'keys': keys, 'values': values}"],
        [LLAMA, LAYERS, r"key_states, value_states = (\w+\.update\(.*?\))\n", r"key_states, value_states = \1.values()\n"],
    ],
}  # fmt: skip
if not upstream.ON_4:
    EDITS["the features of images are in another field"] = [[LLAVA, ".*", r"\.pooler_output", ".projected"]]


@pytest.fixture(scope="module")
def outcomes():
    """What happens under each edit, on a version that nobody has tested and on one that has been."""
    command = [sys.executable, str(Path(__file__).with_name("edited_upstream.py")), json.dumps({"none": [], **EDITS})]
    path = os.pathsep.join([str(ROOT.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    for name, modes in found.items():
        print(f"{name}:", *(f"  {mode}: {text}" for mode, text in modes.items()), sep="\n")
    return found


def test_unedited(outcomes):
    assert outcomes["none"] == {"untested": "right", "tested": "right"}


@pytest.mark.parametrize("name", EDITS)
def test_a_clear_error_or_right_numbers(outcomes, name):
    text = outcomes[name]["untested"]
    if text != "right":
        assert text.startswith(f"ValueError: ShortV cannot run on Transformers {transformers.__version__}: "), text
        assert "tested with Transformers 4.0.0 to 4.0.1" in text
    assert not outcomes[name]["tested"].startswith(("off", "AssertionError")), outcomes[name]["tested"]


def test_renames_that_need_nothing_of_ours(outcomes):
    for name in ("the cache's argument has another name", "the text model's output holds no cache"):
        assert outcomes[name] == {"untested": "right", "tested": "right"}


def test_edits_that_are_noticed(outcomes):
    """All others: the guard is not silent because nothing was edited."""
    noticed = [name for name in EDITS if outcomes[name]["untested"] != "right"]
    assert len(noticed) == len(EDITS) - 2


def test_versions():
    assert upstream.release("5.24.0.dev0") == (5, 24, 0) < upstream.release("5.24.1") < upstream.release("5.100")
    assert upstream.release(upstream.TESTED[0]) == (4, 57, 0)


@pytest.mark.parametrize("text", ["llama", "mistral_sliding", "qwen2_sliding"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_self_test_runs_once_and_passes_here(monkeypatch, text, attn):
    ran = []
    self_test = upstream._self_test
    monkeypatch.setattr(upstream, "_self_test", lambda *args: ran.append(args) or self_test(*args))
    monkeypatch.setattr(upstream, "_checked", {})
    make_model(text=text, attn=attn)
    assert not ran  # this version is in the tested range
    monkeypatch.setattr(upstream, "TESTED", ("4.0.0", "4.0.1"))
    for _ in range(2):
        make_model(text=text, attn=attn, seed=3)
    assert len(ran) == 1
    with torch.device("meta"):
        monkeypatch.setattr(upstream, "_checked", {})
        make_model(text=text, attn=attn, seed=3)
    assert len(ran) == 2


def test_self_test_leaves_seeds_alone(monkeypatch):
    expected = make_model(seed=3).state_dict()
    monkeypatch.setattr(upstream, "_checked", {})
    monkeypatch.setattr(upstream, "TESTED", ("4.0.0", "4.0.1"))
    for name, value in make_model(seed=3).state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_cache_that_misses_a_chunk_is_an_error():
    class Forgetful(DynamicCache):
        def update(self, key, value, layer_idx, *args, **kwargs):
            if layer_idx == 2:
                return key, value
            return super().update(key, value, layer_idx, *args, **kwargs)

    model = make_model(shortv_layers=[1, 2])
    inputs = make_inputs(model, ["ttItt"])
    with pytest.raises(ValueError, match="layer 2 of the cache has seen 0 tokens after a pass of 20"):
        model(**inputs, **{CACHE: Forgetful(config=model.config)})


@contextmanager
def nothing_deprecated():
    """Inside, Transformers must not say that a name is on its way out, by a warning or in its log."""
    transformers_logging.warning_once.cache_clear()
    records, handler = [], logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            warnings.simplefilter("error", DeprecationWarning)
            yield
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    names = ("past_key_values", "image_hidden_states", "cache")  # of ours; 5.0's pipeline has its own deprecated call
    assert not [record for record in records if "deprecat" in record and any(name in record for name in names)]


REDUCTION = pytest.mark.parametrize(
    "reduction", [None, {"method": "fastv", "k": 2}, {"method": "random", "token_num": 6}], ids=str
)


@REDUCTION
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_uses_no_deprecated_name(family, reduction):
    model = make_model(family, shortv_layers=[1, 2], visual_reduction=reduction)
    inputs = make_inputs(model, ["ttItt", "tIt"])
    with nothing_deprecated():
        model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[98])


@REDUCTION
def test_chat_and_pipeline_use_no_deprecated_name(tmp_path, reduction):
    model = make_model(shortv_layers=[1, 2], visual_reduction=reduction)
    model.generation_config.suppress_tokens = [98]
    model.save_pretrained(tmp_path)
    write_processor(tmp_path)
    model, processor = load(str(tmp_path))
    image = Image.new("RGB", (20, 14), "red")
    with nothing_deprecated():
        talk = Conversation(model, processor, max_new_tokens=2)
        talk.ask("what is this ?", [image])
        talk.ask("is this red ?", [] if reduction else [image])
        answer = transformers.pipeline("image-text-to-text", model=model, processor=processor)
        answer(text="<image> what is this ?", images=image, generate_kwargs={"max_new_tokens": 2, "do_sample": False})
