"""How the Hub names things."""

import re


def is_hub_id(name: str | None) -> bool:
    """Whether `name` has the form of a repo on the Hub, `owner/name`; local directories are absolute paths here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name or "") is not None


def is_commit(revision: str | None) -> bool:
    """Whether `revision` is the hash of a commit, and not a branch that moves."""
    return re.fullmatch("[0-9a-f]{40}", revision or "") is not None
