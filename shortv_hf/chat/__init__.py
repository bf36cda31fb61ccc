"""Conversations about images, on one cache; dense and ShortV compared."""

from .. import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__, {"comparison": ("compare",), "conversation": ("Answer", "Conversation")}
)
