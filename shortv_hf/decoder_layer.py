"""The ShortV decoder layer: visual tokens are frozen, only text tokens are computed (paper Section 3.1, Figure 4).

In a frozen layer
    hidden states of visual tokens pass through unchanged;
    K and V are computed for all tokens, and cached in natural order;
    Q, attention output, `o_proj`, norms and the FFN are computed for text tokens only, which attend to exactly the keys
    that the causal mask allows them.

The cost falls from `2(t+v)(4h+3m)h + 4(t+v)²h` FLOPs (Eq. 3) to `2t(4h+3m)h + 4vh² + 4t(t+v)h` (Eq. 4).

So a frozen layer is the *stock* layer, called with the rows of the text tokens, around an attention whose keys and values
come from all rows. Half a layer can be frozen too, its attention or its FFN: the other half updates visual tokens as ever.
The layers are upstream's own objects: [`graft`] puts these forwards before those of their classes,
which keep their names, and no part of upstream's is built or copied here. Which tokens are text is in the [`Plan`] of the
pass (`plan.py`). A layer without one (a text-only prompt, every decoding step) or that it does not name runs upstream's
forward and nothing else.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .plan import Plan, Stream
from .rows import Rows
from .upstream import (
    Attention,
    DecoderLayer,
    argument,
    attention_arguments,
    eager_attention,
    find_cache,
    layer_norms,
    own_tables,
    returns_tuple,
    rotate,
    update_cache,
)


if TYPE_CHECKING:  # what the mixins are put before

    class _Layer(DecoderLayer):
        self_attn: "ShortVAttentionMixin"
        returns_tuple: bool  # see `Grafted`

    _Attention = Attention
else:
    _Layer = _Attention = object


class FrozenRows:
    """What a frozen layer tells its attention: the `plan`, the `rows` that are computed, and the normed `states`
    `[B, S, h]` of all tokens."""

    def __init__(self, plan: Plan, rows: Rows, states: Tensor):
        self.plan, self.rows, self.states = plan, rows, states


class ShortVDecoderLayerMixin(_Layer):
    """Modifications: given a plan that names this layer, visual tokens skip it."""

    def forward(self, hidden_states: Tensor, *args: Any, plan: Plan | None = None, **kwargs: Any) -> Any:
        """`hidden_states` `[B, S, h]` → `[B, S, h]`, out of place; in a tuple where upstream's layer returns one."""
        if plan is None:
            return super().forward(hidden_states, *args, **kwargs)
        given = kwargs
        hidden_states, kwargs, rows, feeding = plan.enter(self.self_attn, hidden_states, kwargs)
        if rows is not feeding:
            output = self._in_halves(hidden_states, plan, rows, feeding, kwargs)
        elif rows is None:
            output = super().forward(hidden_states, *args, **kwargs)
        else:
            frozen = FrozenRows(plan, rows, self.input_layernorm(hidden_states))
            output = super().forward(rows.select(hidden_states), *args, **{**kwargs, "plan": frozen})
            if isinstance(output, tuple):
                output = rows.write(hidden_states, output[0]), *output[1:]
            else:
                output = rows.write(hidden_states, output)
        if plan.stream is not None and plan.stream.looks_in(self.self_attn.layer_idx):
            with torch.no_grad():
                self.self_attn.let_tokens_choose(plan.stream, self.input_layernorm(hidden_states), kwargs, given)
        return output

    def _in_halves(
        self, hidden_states: Tensor, plan: Plan, attending: Rows | None, feeding: Rows | None, kwargs: dict
    ) -> Any:
        """The layer where only its attention, or only its FFN, is computed for all tokens, `None`, and the other half for
        the rows. Upstream's forward has no place between the two, so its two steps stand here; whether they are the
        layer's, `check_text_model` (`modeling_shortv.py`) finds out where no test does."""
        before_attention, after_attention, before_ffn, after_ffn = layer_norms(self)
        normed = before_attention(hidden_states)
        asked, with_plan = normed, {}
        if attending is not None:
            asked, with_plan = attending.select(normed), {"plan": FrozenRows(plan, attending, normed)}
        arguments = {**attention_arguments(self.self_attn, kwargs), **with_plan}
        new, weights = self.self_attn(hidden_states=asked, **arguments)
        hidden_states = _add(hidden_states, attending, lambda states: after_attention(new))
        hidden_states = _add(hidden_states, feeding, lambda states: after_ffn(self.mlp(before_ffn(states))))
        if not self.returns_tuple:
            return hidden_states
        return (hidden_states, weights) if kwargs.get("output_attentions") else (hidden_states,)


def _add(states: Tensor, rows: Rows | None, update: Callable[[Tensor], Tensor]) -> Tensor:
    """`states` `[B, S, h]` and an update of them, of all or of the rows."""
    if rows is None:
        return states + update(states)
    chosen = rows.select(states)
    return rows.write(states, chosen + update(chosen))


