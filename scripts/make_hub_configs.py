"""Write config, generation config, picture and model card of the paper's four ShortV repos into `hub_configs/`.

    python scripts/make_hub_configs.py [--output hub_configs]

The paper's models are in `shortv_hf/paper_models.py`. The cards quote what `scripts/results/` holds about them. Where the
folder of the demonstration model has a `results.json`, its card and picture are written too.
"""

import argparse
import json
from pathlib import Path

from shortv_hf.configuration_shortv import ShortVLlavaConfig
from shortv_hf.model_card import demo_card, reference_card
from shortv_hf.paper_models import PAPER_MODELS, PaperModel
from shortv_hf.plots import draw_frozen_layers


DEMO = "shortv-shapes-demo"
PICTURE = "frozen_layers.png"
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001}


def repo_config(model: PaperModel) -> dict:
    """`config.json` of one repo."""
    config = model.config()  # refuses what the class does not accept
    architecture = model.config_class.__name__.replace("Config", "ForConditionalGeneration")
    own = {"architectures": [architecture], "auto_map": config.to_dict()["auto_map"], "model_type": config.model_type}
    return {**own, **model.config_fields()}


def measured(name: str, results: Path = Path(__file__).parent / "results") -> list[dict]:
    """The benchmark reports in `results`, cut down to one repo."""
    repos = {model: paper_model.repo for model, paper_model in PAPER_MODELS.items()}
    reports = []
    for file in sorted(results.glob("*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        rows = [result for result in report.get("results", ()) if repos.get(result.get("model")) == name]
        if rows:
            reports.append({"conditions": report["conditions"], "results": rows})
    return reports


def write_demo_card(folder: Path):
    """The demonstration model's card, from its config and `results.json` (format: `shortv_hf.model_card.demo_card`)."""
    config = ShortVLlavaConfig.from_pretrained(folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    draw_frozen_layers(config, folder / PICTURE, t=13, v=64, title=folder.name)
    card = demo_card(config, folder.name, results, PICTURE)
    (folder / "README.md").write_text(str(card), encoding="utf-8")


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
        draw_frozen_layers(config, folder / PICTURE, t=64, v=2880 if "v1.6" in model.repo else 576)
        card = reference_card(
            config, model.repo, license="llama2", of_the_paper=True, picture=PICTURE, measured=measured(model.repo)
        )
        (folder / "README.md").write_text(str(card), encoding="utf-8")
        print(folder)
    if (output / DEMO / "results.json").is_file():
        write_demo_card(output / DEMO)
        print(output / DEMO)


if __name__ == "__main__":
    main()
