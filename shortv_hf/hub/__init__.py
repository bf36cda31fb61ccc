"""Repos: built, checked, published, and loaded."""

from .. import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "build": ("build_repo", "build_repo_from_base", "code_files"),
        "check": ("check_repo",),
        "loading": ("demo_model", "load"),
    },
)
