"""A model with some tokens frozen in some layers, for a while: to measure, not to serve."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration_shortv import frozen_updates
from ..data.inputs import feature_mask
from ..plan import Plan
from ..upstream import text_model


TOKENS = ("visual", "text", "all")


@contextmanager
def frozen_tokens(model: Any, layers: Sequence[int | str], tokens: str = "visual") -> Iterator[Any]:
    """The model with `tokens` frozen in `layers`, and nothing else, for a while.

    "visual" is ShortV (paper Figure 2a). "text" (Figure 2b): text tokens pass through unchanged, visual tokens alone are
    queries and pass the FFN. "all": the layer is skipped. With "text" and "all", generate with `use_cache=False`: a
    generated token is text too, and the frozen pass needs the whole sequence.
    """
    check_tokens(tokens)
    if tokens != "visual" and model.settings[1] is not None:
        raise ValueError(f"a reduction drops visual tokens; it does not go with freezing {tokens} tokens")
    with ExitStack() as stack:
        stack.enter_context(model.using(shortv_layers=layers))  # checks the ids
        if tokens != "visual":
            stack.enter_context(model.using(shortv_layers=[]))
            plan = {}

            def build_plan(module, args, kwargs):
                plan["current"] = Plan.build(layers, ~feature_mask(module.config, kwargs))

            def give_plan(module, args, kwargs):
                return args, {**kwargs, "plan": plan["current"]}

            def skip(module, args, kwargs, output):
                states = args[0] if args else kwargs["hidden_states"]
                return (states, *output[1:]) if isinstance(output, tuple) else states

            if tokens == "all" and any(isinstance(each, str) for each in layers):
                raise ValueError("a layer that is skipped for all tokens has no halves")
            for layer in (text_model(model.model).layers[i] for i in set.union(set(), *frozen_updates(layers))):
                if tokens == "all":
                    handle = layer.register_forward_hook(skip, with_kwargs=True)
                else:
                    handle = layer.register_forward_pre_hook(give_plan, with_kwargs=True)
                stack.callback(handle.remove)
            if tokens == "text":
                stack.callback(model.model.register_forward_pre_hook(build_plan, with_kwargs=True).remove)
        yield model


@contextmanager
def measuring(model: PreTrainedModel) -> Iterator[None]:
    """The dense model in evaluation mode, without visual-token reduction, for a while."""
    training = model.training
    try:
        with torch.inference_mode(), model.eval().using(shortv_layers=[], visual_reduction=None):
            yield
    finally:
        model.train(training)


def check_tokens(tokens: str):
    """Raises `ValueError` for unknown tokens."""
    if tokens not in TOKENS:
        raise ValueError(f"unknown tokens {tokens!r}; use one of {', '.join(TOKENS)}")


def check_model(model: PreTrainedModel):
    """Raises `ValueError` for a model that cannot freeze visual tokens."""
    if not hasattr(model, "set_shortv_layers") or not hasattr(model, "lm_head"):
        raise ValueError(
            f"{type(model).__name__} cannot freeze visual tokens; call shortv_hf.apply_shortv(model, []) first, or load the "
            "checkpoint with its family's ShortV class"
        )
