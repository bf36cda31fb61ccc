"""The model that all users of the demonstration share, one at a time."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transformers import ProcessorMixin
from transformers.utils.hub import cached_file

from ..configuration_shortv import validate_shortv_layers, validate_visual_reduction
from ..hub.loading import load
from ..layer_contribution.ranking import LayerRanking
from ..upstream import visual_token_ids


MAX_CACHES = 8  # of conversations that keep theirs; the others compute their next prompt anew


class HoldsCache(Protocol):
    """A conversation that can do without its cache."""

    closed: bool

    def forget_cache(self) -> None: ...


@dataclass(frozen=True)
class Settings:
    """What a user has set: frozen layers or halves of them, and the options of a token reduction."""

    layers: tuple[int | str, ...]
    reduction: dict[str, Any] | None = None


@dataclass
class SharedModel:
    """Model and processor, and what a page offers of them.

    Attributes:
        name: as users know it.
        order: layers (or halves) in the order in which they are frozen, most ineffective first.
        start: the settings that a page begins with: the first layers of `order`, and the config's reduction.
        order_from: where the order comes from, for the page to say.
    """

    model: Any
    processor: ProcessorMixin
    name: str
    order: list[int | str]
    start: Settings
    order_from: str
    max_caches: int = MAX_CACHES
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _warm: "OrderedDict[int, HoldsCache]" = field(default_factory=OrderedDict)

    @property
    def takes_video(self) -> bool:
        return "video" in visual_token_ids(self.model.config)

    def settings(self, num_layers: int, reduction: dict[str, Any] | None) -> Settings:
        """The first `num_layers` layers of the order, and a reduction.

        Raises:
            ValueError: there are not so many, or the model cannot have the reduction; it says why.
        """
        if not 0 <= num_layers <= len(self.order):
            raise ValueError(f"cannot freeze {num_layers} layers; the valid range is 0 to {len(self.order)}")
        layers = validate_shortv_layers(self.order[:num_layers], self.model.config.get_text_config().num_hidden_layers)
        return Settings(tuple(layers), validate_visual_reduction(reduction, self.model.config))

    @contextmanager
    def turn(self, user: HoldsCache, settings: Settings) -> Iterator[Any]:
        """Inside, the model is this user's alone, set as `settings` say. Behind it, the users whose last turn is longest ago
        give up their caches if there are more than `max_caches`."""
        with self._lock:
            layers = list(settings.layers)
            with self.model.using(shortv_layers=layers, visual_reduction=settings.reduction) as model:
                yield model
            if not user.closed:
                self._warm[id(user)] = user
                self._warm.move_to_end(id(user))
            while len(self._warm) > self.max_caches:
                self._warm.popitem(last=False)[1].forget_cache()

    def leave(self, user: HoldsCache) -> None:
        """The user is gone: nothing here refers to it any more."""
        self._warm.pop(id(user), None)


def load_shared(
    name: str,
    shown: str,
    layers: list[int | str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    **fields: Any,
) -> SharedModel:
    """Load a model to share. The order of layers is `layers`, else that of the ranking in its repo, else the config's.

    Args:
        name: Hub id or directory.
        shown: what users read instead.
        fields: of the config, such as `visual_reduction`.

    Raises:
        ValueError, OSError: as `hub.loading.load`.
    """
    model, processor = load(name, layers, device, dtype, **fields)
    own: list[int | str] = list(model.config.shortv_layers)
    order, order_from = own, "the order of --layers" if layers is not None else "the order of the model's config"
    ranking = None if layers is not None else _ranking(name, model.config)
    if (
        ranking is not None and ranking[: len(own)] == own
    ):  # another order would not begin with what the config freezes
        order, order_from = ranking, "its ranking"
    start = Settings(tuple(own), model.config.visual_reduction)
    return SharedModel(model, processor, shown, order, start, order_from)


def _ranking(name: str, config: Any) -> list[int | str] | None:
    """All layers in the order of the repo's ranking.json; `None` if it has none for this model."""
    file = cached_file(name, "ranking.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    ranking = LayerRanking.load(Path(file))
    n_layers = config.get_text_config().num_hidden_layers
    if ranking.num_hidden_layers != n_layers:
        return None
    return ranking.order if ranking.entries is None else None  # with halves in it, entries exclude each other
