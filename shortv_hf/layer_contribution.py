"""Which layers to freeze: rankings of decoder layers, and what freezing costs (paper Sections 2, 4.3 and 4.5).

The Layer Contribution of layer i to tokens X (Eq. 2) is the KL divergence between the next-token distributions of the
model M and of M_i, the model in which layer i alone leaves the hidden states of X as they are:

    LC_i^X = KL(P_M || P_{M_i})          `kl="forward"`, the paper
             KL(P_{M_i} || P_M)          `kl="reverse"`, the authors' released code

in nats, at the last position of the prompt, averaged over samples. Layers with a low score are ineffective for X.

    ranking = rank_layers(model, samples)
    ranking.apply(model, 19)              # freeze visual tokens in the 19 most ineffective layers
    ranking.save("ranking.json")

A frozen pass equals the dense pass up to its frozen layer, so it starts from the dense pass's input to that layer: about
half the cost of L + 1 passes. Samples are looked at one after another; nothing but their scores is kept. (Greedy ranking
goes through them L + 1 times: give it something that can be iterated again, such as `calibration_data.Samples`.)
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from . import outputs
from .flops import flops_ratio
from .plan import Plan
from .upstream import text_model, visual_token_ids


METRICS = ("lc", "greedy", "cosine", "random")
TOKENS = ("visual", "text", "all")
KL_DIRECTIONS = ("forward", "reverse")


@dataclass
class LayerRanking:
    """Decoder layers from the most ineffective to the most important, with where the order comes from.

    Attributes:
        scores: one per layer. "lc": mean KL in nats; "cosine": mean similarity; "random": random numbers; "greedy": the
            mean joint KL in nats right after the layer was chosen.
        order: layer ids, first the one to freeze first. Ascending scores, for "cosine" descending.
        metric, tokens, kl, seed: arguments of [`rank_layers`]. `kl` is `None` for metrics without one.
        sample_scores: `[n_samples][n_layers]`; empty for "random", and for "greedy", whose scores depend on all samples.
        text_tokens, visual_tokens: mean numbers per sample, t and v of the FLOPs equations; `None` for "random".
        model: `name`, `revision`, `architecture`, `dtype` and `num_hidden_layers`.
        data: `name` (what the caller calls it), `samples` and `sha256` of the inputs.
        versions: of the packages that matter.
    """

    scores: list[float]
    order: list[int]
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

    def __post_init__(self):
        if sorted(self.order) != list(range(len(self.scores))):
            raise ValueError(f"order {self.order} is not a permutation of the {len(self.scores)} layers with scores")

    def layers(self, num_layers: int) -> list[int]:
        """The `num_layers` most ineffective layers. Raises `ValueError` if there are not so many."""
        if not 0 <= num_layers <= len(self.order):
            raise ValueError(f"cannot freeze {num_layers} layers: the ranking has {len(self.order)}")
        return self.order[:num_layers]

    def layers_for(self, config: PretrainedConfig, num_layers: int) -> list[int]:
        """[`layers`] for a model with this config. Raises `ValueError` if it has another number of layers, too."""
        n_layers = config.get_text_config().num_hidden_layers
        if n_layers != len(self.order):
            raise ValueError(f"the ranking is of a model with {len(self.order)} layers; this one has {n_layers}")
        return self.layers(num_layers)

    def apply(self, model: PreTrainedModel, num_layers: int):
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


# ---------------------------------------------------------------------------------------------------------- ranking


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
) -> LayerRanking:
    """Rank the decoder layers by how little they contribute to `tokens`, the most ineffective first.

    Args:
        model: a ShortV model, or a stock one after `apply_shortv(model, [])`; what it freezes at the moment does not count.
        samples: model inputs as a processor returns them (`input_ids` `[B, S]`, `pixel_values`, ...), text rows without
            images allowed (they count as 0 in "lc" and not at all in "cosine"), padding on either side. Every row of a
            batch is a sample. Not needed for "random".
        metric: "lc" (paper Section 2.2); "greedy" (ours: each next layer is the one whose joint freezing with those
            chosen before costs least KL; about L/2 times the cost of "lc"); "cosine" (Table 6: mean cosine similarity
            between a layer's input and output); "random" (seeded).
        tokens: whose updates are frozen or compared: "visual", "text" or "all" (paper Figure 2, Table 7).
        kl: "forward" (paper) or "reverse" (released code).
        seed: of "random".
        data: a name for the samples, kept in the ranking.
        layers_per_batch: how many candidate layers share a forward pass. Changes memory and speed only.

    Raises:
        ValueError: for an unknown metric, tokens or kl, a model that is not a ShortV model, no samples, or no visual
            token in any of them.
    """
    check_choices(metric, tokens, kl)
    _check_model(model)
    ranking = {
        "metric": metric,
        "tokens": tokens,
        "kl": kl if metric in ("lc", "greedy") else None,
        "seed": seed,
        "model": _describe_model(model),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }
    if metric == "random":
        generator = random.Random(seed)
        scores = [generator.random() for _ in range(model.config.get_text_config().num_hidden_layers)]
        return LayerRanking(scores=scores, order=_argsort(scores), **ranking)

    summary = _DataSummary(data)
    sample_scores = []
    if metric == "greedy":
        scores, order = _rank_greedily(model, summary, samples, tokens, kl, layers_per_batch)
    else:
        for sample in progress(samples, f"{metric}, {tokens} tokens"):
            with _measuring(model):
                trace = _Trace(model, summary.add(model, sample), [], tokens)
                if metric == "cosine":
                    rows = trace.similarities()
                    rows = rows[:, ~rows.isnan().any(0)]  # rows without such tokens have no similarity
                else:
                    rows = trace.divergences(range(trace.n_layers), trace.logits, kl, layers_per_batch)
            sample_scores += rows.T.tolist()
        scores = torch.tensor(sample_scores, dtype=torch.float64).mean(0).tolist() if sample_scores else []
        order = _argsort(scores, descending=metric == "cosine")
    return LayerRanking(scores=scores, order=order, sample_scores=sample_scores, **ranking, **summary.fields(tokens))


def check_choices(metric: str = "lc", tokens: str = "visual", kl: str = "forward"):
    """Raises `ValueError` for an unknown metric, tokens or KL direction."""
    for name, value, valid in (("metric", metric, METRICS), ("tokens", tokens, TOKENS), ("kl", kl, KL_DIRECTIONS)):
        if value not in valid:
            raise ValueError(f"unknown {name} {value!r}; use one of {', '.join(valid)}")


def joint_kl(
    model: PreTrainedModel,
    samples: Iterable[dict],
    layers: list[int],
    kl: str = "forward",
    tokens: str = "visual",
    visual_reduction: dict | None = None,
) -> float:
    """Mean KL divergence (nats) at the last position between the dense model and the one with all `layers` frozen and,
    if given, `visual_reduction` on."""
    return joint_kl_curve(model, samples, [layers], kl, tokens, visual_reduction)[0]


def joint_kl_curve(
    model: PreTrainedModel,
    samples: Iterable[dict],
    layer_sets: list[list[int]],
    kl: str = "forward",
    tokens: str = "visual",
    visual_reduction: dict | None = None,
) -> list[float]:
    """[`joint_kl`] of several sets of layers, with one dense pass per sample.

    Raises:
        ValueError: for bad arguments, no samples, or a reduction with other tokens than "visual".
    """
    check_choices(tokens=tokens, kl=kl)
    if visual_reduction is not None and tokens != "visual":
        raise ValueError(f"a reduction drops visual tokens; it does not go with freezing {tokens} tokens")
    _check_model(model)
    values = []
    for sample in progress(samples, "joint KL"):
        with _measuring(model):
            sample = to_device(model, sample)
            dense = last_logits(model, sample)
            row = []
            for layers in layer_sets:
                with model.using(visual_reduction=visual_reduction), frozen_tokens(model, layers, tokens):
                    row.append(divergence(dense, last_logits(model, sample), kl))
        values.append(torch.stack(row, dim=1).double())
    if not values:
        raise ValueError("no samples: the KL needs at least one")
    return torch.cat(values).mean(0).tolist()


def choose_by_flops(ranking: LayerRanking, config, ratio: float) -> int:
    """The smallest N whose FLOPs ratio (Eq. 5), at the mean t and v of the ranking's samples, is at most `ratio`.

    Raises:
        ValueError: if freezing all layers is not enough, or the ranking knows no samples.
    """
    if ranking.text_tokens is None:
        raise ValueError(f"a {ranking.metric} ranking has no samples to take the numbers of tokens from")
    for n in range(len(ranking.order) + 1):
        reached = flops_ratio(ranking.text_tokens, ranking.visual_tokens, config, N=n)
        if reached <= ratio:
            return n
    raise ValueError(f"a FLOPs ratio of {ratio} is out of reach: freezing all {n} layers gives {reached:.3f}")


def choose_by_kl(
    model: PreTrainedModel, samples: Iterable[dict], ranking: LayerRanking, max_kl: float, kl: str = "forward"
) -> tuple[int, list[float]]:
    """The largest N for which freezing the first N layers of the ranking together costs at most `max_kl` nats.

    Returns:
        N, and the joint KL for N = 0, 1, ..., L.

    Raises:
        ValueError: if `max_kl` is negative.
    """
    check_budget(model.config, max_kl=max_kl)
    curve = joint_kl_curve(model, samples, [ranking.layers(n) for n in range(len(ranking.order) + 1)], kl)
    return max(n for n, value in enumerate(curve) if n == 0 or value <= max_kl), curve


def check_budget(config, num_layers: int | None = None, flops_ratio: float | None = None, max_kl: float | None = None):
    """Raises `ValueError` for what no ranking of a model with this config can meet; before the ranking, not after."""
    n_layers = config.get_text_config().num_hidden_layers
    if num_layers is not None and not 0 <= num_layers <= n_layers:
        raise ValueError(f"cannot freeze {num_layers} layers: the model has {n_layers}")
    if flops_ratio is not None and not 0 < flops_ratio <= 1:
        raise ValueError(f"flops_ratio is {flops_ratio}; the valid range is above 0 up to 1")
    if max_kl is not None and not max_kl >= 0:
        raise ValueError(f"max_kl is {max_kl}; a KL divergence is 0 or more")


def choose_num_layers(
    model: PreTrainedModel,
    samples: Iterable[dict],
    ranking: LayerRanking,
    num_layers: int | None = None,
    flops_ratio: float | None = None,
    max_kl: float | None = None,
    kl: str = "forward",
) -> int:
    """N by the one budget that is given: a number of layers, [`choose_by_flops`] or [`choose_by_kl`].

    Raises:
        ValueError: unless exactly one is given, or if it is out of range or out of reach.
    """
    if sum(budget is not None for budget in (num_layers, flops_ratio, max_kl)) != 1:
        raise ValueError("give exactly one of num_layers, flops_ratio and max_kl")
    if num_layers is not None:
        return len(ranking.layers(num_layers))
    if flops_ratio is not None:
        return choose_by_flops(ranking, model.config, flops_ratio)
    return choose_by_kl(model, samples, ranking, max_kl, kl)[0]


@contextmanager
def frozen_tokens(model: PreTrainedModel, layers: list[int], tokens: str = "visual") -> Iterator[PreTrainedModel]:
    """The model with `tokens` frozen in `layers`, and nothing else, for a while: to measure, not to serve.

    "visual" is ShortV (paper Figure 2a). "text" (Figure 2b): text tokens pass through unchanged, visual tokens alone are
    queries and pass the FFN. "all": the layer is skipped. With "text" and "all", generate with `use_cache=False`: a
    generated token is text too, and the frozen pass needs the whole sequence.
    """
    check_choices(tokens=tokens)
    if tokens != "visual" and model.settings[1] is not None:
        raise ValueError(f"a reduction drops visual tokens; it does not go with freezing {tokens} tokens")
    with ExitStack() as stack:
        stack.enter_context(model.using(shortv_layers=layers))  # checks the ids
        if tokens != "visual":
            stack.enter_context(model.using(shortv_layers=[]))
            plan = {}

            def build_plan(module, args, kwargs):
                plan["current"] = Plan.build(layers, ~_visual_mask(module.config, kwargs))

            def give_plan(module, args, kwargs):
                return args, {**kwargs, "plan": plan["current"]}

            def skip(module, args, kwargs, output):
                states = args[0] if args else kwargs["hidden_states"]
                return (states, *output[1:]) if isinstance(output, tuple) else states

            for layer in (_layers(model)[i] for i in layers):
                if tokens == "all":
                    handle = layer.register_forward_hook(skip, with_kwargs=True)
                else:
                    handle = layer.register_forward_pre_hook(give_plan, with_kwargs=True)
                stack.callback(handle.remove)
            if tokens == "text":
                stack.callback(model.model.register_forward_pre_hook(build_plan, with_kwargs=True).remove)
        yield model


# ------------------------------------------------------------------------------------------------------- measuring


class _Trace:
    """One batch through the model with `base` layers frozen, and from there through the model with one more frozen.

    Keeps the input of every layer, L tensors `[B, S, h]`.

    Attributes:
        logits: `[B, V]` float32, of the last position.
    """

    def __init__(self, model: PreTrainedModel, sample: dict, base: list[int], tokens: str):
        self.model, self.tokens, self.base = model, tokens, frozenset(base)
        self.layers = _layers(model)
        self.n_layers = len(self.layers)
        self.visual_mask = _visual_mask(model.config, sample)
        self.padding_mask = sample.get("attention_mask")
        self.last = _last_positions(self.visual_mask, self.padding_mask)
        self.inputs, self.kwargs, self.plans = [], [], {}
        self.output, before = None, {}
        self.between = {}  # what the model adds behind a layer (Qwen3-VL: features to visual tokens)

        def keep(module, args, kwargs):
            kwargs = dict(kwargs)
            states = args[0] if args else kwargs.pop("hidden_states")
            if self.inputs and not torch.equal(states, before["next"]):
                self.between[len(self.inputs) - 1] = states - before["next"]
            self.inputs.append(states)
            self.kwargs.append({name: value for name, value in kwargs.items() if name != "plan"})

        def keep_output(module, args, output):
            self.output = _states(output)
            before["next"] = self.output.clone()  # some versions add in place

        with frozen_tokens(model, sorted(self.base), tokens), ExitStack() as stack:
            for layer in self.layers:  # behind the hooks that freeze
                stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(keep_output).remove)
            model.model(**sample, use_cache=False)
        self.logits = self._head(self.output)

    def divergences(self, candidates: Iterable[int], dense: torch.Tensor, kl: str, batch: int) -> torch.Tensor:
        """KL to `dense` `[B, V]` when each of the candidates is frozen beside the base: `[n_candidates, B]` float64."""
        candidates = list(candidates)
        logits = {}
        if self.tokens == "visual" and not self.visual_mask.gather(1, self.last[:, None]).any():
            # What the last layer makes of visual tokens is read by nothing: freezing it changes exactly nothing.
            logits[self.n_layers - 1] = self.logits
        groups = [layer for layer in candidates if layer not in logits]
        for start in range(0, len(groups), batch):
            logits.update(self._frozen_logits(groups[start : start + batch]))
        return torch.stack([divergence(dense, logits[layer], kl) for layer in candidates]).double()

    def _frozen_logits(self, candidates: list[int]) -> dict[int, torch.Tensor]:
        """Logits of each candidate. They join one batch as their layers come; the first candidates of it come first."""
        joined, states = [], None
        for index in range(min(candidates), self.n_layers):
            if states is not None:
                states = self._run(index, states, frozen=index in self.base)
            if index in candidates:
                new = self._run(index, self.inputs[index], frozen=True)
                states = new if states is None else torch.cat([states, new.to(states.device)])
                joined.append(index)
        return dict(zip(joined, self._head(states).split(len(self.visual_mask)), strict=True))

    def _run(self, index: int, states: torch.Tensor, frozen: bool) -> torch.Tensor:
        copies = len(states) // len(self.visual_mask)
        if not (frozen and self.tokens == "all"):
            kwargs = {
                name: _repeat(value, len(self.visual_mask), copies) for name, value in self.kwargs[index].items()
            }
            states = _states(self.layers[index](states, plan=self._plan(copies) if frozen else None, **kwargs))
        added = self.between.get(index)
        return states if added is None else states + added.to(states.device).repeat(copies, 1, 1)

    def _plan(self, copies: int) -> Plan | None:
        if copies not in self.plans:
            frozen = self.visual_mask if self.tokens == "visual" else ~self.visual_mask
            self.plans[copies] = Plan.build(range(self.n_layers), frozen.repeat(copies, 1))
        return self.plans[copies]

    def _head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of the last positions, `[n, V]` float32."""
        last = self.last.repeat(len(states) // len(self.last)).to(states.device)
        states = states[torch.arange(len(states), device=states.device), last]
        return self.model.lm_head(text_model(self.model.model).norm(states)).float()

    def similarities(self) -> torch.Tensor:
        """Mean cosine similarity of input and output of each layer over its tokens: `[L, B]`; NaN without tokens."""
        chosen = {
            "visual": self.visual_mask,
            "text": ~self.visual_mask,
            "all": torch.ones_like(self.visual_mask),
        }[self.tokens]
        if self.padding_mask is not None:
            chosen = chosen & self.padding_mask.bool()
        rows = []
        for before, after in zip(self.inputs, [*self.inputs[1:], self.output], strict=True):
            similarity = nn.functional.cosine_similarity(before.float(), after.to(before.device).float(), dim=-1)
            weights = chosen.to(similarity.device)
            rows.append((similarity * weights).sum(1) / weights.sum(1))
        return torch.stack([row.to(rows[0].device) for row in rows])


def _rank_greedily(model, summary, samples, tokens, kl, layers_per_batch):
    """Scores and order: layer by layer, the one whose freezing beside those chosen before costs least joint KL."""
    with _measuring(model):
        samples = () if samples is None else samples if hasattr(samples, "__len__") else list(samples)
        dense = [last_logits(model, summary.add(model, sample)).cpu() for sample in samples]
        scores, order = {}, []
        left = list(range(model.config.get_text_config().num_hidden_layers))
        for _ in progress(range(len(left)), f"greedy, {tokens} tokens"):
            totals = torch.zeros(len(left), dtype=torch.float64)
            for sample, target in zip(samples, dense, strict=True):
                trace = _Trace(model, to_device(model, sample), order, tokens)
                totals += trace.divergences(left, target.to(trace.logits.device), kl, layers_per_batch).sum(1).cpu()
            best = int(totals.argmin())
            scores[left[best]] = float(totals[best] / max(1, summary.rows))
            order.append(left.pop(best))
    return [scores[layer] for layer in sorted(scores)], order


@contextmanager
def _measuring(model: PreTrainedModel) -> Iterator[None]:
    """The dense model in evaluation mode, without visual-token reduction, for a while."""
    training = model.training
    try:
        with torch.inference_mode(), model.eval().using(shortv_layers=[], visual_reduction=None):
            yield
    finally:
        model.train(training)


class _DataSummary:
    """What is kept of the samples: how many, how long, and a hash."""

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
        visual = _visual_mask(model.config, sample)
        padding = sample.get("attention_mask")
        n_tokens = int(visual.numel() if padding is None else padding.sum())
        self.rows += len(visual)
        self.visual += int(visual.sum())
        self.text += n_tokens - int(visual.sum())
        return sample

    def fields(self, tokens: str) -> dict:
        if self.rows == 0:
            raise ValueError("no samples: the ranking needs at least one")
        if tokens == "visual" and self.visual == 0:
            raise ValueError("no sample holds visual tokens, so there is nothing to freeze")
        return {
            "text_tokens": self.text / self.rows,
            "visual_tokens": self.visual / self.rows,
            "data": {"name": self.name, "samples": self.rows, "sha256": self.hash.hexdigest()},
        }


def divergence(dense: torch.Tensor, frozen: torch.Tensor, kl: str) -> torch.Tensor:
    """KL divergence per row of logits `[B, V]`, in nats and float32: `[B]`."""
    dense, frozen = dense.float().log_softmax(-1), frozen.to(dense.device).float().log_softmax(-1)
    p, q = (dense, frozen) if kl == "forward" else (frozen, dense)
    return nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def last_logits(model: PreTrainedModel, sample: dict) -> torch.Tensor:
    """Logits at the last position of each row, `[B, V]` float32."""
    states = model.model(**sample, use_cache=False).last_hidden_state
    last = _last_positions(_visual_mask(model.config, sample), sample.get("attention_mask")).to(states.device)
    return model.lm_head(states[torch.arange(len(states), device=states.device), last]).float()


def _last_positions(like: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """Position of the last token of each row that is not padding, `[B]`."""
    if padding_mask is None:
        return torch.full(like.shape[:1], like.shape[1] - 1, device=like.device)
    positions = torch.arange(like.shape[1], device=like.device)
    return (positions * padding_mask.to(like.device)).argmax(dim=1)


def _visual_mask(config, inputs: dict) -> torch.Tensor:
    """Positions that hold image features, `[B, S]` bool."""
    if inputs.get("visual_mask") is not None:
        return inputs["visual_mask"].bool()
    if inputs.get("input_ids") is None:
        raise ValueError("samples with inputs_embeds need a visual_mask that says where the image features are")
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    encoded = inputs.get("mm_encoder_outputs") or {}  # what `generate` of 5.x passes instead of pixels
    pixels = {"image": inputs.get("pixel_values"), "video": inputs.get("pixel_values_videos")}
    for kind, placeholder in visual_token_ids(config).items():
        if pixels[kind] is not None or encoded.get(kind) is not None:
            mask = mask | (inputs["input_ids"] == placeholder)
    return mask


def _states(output) -> torch.Tensor:
    """The hidden states that a layer returns, on 4.x in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _repeat(value, rows: int, copies: int):
    """A keyword argument of a layer for a batch of `copies` batches of `rows` rows."""
    if isinstance(value, tuple):  # rotary tables, `[B or 1, S, d]` or `[3, B or 1, S, d]`
        one = [1] * (value[0].ndim - 3)
        return tuple(part.repeat(*one, copies, 1, 1) if part.shape[-3] == rows > 1 else part for part in value)
    if torch.is_tensor(value) and value.ndim > 1 and len(value) == rows > 1:
        return value.repeat(copies, *[1] * (value.ndim - 1))
    return value  # one row for all, or nothing that has rows


def to_device(model: PreTrainedModel, sample: dict) -> dict:
    moved = {}
    device = None if model.device.type == "meta" else model.device  # offloaded: the model's own hooks move inputs
    for name, value in sample.items():
        if torch.is_tensor(value):
            value = value.to(device=device, dtype=model.dtype if value.is_floating_point() else None)
        moved[name] = value
    return moved


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    return text_model(model.model).layers


def _check_model(model: PreTrainedModel):
    if not hasattr(model, "set_shortv_layers") or not hasattr(model, "lm_head"):
        raise ValueError(
            f"{type(model).__name__} cannot freeze visual tokens; call shortv_hf.apply_shortv(model, []) first, or load the "
            "checkpoint with its family's ShortV class"
        )


def _describe_model(model: PreTrainedModel) -> dict:
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


def progress(items: Iterable | None, description: str):
    """Iterate with a progress bar and the time left; `disable_progress_bar` of Transformers turns it off."""
    return logging.tqdm(() if items is None else items, desc=description)


__all__ = [
    "LayerRanking",
    "choose_by_flops",
    "choose_by_kl",
    "choose_num_layers",
    "frozen_tokens",
    "joint_kl",
    "joint_kl_curve",
    "rank_layers",
]