class ShortVAttentionMixin(_Attention):
    """Modifications: given rows, only they are queries. The submodules are called as upstream calls them, so quantized
    linears, adapters, tensor-parallel shards and hooks keep working."""

    def forward(self, hidden_states: Tensor, *args: Any, plan: FrozenRows | None = None, **kwargs: Any) -> Any:
        """`hidden_states` of the rows, normed, `[B, T, h]` → attention output `[B, T, h]`, and with `eager` the attention
        weights `[B, heads, S, keys]`, which are 0 in the rows of frozen tokens."""
        if plan is None:
            return super().forward(hidden_states, *args, **kwargs)
        frozen, rows, states = plan.plan, plan.rows, plan.states
        tables = argument(kwargs, "position_embeddings")
        mask = frozen.mask(self, rows, kwargs, states)
        query = rotate(self, self._heads("q", hidden_states), frozen.rotary(self, rows, tables))
        key, value = rotate(self, self._heads("k", states), tables), self._heads("v", states)
        cache = find_cache(kwargs)
        if cache is not None:
            key, value = update_cache(cache, key, value, self.layer_idx, kwargs)

        # SDPA with an explicit mask whatever the model's implementation: there are fewer queries than keys, and kernels
        # do not agree on how `is_causal` aligns the two. Eager is the one that returns attention weights, and knows what
        # a family does to its logits.
        eager = self.config._attn_implementation == "eager"
        attend = eager_attention(self) if eager else ALL_ATTENTION_FUNCTIONS["sdpa"]
        options: dict[str, Any] = {
            "scaling": self.scaling,
            "dropout": self.attention_dropout if self.training else 0.0,
        }
        if getattr(self, "attn_logit_softcapping", None):
            options["softcap"] = self.attn_logit_softcapping
        output, weights = attend(self, query, key, value, mask, is_causal=False, **options)
        if weights is not None:
            weights = rows.spread(weights, states.shape[1])
            if weights.requires_grad:  # gradients reach what is returned
                value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
                output = (rows.select(weights.transpose(0, 1)).transpose(0, 1) @ value).transpose(1, 2)
        return self.o_proj(output.reshape(*output.shape[:2], -1)), weights

    def _heads(self, name: str, states: Tensor) -> Tensor:
        """Queries, keys or values `[B, heads, n, d]` of normed `states` `[B, n, h]`, before their rotation."""
        states = getattr(self, f"{name}_proj")(states)
        states = states.view(*states.shape[:-1], -1, self.head_dim)
        norm = getattr(self, f"{name}_norm", None)
        return (states if norm is None else norm(states)).transpose(1, 2)

    def let_tokens_choose(self, stream: Stream, states: Tensor, kwargs: dict, given: dict) -> None:
        """Rank visual tokens by rows of this attention, which has just run on the normed `states` `[B, Q, h]` with
        `kwargs`; `given` are the arguments before tokens left. The keys are in the cache; without one they are computed
        once more, 0.1 % of a 7B prefill."""
        lookers = stream.lookers(self.layer_idx)
        cos, sin = tables = own_tables(self, kwargs)
        theirs = lookers.select(cos), lookers.select(sin)
        query = rotate(self, self._heads("q", lookers.select(states)), theirs)
        held = stream.held(self.layer_idx)
        key: Any = rotate(self, self._heads("k", states), tables) if held is None else held.keys
        stream.choose(self, lookers, query, key, given)


class Grafted:
    """Modifications: an object whose class was made by [`graft`] is pickled as the stock class and the mixins."""

    stock_class: ClassVar[type]
    mixins: ClassVar[tuple[type, ...]]
    returns_tuple: ClassVar[bool]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        kind = type(self)
        return _rebuild, (kind.stock_class, kind.mixins), self.__dict__


def _rebuild(stock_class: type, mixins: tuple[type, ...]) -> nn.Module:
    made = grafted_class(stock_class, *mixins)
    return made.__new__(made)


@functools.cache
def grafted_class(stock_class: type, *mixins: type) -> type[nn.Module]:
    """The `stock_class` with `mixins` before it, under its own name: upstream tells classes apart by their names (layers
    that must not be split over devices, outputs to be recorded)."""
    names = {name: getattr(stock_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    kind: Any = type(stock_class)  # a metaclass
    own = {"stock_class": stock_class, "mixins": mixins, "returns_tuple": returns_tuple(stock_class)}
    return kind(stock_class.__name__, (Grafted, *mixins, stock_class), {**names, **own})


def refuse_own_forward(module: nn.Module) -> None:
    """Raises `ValueError` if a module has a forward of its own, which would go before its class's. Those that are known
    are not refused: 4.57 leaves the class's behind when it has recorded outputs, accelerate's hooks call the one they found.
    """
    own = vars(module).get("forward")
    if own is None or getattr(own, "__func__", None) is type(module).forward or "_old_forward" in vars(module):
        return
    raise ValueError(f"{type(module).__name__} has a forward of its own on the instance: nothing can be put before it")


def graft(module: nn.Module, *mixins: type) -> None:
    """Put the forwards of `mixins` before the module's own. Its parts, weights and hooks stay; it is pickled and copied
    as before; `repr` shows the stock name.

    Raises:
        ValueError: as [`refuse_own_forward`].
    """
    if all(isinstance(module, mixin) for mixin in mixins):
        return
    refuse_own_forward(module)
    if "_old_forward" not in vars(module):
        module.__dict__.pop("forward", None)
    stock: type = type(module)
    module.__class__ = grafted_class(stock, *mixins)
    if "_old_forward" in vars(module):  # accelerate's hooks call it
        module._old_forward = type(module).forward.__get__(module)
