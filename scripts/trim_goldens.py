"""Copy the part of the full golden data that the test suite carries: `python scripts/trim_goldens.py FULL_DIR`.

The full set is run with `SHORTV_GOLDENS=FULL_DIR pytest tests/test_goldens.py`.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


INPUTS = {"input_ids", "attention_mask", "pixel_values", "image_sizes", "visual_mask"}
LOGITS = {"prefill_logits_last", "step_logits", "generated_ids"}
CASES = {  # variant: case file → expected tensors kept beside the logits, as prefix/name
    "llava15_mha": {
        "k05": {"mixed5/hidden_states", "mixed5/key_cache", "mixed5/value_cache"},
        "k17": {"all/last_hidden_state"},
        "batch2_same_length": set(),
    },
    "llavanext_gqa": {
        "img100x70_k05": {"mixed5/last_hidden_state", "mixed5/key_cache"},
        "img50x120_k17": set(),
    },
}


def main(source: Path, target: Path):
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


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent.parent / "tests" / "goldens" / "shortv")
