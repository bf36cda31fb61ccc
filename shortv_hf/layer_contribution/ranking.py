"""Rankings of decoder layers (paper Sections 2, 4.3 and 4.5).

The Layer Contribution of layer i to tokens X (Eq. 2) is the KL divergence between the next-token distributions of the
model M and of M_i, the model in which layer i alone leaves the hidden states of X as they are:

    LC_i^X = KL(P_M || P_{M_i})          `kl="forward"`, the paper
             KL(P_{M_i} || P_M)          `kl="reverse"`, the authors' released code

in nats, at the last position of the prompt, averaged over samples. Layers with a low score are ineffective for X.

    ranking = rank_layers(model, samples)
    ranking.apply(model, 19)              # freeze visual tokens in the 19 most ineffective layers
    ranking.save("ranking.json")

Samples are looked at one after another; nothing but their scores is kept. Processes that have
joined (`data/processes.py`) take a share each, and all have the ranking. (Greedy ranking goes through them many times:
give it something that can be iterated again, such as `data.Samples`.)
"""

import hashlib
import heapq
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration_shortv import PARTS, frozen_updates
from ..data import outputs, processes
from ..data.inputs import feature_mask, to_device
from .freezing import check_model, check_tokens, measuring
from .kl import Settings, check_direction, divergence, logits_with
from .trace import Trace, layer_of


METRICS = ("lc", "greedy", "cosine", "random")
LAYER = "layer"  # beside the names of its parts


