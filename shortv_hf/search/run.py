"""The search itself: what `shortv search` does, without printing.

    result = search(model, samples, SearchOptions(max_kl=0.01))
    model.set_shortv_layers(result.best.shortv_layers)
    model.set_visual_reduction(result.best.visual_reduction)

Half of the samples propose, the other half judges: no set is measured on the samples that proposed it. (The row that is taken
is the best of about twenty on those that judge, so its KL is rather too low.)

    1. each change alone, one dense pass a sample whose states are kept (`passes.py`)
    2. the best schedules by sums of these, offline (`choose.py`, `knapsack.py`)
    3. about twenty of them, together with methods alone, on the other samples

Under `accelerate launch` or `torch.distributed.run` each process takes its share of the samples, and all get the result.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..data import outputs, processes
from ..data.inputs import feature_mask
from ..data.jsonl import append_object, drop_half_a_line, read_appended
from ..layer_contribution.freezing import check_model
from ..layer_contribution.kl import Settings, check_direction
from ..layer_contribution.ranking import DataSummary, describe_model
from .baselines import baselines
from .choose import Prompt, Schedule, Schedules, key_of, settings_key
from .passes import isolated, joint, possible_methods
from .result import SEARCH, Row, SearchResult, choose, standard_error
from .space import DEFAULT_PARTS, Space, check_parts


@dataclass(frozen=True)
class SearchOptions:
    """What to search, and for what. At most one of the two budgets.

    Attributes:
        max_kl: the cheapest schedule that costs at most this KL, in nats.
        flops_ratio: the schedule with the lowest KL at this share of the dense prefill's FLOPs, above 0 up to 1
            ([`result.choose`] says what that is among ties).
        parts: see `space.py`.
        kl: "forward" (the paper's direction) or "reverse".
        finalists: about how many schedules are measured.
        layers_per_batch: how many changes share a pass; memory and speed only.
    """

    max_kl: float | None = None
    flops_ratio: float | None = None
    parts: tuple[str, ...] = DEFAULT_PARTS
    kl: str = "forward"
    finalists: int = 20
    layers_per_batch: int = 4

    def __post_init__(self):
        if self.max_kl is not None and self.flops_ratio is not None:
            raise ValueError("max_kl and flops_ratio exclude each other")
        if self.max_kl is not None and not self.max_kl >= 0:
            raise ValueError(f"max_kl is {self.max_kl}; a KL divergence is 0 or more")
        if self.flops_ratio is not None and not 0 < self.flops_ratio <= 1:
            raise ValueError(f"flops_ratio is {self.flops_ratio}; the valid range is above 0 up to 1")
        if self.finalists < 2:
            raise ValueError(f"finalists is {self.finalists}; the least is 2")
        check_parts(self.parts)
        check_direction(self.kl)

    @property
    def budget(self) -> dict[str, float]:
        given = {"max_kl": self.max_kl, "flops_ratio": self.flops_ratio}
        return {name: value for name, value in given.items() if value is not None}


def search(
    model: PreTrainedModel,
    samples: Iterable[dict],
    options: SearchOptions | None = None,
    *,
    data: str | None = None,
    progress: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> SearchResult:
    """Search schedules for a model. It stays as it was; what it is set to does not count.

    Args:
        model: a ShortV model, or a stock one after `apply_shortv(model, [])`.
        samples: model inputs of one row each, two at least; kept for several passes unless they can be gone through again,
            as `data.Samples` can. Those without visual tokens are left out; of the others, every second one judges.
        options: what to search.
        data: a name for the samples, kept in the result.
        progress: a folder for what has been measured, one line a sample; a search of the same model, samples and options
            that broke off goes on where it was.
        say: called with a line about what is done.

    Raises:
        ValueError: fewer than two samples with visual tokens, a batch of several rows, or a model that cannot freeze visual
            tokens.
    """
    options = options or SearchOptions()
    say = say or (lambda line: None)
    check_model(model)
    if iter(samples) is samples:
        samples = list(samples)
    summary = DataSummary(data)
    numbers: list[int] = []
    methods: list[str] = []
    for number, sample in enumerate(samples):
        if not feature_mask(model.config, sample).any():
            continue  # freezing changes nothing in it
        summary.add(model, sample)
        if not numbers:
            methods = possible_methods(model, sample)
        numbers.append(number)
    if len(numbers) < 2:
        raise ValueError(
            "a search needs 2 samples with visual tokens or more, to choose by one half and judge by the other; got "
            f"{len(numbers)}"
        )
    facts = summary.fields("visual")
    prompt = Prompt(model.config, facts["text_tokens"], facts["visual_tokens"])
    space = Space.of(model.config, options.parts, round(prompt.v), methods)
    parts = len(space.entries), len(space.tails), len(space.reductions)
    say("alone: {} updates, {} places to withdraw at, {} token reductions".format(*parts))
    seal = [describe_model(model), _weights(model), facts["data"]["sha256"], options.kl, outputs.versions()]

    def measure(which: str, first: int, wanted: list[str], one: Callable[[dict, list[str]], dict]) -> list[dict]:
        """Of every second sample from the `first` on, what `one(sample, keys)` says of the wanted keys; what the journal knows
        is not asked again."""
        journal = _Journal(progress, which, seal)
        own = [number for _, number in processes.share(numbers[first::2])]
        missing = {n: keys for n in own if (keys := [key for key in wanted if key not in journal.rows.get(n, {})])}
        bar = logging.tqdm(total=len(own), initial=len(own) - len(missing), desc=which)
        for number, sample in enumerate(samples if missing else ()):
            if number in missing:
                journal.add(number, one(sample, missing[number]))
                bar.update()
        bar.close()
        rows: dict[int, dict] = {}
        for number, found in processes.gather(list(journal.rows.items())):
            rows.setdefault(number, {}).update(found)
        return [rows[number] for number in numbers[first::2]]

    key = _digest(asdict(space))
    found = measure(
        "choosing",
        0,
        [key],
        lambda sample, _: {key: isolated(model, sample, space, options.kl, options.layers_per_batch)},
    )
    alone = [row[key] for row in found]
    means = {name: _means([row[name] for row in alone]) for name in ("entries", "tails", "reductions")}
    for number, reduction in enumerate(space.reductions):
        prompt.left[key_of(reduction)] = _share_left([(row["left"][number], row["visual"]) for row in alone])
    schedules = Schedules(space, means, prompt)
    finalists = schedules.finalists(options.finalists, **options.budget)
    if not finalists:
        raise ValueError(
            "nothing that was searched saves any FLOPs at a KL that is worth measuring; search more parts"
        )
    others = baselines(schedules.kl, space.tails, prompt, methods)
    say(f"together, on the other samples: {len(finalists)} schedules, {len(others)} methods alone")
    by_key = {
        settings_key(each): each for each in [*(each.settings for each in finalists), *(each for _, each in others)]
    }

    def judge(sample: dict, keys: list[str]) -> dict[str, dict]:
        found = joint(model, sample, [by_key[key] for key in keys], options.kl)
        values = zip(keys, found["kl"], found["left"], strict=True)
        return {key: {"kl": kl, "left": left, "visual": found["visual"]} for key, kl, left in values}

    judged = measure("judging", 1, list(by_key), judge)
    for key, each in by_key.items():
        left = _share_left([(row[key]["left"], row[key]["visual"]) for row in judged])
        prompt.left.setdefault(key_of(each.visual_reduction), left)
    kls = {key: [row[key]["kl"] for row in judged] for key in by_key}
    rows = [_row(SEARCH, each.settings, prompt, kls[settings_key(each.settings)], each) for each in finalists]
    rows.sort(key=lambda row: (row.flops_ratio, row.kl))
    return SearchResult(
        rows=rows,
        baselines=[_row(name, each, prompt, kls[settings_key(each)]) for name, each in others],
        chosen=choose(rows, **options.budget),
        budget=options.budget,
        alone={
            "entries": [list(pair) for pair in schedules.kl.items()],
            "reductions": [[reduction, kl] for reduction, kl, *_ in schedules.reductions if reduction is not None],
        },
        text_tokens=prompt.t,
        visual_tokens=prompt.v,
        parts=list(options.parts),
        kl=options.kl,
        samples={"choosing": len(alone), "judging": len(judged)},
        model=describe_model(model),
        data=facts["data"],
    )


def _row(name: str, settings: Settings, prompt: Prompt, kl: list[float], schedule: Schedule | None = None) -> Row:
    return Row(
        name=name,
        shortv_layers=list(settings.shortv_layers),
        visual_reduction=settings.visual_reduction,
        flops_ratio=prompt.flops_ratio(settings),
        cache_ratio=prompt.cache_ratio(settings),
        kl=sum(kl) / len(kl),
        kl_error=standard_error(kl),
        sample_kl=kl,
        predicted_kl=None if schedule is None else schedule.predicted_kl,
    )


def _share_left(counts: list[tuple[list[int], int]]) -> list[float]:
    """The share of all samples' visual tokens that each layer sees, of what it sees of each sample's."""
    total = sum(visual for _, visual in counts)
    return [sum(column) / total for column in zip(*(seen for seen, _ in counts), strict=True)]


def _means(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def _weights(model: PreTrainedModel) -> str:
    """A hash of the beginning of each parameter: whether two models of one name are the same."""
    digest = hashlib.sha256()
    for name, values in model.named_parameters():
        if not values.is_meta:
            digest.update(f"{name} {values.detach().flatten()[:16].float().tolist()}".encode())
    return digest.hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


class _Journal:
    """What was measured of each sample, by key, on disk as it comes; in memory only, without a folder. Lines of other models,
    samples or versions (another `seal`) do not count."""

    def __init__(self, folder: Path | None, name: str, seal: list):
        self.rows: dict[int, dict] = {}
        self.seal = _digest(seal)
        self.file = None if folder is None else folder / f"{name}.{processes.rank()}.jsonl"
        if self.file is None or folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            drop_half_a_line(self.file)
        for file in folder.glob(f"{name}.*.jsonl"):
            for line in read_appended(file):
                if line["seal"] == self.seal:
                    self.rows.setdefault(line["sample"], {}).update(line["found"])

    def add(self, sample: int, found: dict):
        self.rows.setdefault(sample, {}).update(found)
        if self.file is not None:
            append_object(self.file, {"seal": self.seal, "sample": sample, "found": found})
