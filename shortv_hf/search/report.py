"""What a search has found, for a terminal and for a model card."""

from collections.abc import Iterable

from ..configuration_shortv import frozen_text
from .result import Row, SearchResult


COLUMNS = ("", "FLOPs", "KV cache", "KL (nats)", "what")


def cells(result: SearchResult) -> list[tuple[str, ...]]:
    """A row for each schedule, under [`COLUMNS`]: `>` marks the chosen one, `=` those that are not told apart from it, `-`
    those that another one beats in FLOPs and KL."""
    ties, frontier = result.ties, result.frontier
    found: list[tuple[str, ...]] = []
    for row in result.rows:
        mark = ">" if row is result.best else "=" if row in ties else "" if row in frontier else "-"
        figures = f"{row.flops_ratio:.1%}", f"{row.cache_ratio:.0%}", kl_text(row)
        found.append((mark, *figures, describe(row, result.model["num_hidden_layers"])))
    return found


def kl_text(row: Row) -> str:
    """KL in nats with its standard error, which one sample does not have."""
    return f"{row.kl:.2g} ± {row.kl_error:.1g}" if len(row.sample_kl) > 1 else f"{row.kl:.2g} (one sample)"


def describe(row: Row, n_layers: int) -> str:
    """In words: what is frozen, and what leaves."""
    said = [frozen_text(row.shortv_layers, n_layers) + " frozen"] if row.shortv_layers else []
    if row.visual_reduction is not None:
        options = ",".join(f"{name}={value}" for name, value in row.visual_reduction.items() if name != "method")
        said.append(f"{row.visual_reduction['method']}:{options}")
    return " + ".join(said) or "dense"


def options_of(row: Row) -> str:
    """The options of `shortv chat`, `eval` and so on that set it so."""
    said = ["--layers " + ",".join(map(str, row.shortv_layers))] if row.shortv_layers else []
    if row.visual_reduction is not None:
        said.append(f"--reduction {describe(Row(**{**vars(row), 'shortv_layers': []}), 0)}")
    return " ".join(said)


def curves(result: SearchResult) -> dict[str, list[Row]]:
    """The rows of the search that no other beats, and those of each method alone, by name."""
    found = {"search": result.frontier}
    for row in result.baselines:
        found.setdefault(row.name, []).append(row)
    return found


def points(rows: Iterable[Row]) -> list[tuple[float, float, float]]:
    """FLOPs in percent, KL and its standard error, by FLOPs."""
    return sorted((100 * row.flops_ratio, row.kl, row.kl_error) for row in rows)
