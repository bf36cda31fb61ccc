"""Freezing one layer after another, each pass begun where the dense pass comes to its frozen layer.

A frozen pass equals the dense pass up to its frozen layer, so it starts from the dense pass's input to that layer: about
half the cost of L + 1 passes.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..configuration_shortv import frozen_updates
from ..data.inputs import feature_mask, last_positions
from ..plan import Plan
from ..reduction import METHODS
from ..upstream import text_model
from .freezing import frozen_tokens
from .kl import divergence


def layer_of(entry: int | str) -> int:
    """The layer that an entry of `shortv_layers` is of."""
    return int(str(entry).partition(".")[0])


class Trace:
    """One batch through the model with `base` layers frozen, and from there through the model with one more layer, or half
    of one, frozen.

    Keeps the input of every layer, L tensors `[B, S, h]`.

    Attributes:
        logits: `[B, V]` float32, of the last position.
    """

    def __init__(self, model: Any, sample: dict, base: Sequence[int | str], tokens: str):
        self.model, self.tokens, self.base = model, tokens, list(base)
        self.layers = text_model(model.model).layers
        self.n_layers = len(self.layers)
        self.visual_mask = feature_mask(model.config, sample)
        self.padding_mask = sample.get("attention_mask")
        self.last = last_positions(self.visual_mask, self.padding_mask)
        self.inputs: list[torch.Tensor] = []
        self.kwargs: list[dict[str, Any]] = []
        self.plans: dict[int, Plan | None] = {}
        self.output: torch.Tensor  # of the last layer
        self.text_kwargs: dict[str, Any] = {}  # what the text model was called with
        before: dict[str, torch.Tensor] = {}
        # What the model adds behind a layer (Qwen3-VL: features to visual tokens).
        self.between: dict[int, torch.Tensor] = {}

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

        def keep_arguments(module, args, kwargs):
            self.text_kwargs = {name: value for name, value in kwargs.items() if name != "plan"}

        with frozen_tokens(model, self.base, tokens), ExitStack() as stack:
            text = text_model(model.model)
            stack.callback(text.register_forward_pre_hook(keep_arguments, with_kwargs=True).remove)
            for layer in self.layers:  # behind the hooks that freeze
                stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(keep_output).remove)
            model.model(**sample, use_cache=False)
        self.logits = self._head(self.output)

    def divergences(self, candidates: Iterable[int | str], dense: torch.Tensor, kl: str, batch: int) -> torch.Tensor:
        """KL to `dense` `[B, V]` when each of the candidates is frozen beside the base: `[n_candidates, B]` float64."""
        candidates = list(candidates)
        logits: dict[int | str, torch.Tensor] = {}
        if self.tokens == "visual" and not self.visual_mask.gather(1, self.last[:, None]).any():
            # What the last layer makes of visual tokens is read by nothing: freezing it changes exactly nothing.
            logits |= {each: self.logits for each in candidates if layer_of(each) == self.n_layers - 1}
        groups = sorted((each for each in candidates if each not in logits), key=layer_of)
        for start in range(0, len(groups), batch):
            logits.update(self._frozen_logits(groups[start : start + batch]))
        return torch.stack([divergence(dense, logits[each], kl) for each in candidates]).double()

    def withdrawn(self, k: int) -> torch.Tensor:
        """Logits `[B, V]` of the last position when all visual tokens leave before layer `k`, as VTW has it."""
        if not self.visual_mask.any():
            return self.logits
        options: dict[str, Any] = {"k": k}
        plan = Plan(
            frozenset(), frozenset(), self.visual_mask, reduction=METHODS["vtw"](**options), padding=self.padding_mask
        )
        plan, _, _ = plan.with_stream(self.inputs[0], self.text_kwargs)
        states = self.inputs[k]
        for layer, kwargs in zip(self.layers[k:], self.kwargs[k:], strict=True):
            states = _states(layer(states, plan=plan, **kwargs))
        assert plan.stream is not None  # the reduction has one
        rows = plan.stream.rows(k)
        return self._head(states if rows is None else rows.spread(states, self.visual_mask.shape[1]))

    def _frozen_logits(self, candidates: list[int | str]) -> dict[int | str, torch.Tensor]:
        """Logits of each candidate. They join one batch as their layers come; the first candidates of it come first."""
        joined: list[int | str] = []
        states: torch.Tensor | None = None
        for index in range(layer_of(candidates[0]), self.n_layers):
            base = [entry for entry in self.base if layer_of(entry) == index]
            if states is not None:
                states = self._run(index, states, base)
            for candidate in candidates:
                if layer_of(candidate) == index:
                    new = self._run(index, self.inputs[index], [*base, candidate])
                    states = new if states is None else torch.cat([states, new.to(states.device)])
                    joined.append(candidate)
        assert states is not None  # there is a candidate
        return dict(zip(joined, self._head(states).split(len(self.visual_mask)), strict=True))

    def _run(self, index: int, states: torch.Tensor, frozen: list[int | str]) -> torch.Tensor:
        """A layer, of which is `frozen` what these entries name."""
        copies = len(states) // len(self.visual_mask)
        if not (frozen and self.tokens == "all"):
            kwargs = {
                name: _repeat(value, len(self.visual_mask), copies) for name, value in self.kwargs[index].items()
            }
            states = _states(self.layers[index](states, plan=self._plan(copies, frozen), **kwargs))
        added = self.between.get(index)
        return states if added is None else states + added.to(states.device).repeat(copies, 1, 1)

    def _plan(self, copies: int, frozen: list[int | str]) -> Plan | None:
        if not frozen:
            return None
        if copies not in self.plans:
            tokens = self.visual_mask if self.tokens == "visual" else ~self.visual_mask
            self.plans[copies] = Plan.build((), tokens.repeat(copies, 1))
        plan = self.plans[copies]
        if plan is None:
            return None
        attention, ffn = frozen_updates(frozen)
        return replace(plan, attention=attention, ffn=ffn, _shared=plan._shared)

    def _head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of the last positions, `[n, V]` float32."""
        last = self.last.repeat(len(states) // len(self.last)).to(states.device)
        states = states[torch.arange(len(states), device=states.device), last]
        norm: Any = text_model(self.model.model).norm
        return self.model.lm_head(norm(states)).float()

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