@dataclass
class LayerRanking:
    """Decoder layers, or halves of them, from the most ineffective to the most important, with where the order comes from.

    Attributes:
        scores: one per layer, or of each entry of `entries`. "lc": mean KL in nats; "cosine": mean similarity; "random": random numbers; "greedy": the
            mean joint KL in nats right after the layer was chosen.
        order: layer ids (or entries), first the one to freeze first. Ascending scores, for "cosine" descending.
        metric, tokens, kl, seed: arguments of [`rank_layers`]. `kl` is `None` for metrics without one.
        sample_scores: `[n_samples][n_layers]`; empty for "random", and for "greedy", whose scores depend on all samples.
        text_tokens, visual_tokens: mean numbers per sample, t and v of the FLOPs equations; `None` for "random".
        model: `name`, `revision`, `architecture`, `dtype` and `num_hidden_layers`.
        data: `name` (what the caller calls it), `samples` and `sha256` of the inputs.
        versions: of the packages that matter.
        entries: what was ranked, as in `shortv_layers`, where it was not the layers 0, 1, ...
    """

    scores: list[float]
    order: list[int | str]
    metric: str
    tokens: str
    kl: str | None
    seed: int
    sample_scores: list[list[float]] = field(default_factory=list)
    text_tokens: float | None = None
    visual_tokens: float | None = None
    model: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    entries: list[int | str] | None = None

    def __post_init__(self):
        ranked = range(len(self.scores)) if self.entries is None else self.entries
        if sorted(map(str, self.order)) != sorted(map(str, ranked)) or len(ranked) != len(self.scores):
            raise ValueError(f"order {self.order} is not a permutation of the {len(self.scores)} layers with scores")

    def score(self, entry: int | str) -> float:
        """Of a layer, or of what else was ranked."""
        return self.scores[int(entry) if self.entries is None else self.entries.index(entry)]

    @property
    def num_hidden_layers(self) -> int:
        return len({layer_of(entry) for entry in self.order})

    def layers(self, num_layers: int) -> list[int | str]:
        """The `num_layers` most ineffective layers or halves; what is named already, as a layer or by its halves, is passed
        over. Raises `ValueError` if there are not so many."""
        chosen: list[int | str] = []
        attention: set[int] = set()
        ffn: set[int] = set()
        for entry in self.order:
            in_attention, in_ffn = frozen_updates([entry])
            if not (in_attention & attention or in_ffn & ffn):
                chosen.append(entry)
                attention |= in_attention
                ffn |= in_ffn
        if not 0 <= num_layers <= len(chosen):
            raise ValueError(f"cannot freeze {num_layers} layers: the ranking has {len(chosen)}")
        return chosen[:num_layers]

    def layers_for(self, config: PretrainedConfig, num_layers: int) -> list[int | str]:
        """[`layers`] for a model with this config. Raises `ValueError` if it has another number of layers, too."""
        n_layers = config.get_text_config().num_hidden_layers
        if n_layers != self.num_hidden_layers:
            raise ValueError(
                f"the ranking is of a model with {self.num_hidden_layers} layers; this one has {n_layers}"
            )
        return self.layers(num_layers)

    def check_layers(self, config: PretrainedConfig):
        """Raises `ValueError` unless the layers that a config freezes are the first ones of this ranking, in its order."""
        expected = self.layers_for(config, len(config.shortv_layers))
        if config.shortv_layers != expected:
            raise ValueError(
                f"the config freezes layers {config.shortv_layers}; the first {len(expected)} of the ranking are {expected}"
            )

    def apply(self, model: Any, num_layers: int):
        """Freeze visual tokens in the `num_layers` most ineffective layers of `model`.

        Raises:
            ValueError: if the model has another number of layers than the ranked one, or `num_layers` is out of range.
        """
        model.set_shortv_layers(self.layers_for(model.config, num_layers))

    def save(self, file: str | Path):
        """Write as JSON, in place of a file that is there."""
        outputs.write_text(file, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> "LayerRanking":
        """Read what [`save`] wrote. Raises `ValueError` if it is something else."""
        try:
            return cls(**json.loads(Path(file).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file} is not a saved LayerRanking: {error}") from None


def rank_layers(
    model: PreTrainedModel,
    samples: Iterable[dict] | None,
    metric: str = "lc",
    tokens: str = "visual",
    kl: str = "forward",
    seed: int = 0,
    *,
    data: str | None = None,
    layers_per_batch: int = 4,
    parts: Sequence[str] = (LAYER,),
) -> LayerRanking:
    """Rank the decoder layers by how little they contribute to `tokens`, the most ineffective first; or their updates, by
    `parts`.

    Args:
        model: a ShortV model, or a stock one after `apply_shortv(model, [])`; what it freezes at the moment does not count.
        samples: model inputs as a processor returns them (`input_ids` `[B, S]`, `pixel_values`, ...), text rows without
            images allowed (they count as 0 in "lc" and not at all in "cosine"), padding on either side. Every row of a
            batch is a sample. Not needed for "random".
        metric: "lc" (paper Section 2.2); "greedy" (ours: each next layer is the one whose joint freezing with those
            chosen before costs least KL, tried lazily; a few times the cost of "lc"); "cosine" (Table 6: mean cosine similarity
            between a layer's input and output); "random" (seeded).
        tokens: whose updates are frozen or compared: "visual", "text" or "all" (paper Figure 2, Table 7).
        kl: "forward" (paper) or "reverse" (released code).
        seed: of "random".
        data: a name for the samples, kept in the ranking.
        layers_per_batch: how many candidate layers share a forward pass. Changes memory and speed only.
        parts: what is ranked: "layer", "mlp", "self_attn", or several of these in one order; halves by "lc" alone.

    Raises:
        ValueError: for an unknown metric, tokens, kl or part, a model that is not a ShortV model, no samples, or no visual
            token in any of them.
    """
    check_choices(metric, tokens, kl)
    check_model(model)
    entries = entries_of(parts, model.config.get_text_config().num_hidden_layers)
    if tuple(parts) != (LAYER,) and (metric != "lc" or tokens == "all"):
        raise ValueError(f"halves of layers are ranked by lc, of visual or text tokens, not by {metric} of {tokens}")
    ranking: dict[str, Any] = {
        "entries": None if tuple(parts) == (LAYER,) else entries,
        "metric": metric,
        "tokens": tokens,
        "kl": kl if metric in ("lc", "greedy") else None,
        "seed": seed,
        "model": describe_model(model),
        "versions": outputs.versions(),
    }
    if metric == "random":
        generator = random.Random(seed)
        scores = [generator.random() for _ in range(model.config.get_text_config().num_hidden_layers)]
        return LayerRanking(scores=scores, order=[entries[i] for i in _argsort(scores)], **ranking)

    summary = DataSummary(data)
    sample_scores: list[list[float]] = []
    if metric == "greedy":
        scores, order = _rank_greedily(model, summary, samples, tokens, kl, layers_per_batch)
    else:
        own = []
        for number, sample in enumerate(
            logging.tqdm(() if samples is None else samples, desc=f"{metric}, {tokens} tokens")
        ):
            with measuring(model):
                sample = summary.add(model, sample)
                if number % processes.size() != processes.rank():
                    continue
                trace = Trace(model, sample, [], tokens)
                if metric == "cosine":
                    rows = trace.similarities()
                    rows = rows[:, ~rows.isnan().any(0)]  # rows without such tokens have no similarity
                else:
                    rows = trace.divergences(entries, trace.logits, kl, layers_per_batch)
            own.append((number, rows.T.tolist()))
        for _, of_sample in sorted(processes.gather(own)):
            sample_scores += of_sample
        scores = torch.tensor(sample_scores, dtype=torch.float64).mean(0).tolist() if sample_scores else []
        order = [entries[i] for i in _argsort(scores, descending=metric == "cosine")]
    return LayerRanking(scores=scores, order=order, sample_scores=sample_scores, **ranking, **summary.fields(tokens))


def entries_of(parts: Sequence[str], n_layers: int) -> list[int | str]:
    """What is ranked, as in `shortv_layers`. Raises `ValueError` for an unknown part, one named twice, or none."""
    valid = (LAYER, *PARTS)
    if isinstance(parts, str) or not parts or len(set(parts)) != len(parts) or not set(parts) <= set(valid):
        raise ValueError(f"parts is {parts!r}; it takes some of {', '.join(valid)}, each once")
    return [layer if part == LAYER else f"{layer}.{part}" for part in parts for layer in range(n_layers)]


def check_choices(metric: str = "lc", tokens: str = "visual", kl: str = "forward"):
    """Raises `ValueError` for an unknown metric, tokens or KL direction."""
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; use one of {', '.join(METRICS)}")
    check_tokens(tokens)
    check_direction(kl)


def _rank_greedily(model, summary, samples, tokens, kl, layers_per_batch):
    """Scores and order: layer by layer, the one whose freezing beside those chosen before costs least joint KL.

    Lazily: what a layer adds to the joint KL seldom shrinks as others are frozen, so what it added when it was last tried is
    taken for the least that it can add now. The layer that promises least is tried again, until the one on top has just been.
    A pass tries one layer; of the first round, all in resumed passes, as "lc" does.
    """
    samples = () if samples is None else samples if hasattr(samples, "__len__") else list(samples)
    with measuring(model):
        dense, rows = [], []
        for number, sample in enumerate(logging.tqdm(samples, desc=f"each alone, {tokens} tokens")):
            sample = summary.add(model, sample)
            if number % processes.size() == processes.rank():
                trace = Trace(model, sample, [], tokens)
                rows.append(trace.divergences(range(trace.n_layers), trace.logits, kl, layers_per_batch).sum(1).cpu())
                dense.append(trace.logits.cpu())
        rows = processes.gather(rows)
        if not rows:
            return [], []
        alone = (torch.stack(rows).sum(0) / summary.rows).tolist()
        heap = [
            (added, layer, 0) for layer, added in enumerate(alone)
        ]  # the last: how many were frozen when it was tried
        heapq.heapify(heap)
        scores: dict[int, float] = {}
        order: list[int] = []
        joint = 0.0
        bar = logging.tqdm(total=len(heap), desc=f"greedy, {tokens} tokens")
        while heap:
            added, layer, tried = heapq.heappop(heap)
            if tried == len(order):
                joint += added
                order.append(layer)
                scores[layer] = joint
                bar.update()
                continue
            settings, total = Settings((*order, layer), tokens=tokens), 0.0
            for (_, sample), target in zip(processes.share(samples), dense, strict=True):
                logits = logits_with(model, to_device(model, sample), settings)
                total += float(divergence(target.to(logits.device), logits, kl).double().sum())
            heapq.heappush(heap, (sum(processes.gather([total])) / summary.rows - joint, layer, len(order)))
        bar.close()
    return [scores[layer] for layer in sorted(scores)], order


class DataSummary:
    """What is kept of the samples: how many rows, how many text and visual tokens, and a hash of the inputs."""

    def __init__(self, name: str | None):
        self.name, self.rows, self.text, self.visual, self.hash = name, 0, 0, 0, hashlib.sha256()

    def add(self, model: PreTrainedModel, sample: dict) -> dict:
        """Count a sample; returns it on the model's device."""
        for name in sorted(sample):
            if torch.is_tensor(sample[name]):
                tensor = sample[name].detach().cpu().contiguous()
                self.hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                self.hash.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        sample = to_device(model, sample)
        visual = feature_mask(model.config, sample)
        padding = sample.get("attention_mask")
        n_tokens = int(visual.numel() if padding is None else padding.sum())
        self.rows += len(visual)
        self.visual += int(visual.sum())
        self.text += n_tokens - int(visual.sum())
        return sample

    def fields(self, tokens: str) -> dict:
        """As a [`LayerRanking`] has them. Raises `ValueError` without samples, or visual tokens where these are meant."""
        if self.rows == 0:
            raise ValueError("no samples: the ranking needs at least one")
        if tokens == "visual" and self.visual == 0:
            raise ValueError("no sample holds visual tokens, so there is nothing to freeze")
        return {
            "text_tokens": self.text / self.rows,
            "visual_tokens": self.visual / self.rows,
            "data": {"name": self.name, "samples": self.rows, "sha256": self.hash.hexdigest()},
        }


def describe_model(model: PreTrainedModel) -> dict:
    """Which checkpoint a model is, without paths of this machine."""
    config = model.config
    base = getattr(config, "base_model_name_or_path", None)  # stock configs have no such field
    own = base is None
    name = model.name_or_path if own else base
    return {
        "name": Path(name).resolve().name if name and Path(name).is_dir() else name,  # no paths of this machine
        "revision": getattr(config, "_commit_hash", None) if own else config.base_model_revision,
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_hidden_layers": config.get_text_config().num_hidden_layers,
    }


def _argsort(scores: list[float], descending: bool = False) -> list[int]:
    return sorted(range(len(scores)), key=lambda layer: -scores[layer] if descending else scores[layer])
