"""What a search chooses among.

A decoder layer updates visual tokens twice, and they can leave: before it as a whole (VTW), or some of them (token reductions).

    layer, mlp, self_attn   this update of visual tokens is left out in some layers
    tail                    the last layers see no visual token: VTW, from every layer on that it may begin at
    tokens                  a method drops some of them: FastV, random, VTC-CLS, downsample, each at some shares
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from ..configuration_shortv import PARTS as HALVES
from ..flops.equations import flops_ratio
from ..layer_contribution.ranking import LAYER, entries_of
from ..reduction import METHODS, ModelSizes, parse_visual_reduction


TAIL, TOKENS = "tail", "tokens"
PARTS = (LAYER, *HALVES, TAIL, TOKENS)
DEFAULT_PARTS = (LAYER, "mlp", TAIL, TOKENS)
# Those that one option sets, whatever the pictures: PruMerge keeps what a picture asks for, and iLLaVA's options are many.
TOKEN_METHODS = ("fastv", "vtc_cls", "random", "downsample")
SHARES = (0.75, 0.5, 0.25, 0.125)  # of the visual tokens, that a method keeps


@dataclass(frozen=True)
class Space:
    """What is measured alone, before anything is chosen.

    Attributes:
        entries: of `shortv_layers`.
        tails: layers before which all visual tokens may leave.
        reductions: `visual_reduction` dicts of methods that drop some of them.
    """

    entries: tuple[int | str, ...] = ()
    tails: tuple[int, ...] = ()
    reductions: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(
        cls, config: PretrainedConfig, parts: Sequence[str], v: int, methods: Sequence[str] = TOKEN_METHODS
    ) -> "Space":
        """What `parts` have for a model with this `config` and prompts of about `v` visual tokens; of the token reductions,
        `methods`."""
        n_layers, sizes = config.get_text_config().num_hidden_layers, ModelSizes.of(config)
        frozen = [part for part in parts if part in (LAYER, *HALVES)]
        withdrawn = METHODS["vtw"].candidates(sizes, v) if TAIL in parts else []
        return cls(
            tuple(entries_of(frozen, n_layers)) if frozen else (),
            tuple(options["k"] for options in withdrawn if options["k"] < n_layers),
            tuple(found for method in methods if TOKENS in parts for found in options_of(method, config, v, SHARES)),
        )


def check_parts(parts: Sequence[str]):
    """Raises `ValueError` for an unknown part, one named twice, or none."""
    if isinstance(parts, str) or not parts or len(set(parts)) != len(parts) or not set(parts) <= set(PARTS):
        raise ValueError(f"parts is {parts!r}; it takes some of {', '.join(PARTS)}, each once")


def options_of(method: str, config: PretrainedConfig, v: int, shares: Sequence[float]) -> list[dict[str, Any]]:
    """A method's options that come closest to keeping these shares of `v` visual tokens, each once; none where the model
    cannot have the method, and none that keeps all."""
    sizes, found = ModelSizes.of(config), []
    tiles = max(v // sizes.patches, 1) if sizes.patches else 1
    kept: list[tuple[int, dict[str, Any]]] = []
    for candidate in METHODS[method].candidates(sizes, v):
        options = {"method": method, **candidate}
        try:
            reduction = parse_visual_reduction(options, sizes)
        except ValueError:
            return []
        left = None if reduction is None else reduction.left(v, sizes)
        if left is None and reduction is not None:
            left = reduction.left(v, sizes, tiles)
        if left is not None and 0 < left < v:
            kept.append((left, options))
    for share in shares:
        if kept:
            closest = min(kept, key=lambda each: abs(each[0] - share * v))[1]
            if closest not in found:
                found.append(closest)
    return found


def matched(method: str, config: PretrainedConfig, t: int, v: int, ratio: float) -> dict[str, Any] | None:
    """A method's options whose prefill of `t` text and `v` visual tokens costs closest to `ratio` of the dense model's FLOPs;
    `None` where the model cannot have the method."""
    sizes, best = ModelSizes.of(config), None
    tiles = max(v // sizes.patches, 1) if sizes.patches else 1  # whole ones; of the others, all tokens stay
    candidates = METHODS[method].candidates(sizes, v)
    for candidate in candidates:
        options = {"method": method, **candidate}
        try:
            reduction = parse_visual_reduction(options, sizes)
        except ValueError:
            return None
        if len(candidates) == 1:
            return options
        kept = reduction.left(v, sizes, tiles) if reduction and reduction.left(v, sizes) is None else None
        reached = flops_ratio(t, v, config, shortv_layers=[], visual_reduction=options, kept=kept)
        if best is None or abs(reached - ratio) < best[0]:
            best = (abs(reached - ratio), options)
    return None if best is None else best[1]
