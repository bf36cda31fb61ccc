"""Where a repo's frozen layers come from: a file of the repo, a chart, and a section of its card."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig

from ..layer_contribution.ranking import LayerRanking
from ..pictures import plots
from ..search.report import curves, describe, kl_text, points
from ..search.result import SearchResult


FILES = {"ranking": "ranking.json", "search": "search.json"}


@dataclass(frozen=True)
class Provenance:
    """What a repo says about how its layers were chosen.

    Attributes:
        file, picture: names of the file that it is saved in and of the chart.
        check: raises `ValueError` unless a config is set to what was found.
        save, draw: write the file and the chart to a path.
        section: the card's, of a config; with the chart, if there is one.
        summary: a line.
    """

    file: str
    picture: str
    check: Callable[[PretrainedConfig], None]
    save: Callable[[Path], None]
    draw: Callable[[Path], Path]
    section: Callable[[PretrainedConfig, str | None], str]
    summary: str


def provenance_of(found: LayerRanking | SearchResult) -> Provenance:
    """Of a ranking whose first layers are frozen, or of a search of which one row is set."""
    if isinstance(found, SearchResult):
        return Provenance(
            FILES["search"],
            "search.png",
            found.check_layers,
            found.save,
            partial(draw_search, found),
            partial(_search_section, found),
            f"layers by a search, {found.samples['judging']} samples judged ({found.data.get('name')})",
        )
    samples = f"{found.data.get('samples')} samples ({found.data.get('name')})" if found.data else "no samples"
    return Provenance(
        FILES["ranking"],
        "layer_scores.png",
        found.check_layers,
        found.save,
        partial(plots.plot_ranking, found),
        partial(_ranking_section, found),
        f"layers by {found.metric}, {samples}",
    )


def load_provenance(folder: Path, kind: str) -> Provenance:
    """What a repo's folder holds of a kind in [`FILES`]. Raises `ValueError` if it cannot be read."""
    file = folder / FILES[kind]
    return provenance_of(SearchResult.load(file) if kind == "search" else LayerRanking.load(file))


def draw_search(result: SearchResult, output: Path) -> Path:
    """KL by FLOPs, of the search and of each method alone."""
    name = result.model.get("name") or "unnamed model"
    return plots.plot_costs(
        {method: points(rows) for method, rows in curves(result).items()},
        "FLOPs of the prefill (% of dense)",
        "KL from the dense model (nats)",
        output,
        f"{name}: {result.samples['judging']} samples ({result.data.get('name')})",
    )


def _facts(found: LayerRanking | SearchResult, *first: tuple[str, str]) -> str:
    """Model, data and versions, as a list."""
    facts, model = list(first), found.model
    where = f" at commit `{model['revision']}`" if model.get("revision") else ""
    facts.append(("model", f"{model.get('architecture')} `{model.get('name')}`{where}, {model.get('dtype')}"))
    if found.data:
        named, digest = found.data.get("name") or "not named", found.data.get("sha256")
        facts.append(("data", f"{named}; SHA-256 of the inputs `{digest}`"))
        tokens = f"{found.text_tokens:.0f} text and {found.visual_tokens:.0f} visual tokens"
        facts.append(("samples", f"{found.data.get('samples')}, on average {tokens}"))
    if isinstance(found, LayerRanking):
        facts.append(("seed", str(found.seed)))
    facts += [(name, f"`{version}`") for name, version in found.versions.items()]
    return "\n".join(f"- {name}: {value}" for name, value in facts)


def _ranking_section(ranking: LayerRanking, config: PretrainedConfig, picture: str | None) -> str:
    what = {
        "lc": "Layer Contribution",
        "greedy": "greedy selection",
        "cosine": "cosine similarity",
        "random": "chance",
    }
    metric = what[ranking.metric] + (f", KL {ranking.kl}" if ranking.kl else "")
    chosen = ranking.layers(len(config.shortv_layers))
    layers = ", ".join(f"{layer} ({ranking.score(layer):.2g})" for layer in chosen)
    parts = [
        "## How the layers were chosen",
        _facts(ranking, ("metric", metric)),
        f"Frozen layers and their scores: {layers or 'none'}. The whole ranking is in `{FILES['ranking']}`.",
        f"![Score of each decoder layer]({picture})" if picture else None,
    ]
    return "\n\n".join(part for part in parts if part)


def _search_section(result: SearchResult, config: PretrainedConfig, picture: str | None) -> str:
    row = result.row_of(config)
    n_layers = config.get_text_config().num_hidden_layers
    tied = len([each for each in result.rows if each is not row and each.is_tied_with(row)])
    halves = f"each change alone on {result.samples['choosing']} samples, KL {result.kl}; the result on {result.samples['judging']} others"
    parts = [
        "## How the schedule was chosen",
        _facts(result, ("search", f"{', '.join(result.parts)}; {halves}")),
        f"{describe(row, n_layers)}: {row.flops_ratio:.1%} of the language model's prefill FLOPs, {row.cache_ratio:.0%} of its "
        f"KV cache, KL from the dense model {kl_text(row)} nats on the samples that did not propose it, where it was picked from "
        f"{len(result.rows)} schedules (so this is rather too low); that of {tied} others is not told apart from its. All are in "
        f"`{FILES['search']}`.",
        f"![KL by FLOPs]({picture})" if picture else None,
    ]
    return "\n\n".join(part for part in parts if part)
