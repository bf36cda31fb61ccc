"""What a search has found: schedules with what they cost and save, measured on samples that did not choose them."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from transformers import PretrainedConfig

from ..data import outputs
from ..data.jsonl import read_json
from ..layer_contribution.kl import Settings


SEARCH = "search"  # the name of rows that are its own


@dataclass(frozen=True)
class Row:
    """Settings, measured.

    Attributes:
        name: "search", or that of a method alone.
        shortv_layers, visual_reduction: fields of the config.
        flops_ratio: of the language model's prefill over the dense model's (Eq. 5), at the samples' mean prompt.
        cache_ratio: length of the KV cache after it over the dense model's.
        kl: mean KL divergence from the dense model in nats, and `kl_error` its standard error (0 of one sample).
        sample_kl: of each sample.
        predicted_kl: what the changes cost alone, added up; `None` of a method alone.
    """

    name: str
    shortv_layers: list[int | str]
    visual_reduction: dict[str, Any] | None
    flops_ratio: float
    cache_ratio: float
    kl: float
    kl_error: float
    sample_kl: list[float]
    predicted_kl: float | None = None

    @property
    def settings(self) -> Settings:
        return Settings(tuple(self.shortv_layers), self.visual_reduction)

    def is_tied_with(self, other: "Row") -> bool:
        """Whether the two KLs, on the same samples, are within one standard error of their difference."""
        differences = [a - b for a, b in zip(self.sample_kl, other.sample_kl, strict=True)]
        return abs(mean(differences)) <= standard_error(differences)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 of one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


@dataclass
class SearchResult:
    """The rows by FLOPs, what chose them, and where it all comes from.

    Attributes:
        rows: of the search.
        baselines: of methods alone.
        chosen: number of the row within the budget; `None` without a budget, or where no row is within it.
        budget: `{"max_kl": nats}` or `{"flops_ratio": share}`.
        alone: mean KL in nats of each change alone: "entries" and "reductions" as pairs with what was changed.
        text_tokens, visual_tokens: mean numbers per sample.
        parts, kl: what was searched, and the direction of the divergence.
        samples: how many chose the schedules, and how many judged them.
        model, data, versions: as of a `LayerRanking`.
    """

    rows: list[Row]
    baselines: list[Row]
    chosen: int | None
    budget: dict[str, float]
    alone: dict[str, list]
    text_tokens: float
    visual_tokens: float
    parts: list[str]
    kl: str
    samples: dict[str, int]
    model: dict
    data: dict
    versions: dict = field(default_factory=outputs.versions)
    command: str | None = None

    @property
    def best(self) -> Row | None:
        """The chosen row."""
        return None if self.chosen is None else self.rows[self.chosen]

    @property
    def frontier(self) -> list[Row]:
        """Rows that no other one beats in both FLOPs and KL, by FLOPs."""
        lowest, found = math.inf, []
        for row in self.rows:
            if row.kl < lowest:
                lowest = row.kl
                found.append(row)
        return found

    @property
    def ties(self) -> list[Row]:
        """Rows whose KL is not to be told apart from that of the chosen one."""
        return [] if self.best is None else [r for r in self.rows if r is not self.best and r.is_tied_with(self.best)]

    def row_of(self, config: PretrainedConfig) -> Row:
        """The row that a config is set to. Raises `ValueError` if there is none."""
        for row in self.rows:
            if (row.shortv_layers, row.visual_reduction) == (config.shortv_layers, config.visual_reduction):
                return row
        raise ValueError(
            f"the config freezes layers {config.shortv_layers} with visual_reduction {config.visual_reduction}; no row of the "
            "search does"
        )

    def check_layers(self, config: PretrainedConfig):
        """Raises `ValueError` unless a config is set to one of the rows."""
        self.row_of(config)

    def save(self, file: str | Path):
        """Write as JSON, in place of a file that is there."""
        outputs.write_text(file, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> "SearchResult":
        """Read what [`save`] wrote. Raises `ValueError` that names the file if it is something else."""
        saved: Any = read_json(Path(file))
        try:
            rows = {name: [Row(**row) for row in saved[name]] for name in ("rows", "baselines")}
            return cls(**{**saved, **rows})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{file} is not a saved search: {error}") from None


def choose(rows: Sequence[Row], max_kl: float | None = None, flops_ratio: float | None = None) -> int | None:
    """The number of the row to take; `None` if none is within the budget.

    With `max_kl`, the cheapest row that costs at most that. With `flops_ratio`, of those that are at most at it and whose KL is
    not told apart from the lowest, the one that costs least by what its changes cost alone: that was measured on the other
    half of the samples, and speaks where these cannot.
    """
    if max_kl is not None:
        within = [i for i, row in enumerate(rows) if row.kl <= max_kl]
        return min(within, key=lambda i: (rows[i].flops_ratio, rows[i].kl), default=None)
    within = [i for i, row in enumerate(rows) if flops_ratio is not None and row.flops_ratio <= flops_ratio + 1e-9]
    if not within:
        return None
    lowest = rows[min(within, key=lambda i: rows[i].kl)]
    tied = [i for i in within if rows[i] is lowest or rows[i].is_tied_with(lowest)]
    return min(tied, key=lambda i: (rows[i].predicted_kl or 0.0, rows[i].kl))
