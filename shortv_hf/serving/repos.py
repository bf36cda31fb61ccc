"""Which repos are served: ShortV's."""

from typing import Any

from transformers import PretrainedConfig

from ..modeling_shortv import MODELS


def shortv_config(repo: str, revision: str | None = None) -> dict[str, Any]:
    """The `config.json` of a ShortV repo.

    Raises:
        ValueError: `repo` is not a ShortV repo.
        OSError: it cannot be found.
    """
    config = PretrainedConfig.get_config_dict(repo, revision=revision)[0]
    model_type = config.get("model_type")
    if model_type not in [model_class.config_class.model_type for model_class in MODELS]:
        raise ValueError(f"{repo} has model_type {model_type!r}, which is not ShortV's; make a repo with build-repo")
    return config
