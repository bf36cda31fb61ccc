"""Write config, generation config, picture and model card of the paper's four ShortV repos into `hub_configs/`.

    python scripts/make_hub_configs.py [--output FOLDER [--overwrite]]

The paper's models are in `shortv_hf/hub/paper.py`. The cards quote what `scripts/results/` holds about them. Where the
folder of a demonstration model has a `results.json`, its card and picture are written too. The checkout's own
`hub_configs/` is written anew; in another FOLDER, the folders of the repos have to be new or empty.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoConfig

import shortv_hf  # noqa: F401  # registers the classes
from shortv_hf.data import outputs
from shortv_hf.flops import visual_tokens_of
from shortv_hf.hub.card import demo_card, reference_card
from shortv_hf.hub.paper import PAPER_MODELS, PaperModel
from shortv_hf.hub.provenance import FILES
from shortv_hf.layer_contribution import LayerRanking
from shortv_hf.pictures.plots import draw_frozen_layers


HUB_CONFIGS = Path(__file__).parent.parent / "hub_configs"
DEMOS = ("shortv-shapes-demo", "shortv-moving-shapes-demo")
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
    """A demonstration model's card, from its config and `results.json` (format: `shortv_hf.hub.card.demo_card`)."""
    config = AutoConfig.from_pretrained(folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    ranking = LayerRanking.load(folder / FILES["ranking"])
    with outputs.whole_file(folder / PICTURE) as picture:
        draw_frozen_layers(
            config, picture, round(ranking.text_tokens), round(ranking.visual_tokens), title=folder.name
        )
    outputs.write_text(folder / "README.md", str(demo_card(config, folder.name, results, PICTURE, ranking)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HUB_CONFIGS, help="default: hub_configs of the checkout")
    parser.add_argument("--overwrite", action="store_true", help="replace files of the same names in --output")
    args = parser.parse_args()
    output = args.output
    demos = [name for name in DEMOS if (output / name / "results.json").is_file()]
    try:
        for name in [*(model.repo for model in PAPER_MODELS.values()), *demos]:
            outputs.check_folder(output / name, args.overwrite, own=output.resolve() == HUB_CONFIGS.resolve())
    except ValueError as error:
        parser.error(str(error))
    for model in PAPER_MODELS.values():
        folder = output / model.repo
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in (("config.json", repo_config(model)), ("generation_config.json", GENERATION_CONFIG)):
            outputs.write_text(folder / file, json.dumps(content, indent=2, sort_keys=True) + "\n")
        config = model.config_class.from_pretrained(folder)
        with outputs.whole_file(folder / PICTURE) as picture:
            draw_frozen_layers(config, picture, t=64, v=visual_tokens_of(config))
        card = reference_card(
            config,
            model.repo,
            license=model.license,
            of_the_paper=True,
            picture=PICTURE,
            measured=measured(model.repo),
        )
        outputs.write_text(folder / "README.md", str(card))
        print(folder)
    for name in demos:
        write_demo_card(output / name)
        print(output / name)


if __name__ == "__main__":
    main()
