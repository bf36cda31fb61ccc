"""Merging of patches inside a vision tower, whose later layers then see fewer of them.

A layer of a tower adds its attention to the states, and then its FFN, which takes each patch by itself. Between the two,
[`TowerMerging`] puts the merged value at its patch's place, lets norm and FFN have the patches that stay only, and behind
the layer the others are gone. That is done by hooks on the stock modules: no part of a tower is built or copied here. The
attention is the stock one, whatever its implementation. Scores are of queries and keys that are computed once more, a
block of queries at a time.

Shapes: I pictures (images, tiles, frames) of n patches each, C channels. CLIP, SigLIP and InternVL hold `[I, n, C]`;
Qwen2-VL the patches of all pictures in one row, `[sum of n, C]`.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .reduction import DROPPED, TokenMap, TowerReduction, TowerSizes, log_sums, query_blocks, received
from .rows import Rows
from .upstream import argument, family_of, is_newer_than_tested, not_right
from .vision import VisionPass, current_pass


class Parts(NamedTuple):
    """Names of a layer's attention, of the norm before its FFN, and of that."""

    attention: str
    norm: str
    ffn: str = "mlp"


# CLIP and SigLIP, InternVL, Qwen2-VL.
PARTS = (Parts("self_attn", "layer_norm2"), Parts("attention", "layernorm_after"), Parts("attn", "norm2"))


def parts_of(module: nn.Module) -> Parts | None:
    """The names in a layer of a tower; `None` if it is none."""
    return next((parts for parts in PARTS if all(hasattr(module, name) for name in parts)), None)


def tower_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model's vision tower, if it is of a kind that this file knows."""
    return [module for module in model.modules() if parts_of(module) is not None]


def merger_of(model: nn.Module) -> nn.Module | None:
    """The module of a tower like Qwen2-VL's that makes a visual token of several patches."""
    towers = (module for module in model.modules() if hasattr(module, "blocks") and hasattr(module, "merger"))
    return next((tower.get_submodule("merger") for tower in towers), None)


def listen_in_tower(model: nn.Module) -> None:
    """Hooks by which a [`TowerMerging`] finds its way into a tower; once per model, at its construction."""
    for layer in tower_layers(model):
        parts = parts_of(layer)
        assert parts is not None  # it is one of them
        layer.register_forward_pre_hook(_before_layer, with_kwargs=True)
        layer.get_submodule(parts.attention).register_forward_pre_hook(_before_attention, with_kwargs=True)
        layer.get_submodule(parts.norm).register_forward_pre_hook(_before_norm)
        layer.get_submodule(parts.ffn).register_forward_hook(_after_ffn)
        layer.register_forward_hook(_after_layer)
    merger = merger_of(model)
    if merger is not None:
        merger.register_forward_hook(_after_merger)


def _current() -> "TowerMerging | None":
    merging = current_pass()
    return merging if isinstance(merging, TowerMerging) else None


