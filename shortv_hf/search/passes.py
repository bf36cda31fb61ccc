"""What a sample says: how far each change alone moves the model's next token, and how many tokens it leaves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..data.inputs import feature_mask, to_device
from ..layer_contribution.freezing import measuring
from ..layer_contribution.kl import DENSE, Settings, divergence, logits_with
from ..layer_contribution.trace import Trace
from ..upstream import text_model
from .space import TOKEN_METHODS, Space, options_of


def possible_methods(model: Any, sample: dict) -> list[str]:
    """The token reductions that the model can have: some families lack what a method needs, which a pass finds out."""
    found = []
    with measuring(model):
        sample = _one_row(model, sample)
        v = int(feature_mask(model.config, sample).sum())
        for method in TOKEN_METHODS:
            try:
                for options in options_of(method, model.config, v, [0.5]):
                    logits_with(model, sample, Settings((), options))
                    found.append(method)
            except ValueError:
                continue
    return found


def isolated(model: Any, sample: dict, space: Space, kl: str, layers_per_batch: int) -> dict[str, Any]:
    """KL to the dense model of everything in `space` alone, on one sample.

    One dense pass, whose states are kept; freezing and withdrawing go on from them at their layer, only methods that drop
    some tokens need a pass of their own.

    Returns:
        "entries", "tails", "reductions": nats, one each. "left": of each reduction, how many visual tokens each decoder
        layer sees; "visual": how many there are.

    Raises:
        ValueError: the sample is a batch of several.
    """
    with measuring(model):
        sample = _one_row(model, sample)
        trace = Trace(model, sample, [], "visual")
        found: dict[str, Any] = {
            "entries": trace.divergences(space.entries, trace.logits, kl, layers_per_batch)[:, 0].tolist()
            if space.entries
            else [],
            "tails": [float(divergence(trace.logits, trace.withdrawn(k), kl)) for k in space.tails],
        }
        dense = trace.logits
        del trace  # its states take more memory than anything that follows
        found |= _with_settings(model, sample, [Settings((), each) for each in space.reductions], dense, kl)
        found["reductions"] = found.pop("kl")
        return found


def joint(model: Any, sample: dict, settings: Sequence[Settings], kl: str) -> dict[str, Any]:
    """KL to the dense model of each of the `settings`, on one sample: "kl" in nats; "left" and "visual" as of [`isolated`]."""
    with measuring(model):
        sample = _one_row(model, sample)
        return _with_settings(model, sample, settings, logits_with(model, sample, DENSE), kl)


def _with_settings(model, sample, settings, dense, kl) -> dict[str, Any]:
    values, left = [], []
    mask = feature_mask(model.config, sample)
    v = int(mask.sum())
    t = mask.shape[1] - v
    for each in settings:
        with _seen_tokens(model) as seen:
            values.append(float(divergence(dense, logits_with(model, sample, each), kl)))
        left.append([n - t for n in seen])
    return {"kl": values, "left": left, "visual": v}


def _one_row(model, sample: dict) -> dict:
    sample = to_device(model, sample)
    rows = len(feature_mask(model.config, sample))
    if rows != 1:
        raise ValueError(f"a search takes samples of one row each, not batches of {rows}")
    return sample


@contextmanager
def _seen_tokens(model: Any) -> Iterator[list[int]]:
    """How many tokens each decoder layer sees, of a batch of one row, as the layers come."""
    seen: list[int] = []

    def note(module, args, output):
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        seen.append(states.shape[1])

    handles = [layer.register_forward_hook(note) for layer in text_model(model.model).layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
