"""Write config, generation config, picture and model card of the paper's four ShortV repos into `hub_configs/`.

    python scripts/make_hub_configs.py [--output hub_configs]

The architectures are those of the original `llava-hf` checkpoints, the frozen layers those of Table 8 in its order.
Only fields that both Transformers lines read alike are written. The cards quote what `scripts/results/` holds about
these models. Where the folder of the demonstration model has a `results.json`, its card is written too.
"""

import argparse
import json
from pathlib import Path

from benchmark import REPOS as BENCHMARKED

from shortv_hf.configuration_shortv import ShortVLlavaConfig, ShortVLlavaNextConfig
from shortv_hf.model_card import demo_card, reference_card
from shortv_hf.plots import draw_frozen_layers


VISION = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
TEXT = {
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "vocab_size": 32064,
}
TEXT_7B = {
    **TEXT,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
}
TEXT_13B = {
    **TEXT,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
NEXT = {
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "use_image_newline_parameter": True,
}
# fmt: off
REPOS = {  # name: (config class, base, its commit, text config, more fields, Table 8)
    "shortv-llava-1.5-7b-hf": (
        ShortVLlavaConfig, "llava-hf/llava-1.5-7b-hf", "b234b804b114d9e37bb655e11cbbb5f5e971b7a9", TEXT_7B, {},
        [31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19],
    ),
    "shortv-llava-1.5-13b-hf": (
        ShortVLlavaConfig, "llava-hf/llava-1.5-13b-hf", "5dda2880bda009266dda7c4baff660b95ca64540", TEXT_13B, {},
        [39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31, 2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17],
    ),
    "shortv-llava-v1.6-vicuna-7b-hf": (
        ShortVLlavaNextConfig, "llava-hf/llava-v1.6-vicuna-7b-hf", "c916e6cdcd760b4cecd1dd4907f84ac649f93b23",
        TEXT_7B, NEXT, [31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2],
    ),
    "shortv-llava-v1.6-vicuna-13b-hf": (
        ShortVLlavaNextConfig, "llava-hf/llava-v1.6-vicuna-13b-hf", "e66fcaaa7d502b1037c8465375bb67f4c33758dd",
        TEXT_13B, NEXT,
        [39, 32, 29, 36, 27, 30, 37, 23, 25, 31, 26, 2, 28, 22, 33, 35, 34, 24, 38, 21, 20, 18, 1, 17],
    ),
}
# fmt: on
DEMO = "shortv-shapes-demo"
PICTURE = "frozen_layers.png"
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001}


def repo_config(name: str) -> dict:
    """`config.json` of one repo."""
    config_class, base, revision, text_config, more, layers = REPOS[name]
    fields = {
        "dtype": "float16",
        "ignore_index": -100,
        "image_seq_length": 576,
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": text_config,
        "tie_word_embeddings": False,
        "vision_config": VISION,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "shortv_layers": layers,
        "visual_reduction": None,
        "base_model_name_or_path": base,
        "base_model_revision": revision,
        **more,
    }
    config = config_class.from_dict(json.loads(json.dumps(fields)))  # refuses what the class does not accept
    architecture = config_class.__name__.replace("Config", "ForConditionalGeneration")
    own = {"architectures": [architecture], "auto_map": config.to_dict()["auto_map"], "model_type": config.model_type}
    return {**own, **fields}


def measured(name: str, results: Path = Path(__file__).parent / "results") -> list[dict]:
    """The benchmark reports in `results`, cut down to one repo."""
    reports = []
    for file in sorted(results.glob("*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        rows = [result for result in report.get("results", ()) if BENCHMARKED.get(result.get("model")) == name]
        if rows:
            reports.append({"conditions": report["conditions"], "results": rows})
    return reports


def write_demo_card(folder: Path):
    """The demonstration model's card, from its config and `results.json` (format: `shortv_hf.model_card.demo_card`)."""
    config = ShortVLlavaConfig.from_pretrained(folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    card = demo_card(config, folder.name, results, PICTURE if (folder / PICTURE).is_file() else None)
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "hub_configs")
    output = parser.parse_args().output
    for name in REPOS:
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in (("config.json", repo_config(name)), ("generation_config.json", GENERATION_CONFIG)):
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (folder / file).write_text(text, encoding="utf-8")
        config = REPOS[name][0].from_pretrained(folder)
        draw_frozen_layers(config, folder / PICTURE, t=64, v=2880 if "v1.6" in name else 576)
        card = reference_card(
            config, name, license="llama2", of_the_paper=True, picture=PICTURE, measured=measured(name)
        )
        (folder / "README.md").write_text(str(card), encoding="utf-8")
        print(folder)
    if (output / DEMO / "results.json").is_file():
        write_demo_card(output / DEMO)
        print(output / DEMO)


if __name__ == "__main__":
    main()