def _before_layer(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    merging = _current()
    return None if merging is None or module not in merging.places else (args, merging.enter(module, args, kwargs))


def _before_attention(module: nn.Module, args: tuple, kwargs: dict) -> None:
    merging = _current()
    if merging is not None and module is merging.attention:
        merging.seen = args[0] if args else kwargs["hidden_states"], kwargs


def _before_norm(module: nn.Module, args: tuple) -> Tensor | None:
    merging = _current()
    return merging.merge(args[0]) if merging is not None and module is merging.norm else None


def _after_ffn(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    merging = _current()
    return merging.spread(output) if merging is not None and module is merging.ffn else None


def _after_layer(module: nn.Module, args: tuple, output: Any) -> Any:
    merging = _current()
    return merging.leave(output) if merging is not None and module is merging.layer else None


def _after_merger(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    merging = _current()
    return None if merging is None or module is not merging.merger else merging.at_placeholders(output)


@dataclass
class Merge:
    """What happened to pictures of n patches in one layer.

    Attributes:
        layer: of the tower.
        pictures: their numbers.
        patches: `[I, n]`, which of the picture's patches those before the layer were.
        scores: `[I, n]` float32.
        map: `[I, n]`, where they went.
    """

    layer: int
    pictures: list[int]
    patches: Tensor
    scores: Tensor
    map: TokenMap


_checked: set[type] = set()


@torch.no_grad()
def check_layer(layer: nn.Module, args: tuple, kwargs: dict) -> None:
    """On a Transformers newer than the tested ones, once per kind of layer: a layer whose last patch is made equal to its
    first one before the norm, in place, has to return the same for both, and for the others what it returns without.

    Raises:
        ValueError: it does not, so it adds its FFN to something else than merging changes.
    """
    parts = parts_of(layer)
    if parts is None or type(layer) in _checked or not is_newer_than_tested():
        return
    probe = copy.deepcopy(layer)
    vars(probe).pop("forward", None)  # 4.x leaves one there that is the layer's own
    for module in probe.modules():  # upstream's note what layers return
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    expected = probe(*args, **kwargs)

    def equal_first(module: nn.Module, given: tuple) -> None:
        given[0][..., -1, :] = given[0][..., 0, :]

    probe.get_submodule(parts.norm).register_forward_pre_hook(equal_first)
    found = probe(*args, **kwargs)
    expected, found = (each[0] if isinstance(each, tuple) else each for each in (expected, found))
    expected = torch.cat([expected[..., :-1, :], expected[..., :1, :]], dim=-2)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().amax())):
        raise not_right(
            f"patches cannot be merged in its {type(layer).__name__}, which does not add its FFN to its input"
        )
    _checked.add(type(layer))


class _Merged(NamedTuple):
    """What [`Merge`] is made of, when somebody wants to know: layer, pictures, scores, and what the method said."""

    layer: int
    pictures: range
    scores: Tensor
    order: Tensor
    weights: Tensor


class TowerMerging(VisionPass):
    """A pass of a vision tower in which `reduction` merges patches."""

    def __init__(self, model: nn.Module, reduction: TowerReduction, sizes: TowerSizes):
        layers = tower_layers(model)
        if len(layers) <= max(reduction.layers):
            raise not_right(f"{len(layers)} layers of the vision tower of {type(model).__name__} can be found")
        self.reduction, self.unit, self.others = reduction, sizes.unit, sizes.others
        self.places = {layer: number for number, layer in enumerate(layers)}
        self.merger = merger_of(model)
        self._merged: list[_Merged] = []
        # How many patches each picture had and has; of one row of patches, what layers are to be given instead.
        self.dense_lengths: list[int] = []
        self.lengths: list[int] = []
        self.in_one_row = False
        self.arguments: dict[str, Any] = {}
        self._forget_layer()

    def _forget_layer(self) -> None:
        """Between layers, there is none of whose parts the hooks take notice."""
        self.layer: nn.Module | None = None
        self.attention: nn.Module | None = None
        self.norm: nn.Module | None = None
        self.ffn: nn.Module | None = None
        self.seen: tuple[Tensor, dict] | None = None
        self.kept: Rows | None = None

    # In a layer

    def enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> dict:
        """The layer's keyword arguments, those that tell pictures apart for the patches that are left.

        Raises:
            ValueError: the layer is to be run once more while gradients are computed, when this pass is over.
        """
        states = args[0] if args else kwargs["hidden_states"]
        self.in_one_row = states.ndim == 2
        if not self.lengths:
            if self.in_one_row:
                ends = argument(kwargs, "cu_seqlens").tolist()
                self.lengths = [end - start for start, end in zip(ends, ends[1:], strict=False)]
            else:
                self.lengths = [states.shape[1] - self.others] * len(states)
            self.dense_lengths = self.lengths
        if torch.is_tensor(kwargs.get("rotary_pos_emb")):  # 4.x takes them too, and gives tables
            raise not_right("the layers of its Qwen2-VL tower get angles instead of rotary tables")
        kwargs = {**kwargs, **self.arguments}
        if self.places[layer] in self.reduction.layers:
            if getattr(layer, "gradient_checkpointing", False) and layer.training:
                raise ValueError(
                    "patches cannot be merged in a vision tower with gradient checkpointing, whose layers run once more "
                    "without; call gradient_checkpointing_disable() on the tower, or use vit_k = []"
                )
            parts = parts_of(layer)
            assert parts is not None  # it is one of them
            check_layer(layer, args, kwargs)
            self.layer = layer
            self.attention, self.norm, self.ffn = (layer.get_submodule(name) for name in parts)
        return kwargs

    def merge(self, states: Tensor) -> Tensor:
        """The patches that stay, of the `states` after attention, in which merged values take their places."""
        assert self.layer is not None and self.attention is not None and self.seen is not None
        others, number, left = self.others, self.places[self.layer], list(self.lengths)
        kept = torch.ones(states.shape[:-1], dtype=torch.bool, device=states.device)
        with torch.no_grad():
            queries_and_keys = _queries_and_keys(self.attention, *self.seen)
        for pictures, part in self._pictures():
            patches = part(states)[:, others:]
            n = patches.shape[1]
            scores = self._scores(*map(part, queries_and_keys))[:, others:]
            r = self.reduction.removed(n, self.unit)
            if r == 0:
                continue
            order, weights = self.reduction.merged(scores, r)
            picture = torch.arange(len(order), device=order.device)
            lowest = patches[picture[:, None], order].float()
            # In place: the layer adds the FFN to these very states.
            patches[picture, order[:, -1]] = (lowest * weights[:, None]).sum(1).to(patches.dtype)
            part(kept)[:, others:].scatter_(1, order[:, :-1], False)
            self._merged.append(_Merged(number, pictures, scores, order, weights))
            left[pictures.start : pictures.stop] = [n - r] * len(pictures)
        self.lengths = left
        width = sum(left) if self.in_one_row else left[0] + others
        self.kept = Rows.of(kept[None] if self.in_one_row else kept, width, exact=True)
        return self._select(states)

    def _pictures(self) -> Iterator[tuple[range, Any]]:
        """Pictures of equal numbers of patches that follow each other, and a function that takes theirs, as a view `[I, n,
        …]`, out of all."""
        if not self.in_one_row:
            yield range(len(self.lengths)), lambda values: values
            return
        start = first = 0
        for n, group in groupby(self.lengths):
            count = len(list(group))
            rows = slice(start, start + count * n)
            yield range(first, first + count), lambda values, rows=rows, n=n: values[rows].unflatten(0, (-1, n))
            start, first = rows.stop, first + count

    @torch.no_grad()
    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Of pictures of n tokens, `[I, n]` float32, from queries and keys `[I, n, heads, d]`."""
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        scaling = query.shape[-1] ** -0.5
        if not self.reduction.own_queries:
            return received(query, key, scaling)
        return torch.cat([log_sums(query[:, :, block], key, None, scaling) for block in query_blocks(query)], dim=1)

    def _select(self, states: Tensor) -> Tensor:
        assert self.kept is not None
        return self.kept.select(states[None])[0] if self.in_one_row else self.kept.select(states)

    def spread(self, output: Tensor) -> Tensor:
        """What the FFN made of the patches that stay, at their places among all."""
        assert self.kept is not None and self.seen is not None
        n = self.seen[0].shape[-2]
        return self.kept.spread(output[None], n)[0] if self.in_one_row else self.kept.spread(output, n)

    def leave(self, output: Any) -> Any:
        """The layer's output without the patches that are gone."""
        assert self.seen is not None
        states = output[0] if isinstance(output, tuple) else output
        left = self._select(states)
        if self.in_one_row:
            given, tables = argument(self.seen[1], "cu_seqlens"), argument(self.seen[1], "position_embeddings")
            self.arguments = {
                "cu_seqlens": torch.tensor([0, *accumulate(self.lengths)]).to(given),
                "position_embeddings": tuple(map(self._select, tables)),
            }
        self._forget_layer()
        return (left, *output[1:]) if isinstance(output, tuple) else left

    # Behind the tower

    def at_placeholders(self, features: Tensor) -> Tensor:
        """`[visual tokens left, h]` → `[visual tokens, h]`: those of a frame take the first of its places, and their
        positions on the grid; the others are marked."""
        parts = features.split([n // self.unit for n in self.lengths])
        return torch.cat([pad(part, n // self.unit) for part, n in zip(parts, self.dense_lengths, strict=True)])

    # For those who look on

    @property
    def merges(self) -> list[Merge]:
        """What has been merged, in the order of the layers."""
        return self._history()[0]

    @property
    def left(self) -> list[Tensor]:
        """Of each picture, which of its patches are left, `[m]`."""
        return self._history()[1]

    def _history(self) -> tuple[list[Merge], list[Tensor]]:
        merges: list[Merge] = []
        left = [torch.arange(n) for n in self.dense_lengths]
        for layer, pictures, scores, order, weights in self._merged:
            scores, order, weights = scores.cpu(), order.cpu(), weights.cpu()
            before = torch.stack([left[picture] for picture in pictures])
            place = torch.arange(scores.shape[1]).expand_as(scores)
            target = place.scatter(1, order, order[:, -1:].expand_as(order))
            share = torch.ones_like(scores).scatter(1, order, weights.expand_as(order))
            merges.append(Merge(layer, list(pictures), before, scores, TokenMap(target, scores.shape[1], share)))
            stays = torch.ones_like(place, dtype=torch.bool).scatter(1, order[:, :-1], False)
            for picture, patches, kept in zip(pictures, before, stays, strict=True):
                left[picture] = patches[kept]
        return merges, left


def pad(features: Tensor, n: int) -> Tensor:
    """`[m, h]` → `[n, h]`, those behind marked as dropped."""
    return torch.nn.functional.pad(features, (0, 0, 0, n - len(features)), value=DROPPED)


def _queries_and_keys(attention: Any, states: Tensor, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Of a tower's attention on normed states `[…, n, C]`, `[…, n, heads, d]` each."""
    heads = attention.num_heads
    if hasattr(attention, "qkv"):
        query, key, _ = attention.qkv(states).unflatten(-1, (3, heads, -1)).unbind(-3)
        tables = argument(kwargs, "position_embeddings")
        return family_of(attention).apply_rotary_pos_emb_vision(query, key, *tables)
    query, key = attention.q_proj(states), attention.k_proj(states)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    return query.unflatten(-1, (heads, -1)), key.unflatten(-1, (heads, -1))
