"""Copy the part of the full golden data that the test suite carries.

    python scripts/trim_goldens.py shortv FULL_DIR        # run in full: SHORTV_GOLDENS=FULL_DIR pytest tests/test_goldens.py
    python scripts/trim_goldens.py reductions FULL_DIR    # SHORTV_REDUCTION_GOLDENS=FULL_DIR pytest tests/test_reduction_goldens.py

    python scripts/trim_goldens.py illava FULL_DIR        # SHORTV_REDUCTION_GOLDENS=FULL_DIR pytest tests/test_illava_goldens.py

For the reductions FULL_DIR holds `fastv_vtw` and `vtc_cls_prumerge`. Their three models are too large to carry, so the
small set tests what the methods choose and compute, not the logits that follow: FastV's scores and kept tokens from the
first two decoder layers, VTC-CLS's with the whole vision tower, PruMerge's tokens from the input of CLIP's last layer.
For iLLaVA it holds `illava`: Qwen2-VL's model is carried whole, of LLaVA-OneVision's the vision tower.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from shortv_hf.upstream import used_image_features


INPUTS = {"input_ids", "attention_mask", "pixel_values", "image_sizes", "visual_mask"}
LOGITS = {"prefill_logits_last", "step_logits", "generated_ids"}
CASES = {  # variant: case file → expected tensors kept beside the logits, as prefix/name
    "llava15_mha": {
        "k05": {"mixed5/key_cache", "mixed5/value_cache"},
        "k17": {"all/last_hidden_state"},
        "batch2_same_length": set(),
    },
    "llavanext_gqa": {
        "img100x70_k05": {"mixed5/last_hidden_state", "mixed5/key_cache"},
        "img50x120_k17": set(),
    },
}


FASTV = (  # their scores need no more than two layers
    "P1__K1_R0.5", "P1__K2_R0.25", "P1__K2_R0.5", "P1__K2_R0.75", "P2__K2_R0.5", "P3__K2_R0.5", "B2b__K2_R0.5",
)  # fmt: skip
VTC_CLS = ("a_vtc_l0_t9", "a_vtc_lm2_t12", "a_vtc_l0_t2")
PRUMERGE = ("b_prumerge_i11", "b_prumerge_plus_i11", "b_prumerge_plus_i17")


ILLAVA = {
    "ov": ("both_single", "both_video"),
    "q2vl": ("both_image", "llm_two_images_adjacent", "llm_video", "both_video"),
}
ILLAVA_FIELDS = {
    "kind", "illava_config", "patches_per_image", "hf_batch_num_images", "hf_vision_aspect_ratio",
    "cache_len_per_layer_after_8_tokens",
}  # fmt: skip


def trim_illava(source: Path, target: Path):
    for family, names in ILLAVA.items():
        folder, tower_alone = target / family, family == "ov"
        (folder / "cases").mkdir(parents=True, exist_ok=True)
        (folder / "model").mkdir(exist_ok=True)
        weights = load_file(source / family / "model" / "model.safetensors")
        if tower_alone:
            weights = {name: value for name, value in weights.items() if "language_model" not in name}
        shutil.copyfile(source / family / "model" / "config.json", folder / "model" / "config.json")
        save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
        cases = json.loads((source / family / "manifest.json").read_text())["cases"]
        slim = {name: {key: value for key, value in cases[name].items() if key in ILLAVA_FIELDS} for name in names}
        (folder / "manifest.json").write_text(json.dumps({"cases": slim}, indent=1) + "\n")
        for name in names:
            tensors = load_file(source / family / "cases" / f"{name}.safetensors")
            kept = {
                key: value
                for key, value in tensors.items()
                if not key.startswith("official") and "_official" not in key
            }
            if tower_alone:  # with the logits, which mark that a variant is there
                kept = {k: v for k, v in kept.items() if "/" not in k or "/vit" in k or k == "fp32_causal/logits"}
            save_file(kept, folder / "cases" / f"{name}.safetensors")
    masks = load_file(source / "ov" / "vis_masks.safetensors")  # tests/pictures
    kept = {name: mask for name, mask in masks.items() if name.startswith(("vis_1x1/", "both_video/"))}
    save_file(kept, target / "ov" / "vis_masks.safetensors")


def trim_shortv(source: Path, target: Path):
    for variant, cases in CASES.items():
        folder = target / variant
        (folder / "cases").mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "generation_config.json", "lc.safetensors", "model.safetensors"):
            shutil.copyfile(source / variant / name, folder / name)
        manifest = json.loads((source / variant / "manifest.json").read_text())
        files = {f"cases/{name}.safetensors" for name in cases}
        kept = [case for case in manifest["cases"] if case["file"] in files]
        quirks = manifest.get("quirks", [])
        for name, extra in cases.items():
            tensors = load_file(source / variant / "cases" / f"{name}.safetensors")
            chosen = {k: v for k, v in tensors.items() if k in INPUTS | extra or k.split("/")[-1] in LOGITS}
            save_file(chosen, folder / "cases" / f"{name}.safetensors")
        for name in set(manifest["lc"]["samples"]) - set(cases):  # calibration samples are inputs, no cases
            tensors = load_file(source / variant / "cases" / f"{name}.safetensors")
            save_file({k: v for k, v in tensors.items() if k in INPUTS}, folder / "cases" / f"{name}.safetensors")
        for quirk in quirks:  # inputs only: what the released code answers there is not the target
            (folder / "quirks").mkdir(exist_ok=True)
            tensors = load_file(source / variant / quirk["file"])
            save_file({k: v for k, v in tensors.items() if k in INPUTS}, folder / quirk["file"])
        fields = ("id", "file", "replaced_layers", "expected_prefix")
        slim = {
            "cases": [{key: case[key] for key in fields} for case in kept],
            "quirks": [{key: quirk[key] for key in fields} for quirk in quirks],
            "lc": {key: manifest["lc"][key] for key in ("file", "samples", "definition", "order")},
        }
        (folder / "manifest.json").write_text(json.dumps(slim, indent=1) + "\n")


@torch.no_grad()
def trim_reductions(source: Path, target: Path):
    target.mkdir(parents=True, exist_ok=True)
    folder = source / "fastv_vtw"
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    layers = model.model.language_model.layers[:2].state_dict()
    save_file({**layers}, target / "fastv_layers.safetensors")
    cases, inputs = {}, {}
    for name in FASTV:
        tensors = load_file(folder / "cases" / f"fastv_hf_cache__{name}.safetensors")
        prompt = name.split("__")[0]
        visual = tensors["input_ids"] == model.config.image_token_id
        output = model(**{key: tensors[key] for key in ("input_ids", "attention_mask", "pixel_values")})
        embeds = model.get_input_embeddings()(tensors["input_ids"])
        embeds[visual] = used_image_features(output)
        inputs[f"{prompt}/inputs_embeds"], inputs[f"{prompt}/visual_mask"] = embeds, visual
        cases[f"{name}/kept_visual"] = tensors["expected.kept_visual"]
        cases[f"{name}/scores"] = tensors["expected.scores"]
    save_file({**inputs, **cases}, target / "fastv_cases.safetensors")

    folder = source / "vtc_cls_prumerge"
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model_a_36p4l", dtype=torch.float32)
    vision = {f"vision_tower.{name}": value for name, value in model.model.vision_tower.state_dict().items()}
    projector = model.model.multi_modal_projector.state_dict()
    vision |= {f"multi_modal_projector.{name}": value for name, value in projector.items()}
    vision.pop("vision_tower.vision_model.embeddings.position_ids", None)
    save_file(vision, target / "vtc_cls_vision.safetensors")
    cases = {}
    for name in VTC_CLS:
        tensors = load_file(folder / "cases" / f"{name}.safetensors")
        for key in ("pixel_values", "expected.cls_scores", "expected.keep_indices", "expected.projected"):
            cases[f"{name}/{key.removeprefix('expected.')}"] = tensors[key]
    save_file(cases, target / "vtc_cls_cases.safetensors")

    model = LlavaForConditionalGeneration.from_pretrained(folder / "model_b_576p24l", dtype=torch.float32)
    tower = model.model.vision_tower
    layer = getattr(tower, "vision_model", tower).encoder.layers[-1]
    tensors = {
        name: value for name, value in layer.state_dict().items() if name.startswith(("self_attn", "layer_norm1"))
    }
    tensors = {name: value for name, value in tensors.items() if "v_proj" not in name and "out_proj" not in name}
    for name in PRUMERGE:
        case = load_file(folder / "cases" / f"{name}.safetensors")
        image = name.split("_")[-1]
        tensors[f"{image}/states"] = tower(case["pixel_values"], output_hidden_states=True).hidden_states[-2]
        for key in ("expected.cls_scores", "expected.keep_indices", "expected.features"):
            if key in case:  # no scores in some
                tensors[f"{name}/{key.removeprefix('expected.')}"] = case[key]
    save_file({name: value.contiguous() for name, value in tensors.items()}, target / "prumerge.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("shortv", "reductions", "illava"))
    parser.add_argument("source", type=Path, help="directory of the full set")
    arguments = parser.parse_args()
    kind, source = arguments.kind, arguments.source
    goldens = Path(__file__).parent.parent / "tests" / "goldens"
    if kind == "shortv":
        trim_shortv(source, goldens / "shortv")
    elif kind == "illava":
        trim_illava(source / "illava", goldens / "illava")
    else:
        trim_reductions(source, goldens / "reductions")
