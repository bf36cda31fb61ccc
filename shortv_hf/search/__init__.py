"""The cheapest prefill within a budget: which updates of visual tokens to leave out, and which tokens, chosen together."""

from .. import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__, {"result": ("Row", "SearchResult"), "run": ("SearchOptions", "search")}
)
