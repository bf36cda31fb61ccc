"""Every family against stock: the worst differences of tiny random models in float32, as a table.

    python scripts/measure_families.py [--output scripts/results/families.md]

Reference: the stock model, whose updates of visual tokens in frozen layers are thrown away (`tests/families.py`). Columns: whether
a model without frozen layers is bit-identical to stock; worst difference of logits at prefill and of six greedily decoded tokens,
with SDPA and with eager attention, over all kinds of inputs (one image; a left-padded batch with several; video where there is
one); a static cache; a padded row and the row alone; FastV, VTW and random reduction, cached against uncached or padded against
solo; and what freezing changes, without which agreement would mean nothing. "–": stock cannot, or the family has none.
With `--output`, tables of other versions in the file stay.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
import transformers


sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from families import (  # noqa: E402
    FAMILIES,
    KINDS,
    OTHERS,
    build,
    discard_updates,
    greedy,
    inputs,
    kinds,
    make_inputs,
    shortv_of,
    visual_mask,
)

import shortv_hf  # noqa: E402


LAYERS = [0, 2]


def release(name: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", name)]


def answers(model, given, **kwargs):
    output = greedy(model, given, 6, return_dict_in_generate=True, output_logits=True, **kwargs)
    return torch.stack(output.logits, dim=1)


def logits(model, given):
    return model(**given).logits[given["attention_mask"].bool()]


def worst(a, b) -> float:
    return float((a - b).abs().max())


def frozen_model(family: str, attn: str):
    stock = build(family, attn)
    if family in FAMILIES:
        return stock, shortv_of(stock, LAYERS)
    return stock, shortv_hf.apply_shortv(build.__wrapped__(family, attn), LAYERS)


@torch.no_grad()
def row(family: str) -> dict[str, str]:
    identical, effect, found = True, 0.0, {}
    for attn in (FAMILIES | OTHERS)[family].attentions:
        stock, model = frozen_model(family, attn)
        for kind in kinds(family):
            given, visual = inputs(family, kind), visual_mask(inputs(family, kind))
            dense = logits(stock, given), answers(stock, given)
            with model.using(shortv_layers=[]):
                identical &= torch.equal(logits(model, given), dense[0]) and torch.equal(
                    answers(model, given), dense[1]
                )
            with discard_updates(stock, LAYERS, visual):
                expected = logits(stock, given), answers(stock, given)
            for name, here, there in zip(
                ("prefill", "decode"), (logits(model, given), answers(model, given)), expected, strict=True
            ):
                found[f"{name}, {attn}"] = max(found.get(f"{name}, {attn}", 0.0), worst(here, there))
            effect = max(effect, worst(dense[0], expected[0]))
        if "padded, solo" not in found:
            found |= others(family, stock, model)
    cells = {name: "–" if value is None else f"{value:.0e}" for name, value in found.items()}
    return {"[] identical": "yes" if identical else "NO", **cells, "effect": f"{effect:.1f}"}


def others(family: str, stock, model) -> dict[str, float | None]:
    given = inputs(family, "images")
    found: dict[str, float | None] = {"static cache": None}
    try:
        answers(stock, given, cache_implementation="static")
        found["static cache"] = worst(answers(model, given, cache_implementation="static"), answers(model, given))
    except Exception as error:  # whatever stock raises
        print(f"{family}: stock has no static cache ({type(error).__name__})", file=sys.stderr)
    found["padded, solo"] = padded_against_solo(family, model)
    k = 3 if hasattr(model.config.vision_config, "deepstack_visual_indexes") else 2
    methods = {"fastv": {"k": k, "ratio": 0.5}, "vtw": {"k": k}, "random": {"token_num": 2}}
    for method, options in methods.items():
        with model.using(visual_reduction={"method": method, **options}):
            found[method] = padded_against_solo(family, model)
    return found


def padded_against_solo(family: str, model) -> float:
    rows = KINDS["images"]
    batch = answers(model, make_inputs(family, rows))
    solo = answers(model, make_inputs(family, rows[:1]))  # the first row's images are the batch's first
    return worst(batch[:1], solo)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = {}
    for family in [*FAMILIES, *OTHERS]:
        if not hasattr(transformers, f"{(FAMILIES | OTHERS)[family].stock}ForConditionalGeneration"):
            continue
        rows[family] = row(family)
        print(family, rows[family], file=sys.stderr)
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [f"## Transformers {transformers.__version__}", "", "| family | " + " | ".join(columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    lines += [
        f"| {name} | " + " | ".join(cells.get(column, "–") for column in columns) + " |"
        for name, cells in rows.items()
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    if arguments.output:
        parts = arguments.output.read_text().split("\n## ")[1:] if arguments.output.exists() else []
        kept = {part.splitlines()[0]: f"## {part.strip()}\n" for part in parts}
        kept[lines[0].removeprefix("## ")] = table
        head = "# Families against stock\n\nWritten by `scripts/measure_families.py`, which says what the columns are.\n\n"
        arguments.output.write_text(head + "\n".join(kept[name] for name in sorted(kept, key=release)))


if __name__ == "__main__":
    main()
