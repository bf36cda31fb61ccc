"""Runs ShortV on edited copies of Transformers' modules: what a future version might do to us.

    python edited_upstream.py CASES      JSON: {case: [[module, region, pattern, replacement], ...]}

Each case runs in a process of its own, first as a version of the tested range, where only the checks made in every pass
are left, then as one that nobody has tested. Prints JSON: case → mode → what the user gets, an error or how far the
logits are from a stock model that throws away what frozen layers do to visual tokens.
"""

import importlib.abc
import importlib.machinery
import json
import os
import re
import sys

import torch  # noqa: F401  before the forks, since it is slow
import transformers  # noqa: F401


class EditedSource(importlib.machinery.SourceFileLoader):
    def __init__(self, name, path, edits):
        super().__init__(name, path)
        self.edits = edits

    def get_code(self, fullname):
        source = self.get_source(fullname)
        for region, *edit in self.edits:
            edited = re.sub(f"(?s){region}", lambda found, edit=edit: re.sub(*edit, found[0]), source)
            if edited == source:
                raise AssertionError(f"{fullname} has no {edit[0]!r} in {region!r}")
            source = edited
        return compile(source, self.path, "exec", dont_inherit=True)


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self, edits):
        self.edits = {}
        for module, *edit in edits:
            if f"transformers.{module}" in sys.modules:
                raise AssertionError(f"{module} is imported already")
            self.edits.setdefault(f"transformers.{module}", []).append(edit)

    def find_spec(self, name, path, target=None):
        if name not in self.edits:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = EditedSource(name, spec.origin, self.edits[name])
        return spec


def outcome(untested: bool) -> dict:
    """What the user gets, and the logits under reduction methods, to be compared with those of unedited modules."""
    from shortv_hf import upstream

    if untested:
        upstream.TESTED = ("4.0.0", "4.0.1")
    from helpers import make_inputs, make_model, make_stock, reference_forward
    from transformers import DynamicCache

    layers, reductions = [1, 3], [None, {"method": "fastv", "k": 2}, {"method": "random", "token_num": 6}]
    worst, reduced = 0.0, []
    for reduction in reductions:
        model = make_model(shortv_layers=layers, visual_reduction=reduction)
        if reduction is not None:
            with torch.no_grad():
                reduced.append(model(**make_inputs(model, ["ttItt", "tIttttIt"])).logits[:, -1].tolist())
        inputs = make_inputs(model, ["ttItt"])
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(**inputs, **{upstream.CACHE: cache})
            step = {"input_ids": torch.tensor([[7]]), upstream.CACHE: cache}
            logits = model(**step).logits[:, -1]
            if reduction is None:
                longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], step["input_ids"]], 1)}
                longer["attention_mask"] = torch.ones_like(longer["input_ids"])
                expected = reference_forward(make_stock(model), layers, longer, use_cache=False).logits[:, -1]
                worst = max(worst, float((logits - expected).abs().max()))
    return {"text": f"off by {worst:.0e}" if worst > 1e-4 else "right", "reduced": reduced}


def run(edits) -> dict[str, dict]:
    """[`outcome`] in a fork, in which nothing of what is edited has been imported."""
    read, write = os.pipe()
    if os.fork() == 0:
        found = {}
        sys.meta_path.insert(0, Finder(edits))
        for mode in ("tested", "untested"):
            try:
                found[mode] = outcome(mode == "untested")
            except BaseException as error:
                found[mode] = {"text": f"{type(error).__name__}: {error}"}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.wait()
    return json.loads(text)


if __name__ == "__main__":
    outcomes = {name: run(edits) for name, edits in json.loads(sys.argv[1]).items()}
    for modes in outcomes.values():
        for mode, found in modes.items():
            if "reduced" in found:
                off = torch.tensor(found["reduced"]) - torch.tensor(outcomes["none"][mode]["reduced"])
                found["text"] = f"off by {off.abs().max():.0e}" if off.abs().max() > 1e-4 else found["text"]
    print(
        json.dumps({name: {mode: found["text"] for mode, found in modes.items()} for name, modes in outcomes.items()})
    )
