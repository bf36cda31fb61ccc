"""Write config, generation config and picture of the four ShortV repos of the paper into `hub_configs/`.

    python scripts/make_hub_configs.py [--output hub_configs]

What they hold is in `shortv_hf/paper_models.py`.
"""

import argparse
import json
from pathlib import Path

from shortv_hf.paper_models import PAPER_MODELS, PaperModel
from shortv_hf.plots import draw_frozen_layers


GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001}


def repo_config(model: PaperModel) -> dict:
    """`config.json` of one repo."""
    config = model.config()  # refuses what the class does not accept
    architecture = model.config_class.__name__.replace("Config", "ForConditionalGeneration")
    own = {"architectures": [architecture], "auto_map": config.to_dict()["auto_map"], "model_type": config.model_type}
    return {**own, **model.config_fields()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "hub_configs")
    output = parser.parse_args().output
    for model in PAPER_MODELS.values():
        folder = output / model.repo
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in (("config.json", repo_config(model)), ("generation_config.json", GENERATION_CONFIG)):
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (folder / file).write_text(text, encoding="utf-8")
        config = model.config_class.from_pretrained(folder)
        draw_frozen_layers(config, folder / "frozen_layers.png", t=64, v=2880 if "v1.6" in model.repo else 576)
        print(folder)


if __name__ == "__main__":
    main()
