"""The search itself: what `shortv search` does, without printing.

    result = search(model, samples, SearchOptions(max_kl=0.01))
    model.set_shortv_layers(result.best.shortv_layers)
    model.set_visual_reduction(result.best.visual_reduction)

Half of the samples choose, the other half judges: a set is never measured on the samples that it looked good on.

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
            as `data.Samples` can. Every second one judges.
        options: what to search.
        data: a name for the samples, kept in the result.
        progress: a folder for what has been measured, one line a sample; a search of the same model, samples and options
            that broke off goes on where it was.
        say: called with a line about what is done.

    Raises:
        ValueError: fewer than two samples, none with visual tokens, a batch of several rows, or a model that cannot freeze
            visual tokens.
    """
    options = options or SearchOptions()
    say = say or (lambda line: None)
    check_model(model)
    if iter(samples) is samples:
        samples = list(samples)
    summary, numbers, methods = DataSummary(data), [], None
    for number, sample in enumerate(samples):
        before = summary.visual
        summary.add(model, sample)
        numbers.append(number)
        if methods is None and summary.visual > before:
            methods = possible_methods(model, sample)
    if len(numbers) < 2:
        raise ValueError(
            f"a search needs 2 samples or more, to choose by one half and judge by the other; got {len(numbers)}"
        )
    facts = summary.fields("visual")
    prompt = Prompt(model.config, facts["text_tokens"], facts["visual_tokens"])
    methods = methods or []
    space = Space.of(model.config, options.parts, round(prompt.v), methods)
    parts = len(space.entries), len(space.tails), len(space.reductions)
    say("alone: {} updates, {} places to withdraw at, {} token reductions".format(*parts))
    seal = [describe_model(model), _weights(model), facts["data"]["sha256"], options.kl, outputs.versions()]

    def measure(which: str, first: int, one: Callable[[dict], dict], what: Any) -> list[dict]:
        """Of every second sample from the `first` on, what a pass says."""
        journal = _Journal(progress, which, [*seal, what])
        half = list(processes.share(numbers[first::2]))
        left = {number for _, number in half} - set(journal.rows)
        bar = logging.tqdm(total=len(half), initial=len(half) - len(left), desc=which)
        for number, sample in enumerate(samples):
            if number in left:
                journal.add(number, one(sample))
                bar.update()
        bar.close()
        rows: dict[int, dict] = dict(processes.gather(list(journal.rows.items())))
        return [rows[number] for number in numbers[first::2]]

    alone = measure(
        "choosing",
        0,
        lambda sample: isolated(model, sample, space, options.kl, options.layers_per_batch),
        asdict(space),
    )
    means = {name: _means([row[name] for row in alone]) for name in ("entries", "tails", "reductions")}
    for number, reduction in enumerate(space.reductions):
        prompt.left[key_of(reduction)] = _means([row["left"][number] for row in alone])
    schedules = Schedules(space, means, prompt)
    finalists = schedules.finalists(options.finalists, **options.budget)
    if not finalists:
        raise ValueError("nothing that was searched saves any FLOPs at less than 1 nat; search more parts")
    others = baselines(schedules.kl, space.tails, prompt, methods)
    say(f"together, on the other samples: {len(finalists)} schedules, {len(others)} methods alone")
    settings = [*(each.settings for each in finalists), *(each for _, each in others)]
    judged = measure(
        "judging",
        1,
        lambda sample: joint(model, sample, settings, options.kl),
        [settings_key(each) for each in settings],
    )
    for number, each in enumerate(settings):
        prompt.left.setdefault(key_of(each.visual_reduction), _means([row["left"][number] for row in judged]))
    kls = [[row["kl"][number] for row in judged] for number in range(len(settings))]
    rows = [_row(SEARCH, each.settings, prompt, kl, each) for each, kl in zip(finalists, kls, strict=False)]
    rows.sort(key=lambda row: (row.flops_ratio, row.kl))
    return SearchResult(
        rows=rows,
        baselines=[
            _row(name, each, prompt, kl) for (name, each), kl in zip(others, kls[len(finalists) :], strict=True)
        ],
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


def _means(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def _weights(model: PreTrainedModel) -> str:
    """A hash of the beginning of each parameter: whether two models of one name are the same."""
    digest = hashlib.sha256()
    for name, values in model.named_parameters():
        if not values.is_meta:
            digest.update(f"{name} {values.detach().flatten()[:16].float().tolist()}".encode())
    return digest.hexdigest()


class _Journal:
    """What was measured of each sample, on disk as it comes; in memory only, without a folder. Lines of another search
    (another `seal`) do not count."""

    def __init__(self, folder: Path | None, name: str, seal: list):
        self.rows: dict[int, dict] = {}
        self.seal = hashlib.sha256(json.dumps(seal, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.file = None if folder is None else folder / f"{name}.{processes.rank()}.jsonl"
        if self.file is None or folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            drop_half_a_line(self.file)
        for file in folder.glob(f"{name}.*.jsonl"):
            own = (line for line in read_appended(file) if line["seal"] == self.seal)
            self.rows |= {line["sample"]: line["found"] for line in own}

    def add(self, sample: int, found: dict):
        self.rows[sample] = found
        if self.file is not None:
            append_object(self.file, {"seal": self.seal, "sample": sample, "found": found})
