"""Serving a ShortV repo with Transformers' own OpenAI-compatible server.

The server finds models through tables of class names, which know nothing of classes from elsewhere; they are told here.
The classes are those of this package: no remote code is run.
"""

from collections.abc import Sequence

import transformers

from ..modeling_shortv import MODELS
from ..upstream import ON_4
from .repos import shortv_config


TABLES = ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")


def serve(repo: str, arguments: Sequence[str] = (), revision: str | None = None):
    """Run `transformers serve` with `repo` as its only model; returns when the server is stopped.

    Args:
        repo: Hub id or directory of a ShortV repo. Requests name it as their model (`repo@revision` with a revision).
        arguments: further arguments of `transformers serve`, such as `["--port", "8080"]`.
        revision: commit or branch of the repo.

    Raises:
        ValueError: Transformers is older than 5 or lacks the packages of its server; `repo` is not a ShortV repo.
        OSError: it cannot be found.
    """
    if ON_4:
        raise ValueError(
            f"serving needs Transformers 5, this is {transformers.__version__}: the server of 4.x streams every answer "
            "and shares one cache between conversations"
        )
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ValueError("serving needs the extra: pip install '.[serve]' in this package's checkout")
    shortv_config(repo, revision)
    from transformers.cli.transformers import app
    from transformers.models.auto import modeling_auto

    for model_class in MODELS:
        for table in TABLES:
            getattr(modeling_auto, table)[model_class.config_class.model_type] = model_class.__name__
    app(["serve", f"{repo}@{revision}" if revision else repo, *arguments])
