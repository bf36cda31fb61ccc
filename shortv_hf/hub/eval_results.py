"""Scores in a ShortV repo: `.eval_results/shortv_eval.yaml`, as the Hub reads it, and the table of the model card from it.

The Hub's format (its documentation, "Evaluation results") has a data set, a task, a value and notes for each score. The
notes say under which settings it was measured; a repo that has others now has no use for it.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from ..data import outputs
from .card import UNMEASURED, markdown_table
from .names import is_hub_id


FOLDER = ".eval_results"
FILE = f"{FOLDER}/shortv_eval.yaml"
SETTINGS = re.compile(r"settings: (\{.*\})$")
START, END = "<!-- shortv eval -->", "<!-- end of shortv eval -->"
NEXT = "## License and citation"  # of every card


def settings_of(config: Any) -> dict:
    """What a repo's config freezes and reduces."""
    return {"shortv_layers": list(config.shortv_layers), "visual_reduction": config.visual_reduction}


def identity_of(folder: str | Path, config: Any) -> dict:
    """What a repo's scores depend on: its settings, and the base or, of weights of its own, how their files begin."""
    base = config.base_model_name_or_path
    if base is not None:
        return {
            **settings_of(config),
            "base": Path(base).name if Path(base).is_dir() else base,
            "revision": config.base_model_revision,
        }
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        with open(file, "rb") as content:
            digest.update(content.read(1 << 20))
    return {**settings_of(config), "weights": digest.hexdigest()[:16]}


def method_of(config: Any, methods: dict[str, dict]) -> str:
    """The name of the method of a report that is the repo as its config sets it. Raises `ValueError` if none is."""
    for name, settings in methods.items():
        if settings == settings_of(config):
            return name
    raise ValueError("the model as its config sets it is not among the methods; add --methods model")


def entries_of(report: dict, folder: str | Path, config: Any, date: str) -> list[dict]:
    """The scores of a report (`shortv eval`) as entries of the Hub's format.

    Args:
        report: its "conditions" and "results".
        folder, config: of the repo.
        date: of the evaluation, ISO 8601.

    Raises:
        ValueError: the repo as its config sets it was not evaluated.
    """
    conditions = report["conditions"]
    method = method_of(config, conditions["methods"])
    dense = next(iter(conditions["methods"]))
    base = {row["task"]: row for row in report["results"] if row["method"] == dense}
    entries = []
    for row in report["results"]:
        if row["method"] != method:
            continue
        notes = [row["title"], f"{row['answered']} questions" + (" (the first)" if conditions["limit"] else "")]
        if row["task"] in base:
            notes.append(f"dense {base[row['task']]['score']:.1f} in the same run")
        if "difference" in row:
            error = "" if row["error"] is None else f" ± {row['error']:.1f}"
            notes.append(f"paired difference {row['difference']:+.1f}{error} points")
        if "flops_ratio" in row["figures"]:
            notes.append(f"{row['figures']['flops_ratio']:.1%} of the language model's prefill FLOPs")
        versions = ", ".join(
            f"{name} {conditions[name]}" for name in ("lmms_eval", "shortv_hf", "transformers", "torch")
        )
        notes += [f"{row['metric']} of {versions}, {conditions['dtype']}, batch {conditions['batch_size']}"]
        notes += [f"settings: {json.dumps(identity_of(folder, config))}"]
        # A task whose questions are made, not read, has no data set on the Hub.
        data_set = row["data_set"] if is_hub_id(row["data_set"]) else f"shortv_hf/{row['task']}"
        entries.append(
            {
                "dataset": {"id": data_set, "task_id": row["task"]},
                "value": round(row["score"], 4),
                "date": date,
                "notes": "; ".join(notes),
            }
        )
    return entries


def write(folder: str | Path, entries: list[dict]):
    """Write the entries into a repo, beside those of other tasks that fit it as it is, and a table of all into its card, if
    it has one."""
    folder = Path(folder)
    new = {_key(each) for each in entries}
    settings = {_settings(each) for each in entries}
    before = [each for each in read(folder) if _key(each) not in new and _settings(each) in settings]
    entries = [*before, *entries]
    (folder / FOLDER).mkdir(exist_ok=True)
    outputs.write_text(folder / FILE, yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=1000))
    card = folder / "README.md"
    if card.is_file():
        outputs.rewrite_text(card, with_table(card.read_text(encoding="utf-8"), entries))


def _key(entry: dict) -> tuple[str, str]:
    return entry["dataset"]["id"], entry["dataset"]["task_id"]


def _settings(entry: dict) -> str | None:
    found = SETTINGS.search(entry.get("notes", ""))
    return found and found[1]


def read(folder: str | Path) -> list[dict]:
    """The entries in a repo, `[]` if it has none. Raises `ValueError` if they are not of the format."""
    file = Path(folder) / FILE
    if not file.is_file():
        return []
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
        for each in entries:
            str(each["dataset"]["id"]), str(each["dataset"]["task_id"]), float(each["value"])
            if not isinstance(each.get("notes", ""), str):
                raise TypeError
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{FILE} is no list of results: {type(error).__name__}") from None
    return entries


def check(folder: str | Path, config: PretrainedConfig) -> list[dict]:
    """The entries in a repo. Raises `ValueError` if one was measured under other settings than the config's."""
    entries = read(folder)
    for each in entries:
        found = _settings(each)
        if found is not None and json.loads(found) != json.loads(json.dumps(identity_of(folder, config))):
            raise ValueError(
                f"{FILE}: {each['dataset']['task_id']} was measured with {found}; evaluate again, or delete the file"
            )
    return entries


def with_table(card: str, entries: list[dict]) -> str:
    """A card with a section of the scores, before its license, in place of the one that it had, which is told by comments
    around it."""
    card = re.sub(f"{re.escape(START)}.*?{re.escape(END)}\n*", "", card, flags=re.S)
    card = card.replace(
        UNMEASURED, "This project has not measured the speed of this model itself; its quality [below](#evaluation)."
    )
    rows = []
    for each in entries:
        title, *notes = SETTINGS.sub("", each.get("notes", "")).strip("; ").split("; ")
        rows.append(
            [title or each["dataset"]["task_id"], f"{each['value']:.1f}", str(each.get("date", "")), "; ".join(notes)]
        )
    section = (
        f"{START}\n## Evaluation\n\nMeasured with `shortv eval` on lmms-eval's tasks ([`{FILE}`]({FILE})):\n\n"
        + markdown_table(["benchmark", "score", "date", "how"], rows)
        + f"\n{END}\n\n"
    )
    place = card.find(f"{NEXT}\n")
    return f"{card.rstrip()}\n\n{section}" if place < 0 else card[:place] + section + card[place:]
