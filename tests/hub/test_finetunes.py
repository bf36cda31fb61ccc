"""A PEFT fine-tune of an original checkpoint on its way into a ShortV repo, merged and unmerged, as README shows it."""

import pytest
import torch
from helpers import make_inputs, make_model, make_stock, reference_forward
from processor_files import write_processor
from test_base_weights import write_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from shortv_hf import ShortVLlavaForConditionalGeneration
from shortv_hf.hub.build import build_repo_from_base
from shortv_hf.hub.check import check_repo
from shortv_hf.hub.loading import load


peft = pytest.importorskip("peft")
LAYERS = [3, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`base`, and `adapter`, a LoRA of it whose weights are not zero."""
    folder = tmp_path_factory.mktemp("finetune")
    write_processor(write_checkpoint(folder / "base", make_model()), tokenizer="prepend")
    model = LlavaForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)")
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    AutoProcessor.from_pretrained(folder / "base").save_pretrained(folder / "merged")
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    """Inputs, and logits of the merged stock model whose updates of visual tokens are thrown away in `LAYERS`."""
    stock = LlavaForConditionalGeneration.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    inputs = make_inputs(make_model(), ["ttItt"])
    with torch.no_grad():
        logits = reference_forward(stock, LAYERS, inputs).logits
        assert not torch.allclose(
            logits, reference_forward(make_stock(make_model()), LAYERS, inputs).logits, atol=1e-2
        )
    return inputs, logits


def logits_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_merged(folder, expected, tmp_path):
    """Build with the weights, since nobody else has them; the repo is in order and holds the fine-tune."""
    inputs, logits = expected
    config = ShortVLlavaForConditionalGeneration.config_class.from_pretrained(folder / "merged", shortv_layers=LAYERS)
    repo = build_repo_from_base(config, tmp_path / "repo", include_weights=True)
    assert [str(check) for check in check_repo(str(repo)) if check.problem] == []
    model = AutoModelForImageTextToText.from_pretrained(repo, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model, inputs), logits, atol=1e-4, rtol=1e-4)


def test_merged_by_reference_says_what_to_do(folder, tmp_path):
    config = ShortVLlavaForConditionalGeneration.config_class.from_pretrained(folder / "merged", shortv_layers=LAYERS)
    checks = check_repo(str(build_repo_from_base(config, tmp_path / "repo")))
    assert [check.problem for check in checks if check.name == "base"][0].endswith(
        "Build the repo with --include-weights, or publish the checkpoint and build from there"
    )


def test_unmerged(folder, expected):
    """The adapter's directory loads its base and itself; or the adapter goes on top of a ShortV model."""
    inputs, logits = expected
    model = ShortVLlavaForConditionalGeneration.from_pretrained(
        folder / "adapter", shortv_layers=LAYERS, dtype=torch.float32
    )
    torch.testing.assert_close(logits_of(model, inputs), logits, atol=1e-4, rtol=1e-4)
    model = ShortVLlavaForConditionalGeneration.from_pretrained(
        folder / "base", shortv_layers=LAYERS, dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(model, folder / "adapter")
    torch.testing.assert_close(logits_of(model, inputs), logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_is_no_checkpoint(folder):
    with pytest.raises(ValueError, match="is a PEFT adapter, not a checkpoint: merge it first"):
        load(str(folder / "adapter"))
