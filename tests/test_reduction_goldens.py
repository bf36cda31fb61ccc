"""The released code of FastV, VTW, VTC-CLS and LLaVA-PruMerge on tiny models.

The clone carries what the methods choose and compute (`scripts/trim_goldens.py` says what of it). With
`SHORTV_REDUCTION_GOLDENS=FOLDER`, which holds `fastv_vtw` and `vtc_cls_prumerge`, every case runs from the pixels to the
generated tokens.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig

from shortv_hf import ShortVLlavaConfig, ShortVLlavaForConditionalGeneration
from shortv_hf.layer_contribution.vtw import withdrawal_divergences
from shortv_hf.reduction import METHODS, ClsAttention, Patches
from shortv_hf.stream import Stream
from shortv_hf.upstream import CACHE, find_cache, image_features


SMALL = Path(__file__).parent / "goldens" / "reductions"
FULL = os.environ.get("SHORTV_REDUCTION_GOLDENS")
LOGITS = {"atol": 1e-4, "rtol": 0}
SCORES = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture
def scores(monkeypatch):
    """The scores of every choice that FastV makes."""
    found, choose = [], Stream.choose

    def recording(self, *args):
        choose(self, *args)
        found.extend(self.scores.values())

    monkeypatch.setattr(Stream, "choose", recording)
    return found


def small_config(layers):
    text = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4, vocab_size=320,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=48, patch_size=8,
        projection_dim=32,
    )  # fmt: skip
    return ShortVLlavaConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=319)


def kept_visual(output, k, visual):
    """Which of the visual tokens of one row layer `k` holds, counted among them."""
    numbers = visual[0].cumsum(0) - 1
    return [int(numbers[slot]) for slot in find_cache(output).layers[k].slots[0] if visual[0][slot]]


@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("prompt", "k", "ratio"),
    [
        ("P1", 1, 0.5),
        ("P1", 2, 0.25),
        ("P1", 2, 0.5),
        ("P1", 2, 0.75),
        ("P2", 2, 0.5),
        ("P3", 2, 0.5),
        ("B2b", 2, 0.5),
    ],
)
def test_fastv_choice(prompt, k, ratio, attn, scores):
    model = ShortVLlavaForConditionalGeneration(small_config(3)).eval()  # the third layer does not matter
    model.set_attn_implementation(attn)
    layers = model.model.language_model.layers
    layers.load_state_dict({**layers.state_dict(), **load_file(SMALL / "fastv_layers.safetensors")})
    tensors = load_file(SMALL / "fastv_cases.safetensors")
    model.set_visual_reduction({"method": "fastv", "k": k, "ratio": ratio})
    visual = tensors[f"{prompt}/visual_mask"]
    output = model(inputs_embeds=tensors[f"{prompt}/inputs_embeds"], visual_mask=visual, use_cache=True)
    case = f"{prompt}__K{k}_R{ratio}"
    torch.testing.assert_close(scores[0][visual], tensors[f"{case}/scores"][0], **SCORES)
    assert kept_visual(output, k, visual) == sorted(tensors[f"{case}/kept_visual"][0].tolist())


@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "layer", "token_num"), [("l0_t9", 0, 9), ("lm2_t12", -2, 12), ("l0_t2", 0, 2)])
def test_vtc_cls_choice(name, layer, token_num, attn):
    model = ShortVLlavaForConditionalGeneration(small_config(1)).eval()
    model.set_attn_implementation(attn)
    weights = load_file(SMALL / "vtc_cls_vision.safetensors")
    tower = model.model.vision_tower
    for part, module in (
        ("vision_tower.", getattr(tower, "vision_model", tower)),
        ("multi_modal_projector.", model.model.multi_modal_projector),
    ):
        module.load_state_dict({key.removeprefix(part): value for key, value in weights.items() if part in key})
    case = load_file(SMALL / "vtc_cls_cases.safetensors")
    case = {key.split("/")[1]: value for key, value in case.items() if key.startswith(f"a_vtc_{name}/")}
    model.set_visual_reduction({"method": "vtc_cls", "layer": layer, "token_num": token_num})
    features = model.get_image_features(pixel_values=case["pixel_values"])
    (features,) = image_features(features)
    kept = features.isfinite().all(-1)
    assert kept.nonzero()[:, 0].tolist() == case["keep_indices"][0].tolist()
    torch.testing.assert_close(features[kept], case["projected"][0], **LOGITS)


@torch.no_grad()
@pytest.mark.parametrize(("method", "case"), [("", "i11"), ("plus_", "i11"), ("plus_", "i17")])
def test_prumerge_tokens(method, case):
    tensors = load_file(SMALL / "prumerge.safetensors")
    reduction = METHODS["prumerge_plus" if method else "prumerge"]()
    states = tensors[f"{case}/states"]
    normed = torch.nn.functional.layer_norm(states, (32,), tensors["layer_norm1.weight"], tensors["layer_norm1.bias"])
    query, key = (
        torch.nn.functional.linear(normed, tensors[f"self_attn.{part}.weight"], tensors[f"self_attn.{part}.bias"])
        for part in ("q_proj", "k_proj")
    )
    vision = ClsAttention(query[:, 0], key, heads=4)
    name = f"b_prumerge_{method}{case}"
    attention = vision.row(heads=1)[0]
    torch.testing.assert_close(attention, tensors[f"{name}/cls_scores"][0], **SCORES)
    assert torch.equal(reduction.kept_patches(attention), tensors[f"{name}/keep_indices"][0])
    image = Patches.without_grid(len(attention), states.device)
    image.vision = [vision]
    tokens = reduction.reduce(image)
    tokens = tokens.apply(states[0, 1:])[tokens.kept]
    torch.testing.assert_close(tokens, tensors[f"{name}/features"][0], **LOGITS)


# The full set


def full_cases():
    cases = []
    for folder in ("fastv_vtw", "vtc_cls_prumerge") if FULL else ():
        manifest = json.loads((Path(FULL) / folder / "manifest.json").read_text())
        for case in manifest["cases"] + manifest.get("derived", []):
            if case.get("variant") in (None, "dense", "hf_cache", "vtw_keep"):
                cases.append(pytest.param(folder, case, id=case["name"]))
    return cases


def options_of(case):
    params = case.get("params", {})
    return {
        "dense": lambda: None,
        "fastv": lambda: {"method": "fastv", "k": case["K"], "ratio": case["R"]},
        "fastv+shortv": lambda: {"method": "fastv", "k": case["K"], "ratio": case["R"]},
        "vtw": lambda: {"method": "vtw", "k": case["K"]},
        "vtc_cls": lambda: {"method": "vtc_cls", "layer": params["layer"], "token_num": params["token_num"]},
        "prumerge": lambda: {"method": "prumerge"},
        "prumerge_plus": lambda: {"method": "prumerge_plus"},
        "prumerge_fixed": lambda: {"method": "prumerge_plus", "token_num": params["token_num"]},
    }[case["method"]]()


@pytest.fixture(scope="module")
def full_models():
    folders = {"f": "fastv_vtw/model", "a": "vtc_cls_prumerge/model_a_36p4l", "b": "vtc_cls_prumerge/model_b_576p24l"}
    load = ShortVLlavaForConditionalGeneration.from_pretrained
    return {name: load(Path(FULL) / folder, dtype=torch.float32) for name, folder in folders.items()}


@torch.no_grad()
@pytest.mark.skipif(not FULL, reason="SHORTV_REDUCTION_GOLDENS does not point to the full set")
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("folder", "case"), full_cases())
def test_full_case(full_models, folder, case, attn):
    model = full_models[case.get("model", "f") if folder != "fastv_vtw" else "f"]
    model.set_attn_implementation(attn)
    model.set_shortv_layers(case.get("shortv_layers", []))
    model.set_visual_reduction(options_of(case))
    tensors = load_file(Path(FULL) / folder / case["file"])
    inputs = {name: tensors[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    new_ids = tensors.get("expected.new_ids", tensors.get("expected.generated_ids"))
    rows = slice(0, 1) if case["name"] == "fastv_hf_cache__B2__K2_R0.5" else slice(None)  # its row 1: see B2b
    output = model(**inputs, use_cache=True)
    lengths = [layer.keys.shape[-2] for layer in find_cache(output).layers]
    assert lengths == case.get("kv_lens_after_prefill", [case.get("seq_len_after_prefill")] * 8)
    if case["method"].startswith("fastv") and 0 < case["R"] < 1:
        visual = inputs["input_ids"][:1] == model.config.image_token_id
        assert kept_visual(output, case["K"], visual) == sorted(tensors["expected.kept_visual"][0].tolist())
    for step in range(new_ids.shape[1]):
        expected = tensors["expected.step_logits"][rows, step]
        torch.testing.assert_close(output.logits[rows, -1], expected, **LOGITS)
        output = model(input_ids=new_ids[:, step : step + 1], **{CACHE: find_cache(output)})
    generated = model.generate(**inputs, max_new_tokens=new_ids.shape[1], do_sample=False, eos_token_id=-1)
    assert torch.equal(generated[rows, inputs["input_ids"].shape[1] :], new_ids[rows])


@pytest.mark.skipif(not FULL, reason="SHORTV_REDUCTION_GOLDENS does not point to the full set")
def test_full_withdrawal_divergences(full_models):
    model = full_models["f"]
    model.set_shortv_layers([])
    tensors = load_file(Path(FULL) / "fastv_vtw" / "cases" / "vtw_findk__P4.safetensors")
    inputs = {name: tensors[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    found = withdrawal_divergences(model, [inputs], layers=[5, 6, 7])
    torch.testing.assert_close(
        torch.tensor(list(found.values())), tensors["expected.kl"].flatten(), atol=1e-5, rtol=1e-3
    )
