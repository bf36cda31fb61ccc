"""Serving a ShortV repo with vLLM's OpenAI-compatible server, to which the plug-in beside this file brings the models."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from ..repos import shortv_config
from .architectures import MODELS


SERVER = "vllm.entrypoints.openai.api_server"  # as a module: the command `vllm` of builds for CPUs does not start


def serve(repo: str, arguments: Sequence[str] = (), revision: str | None = None) -> None:
    """Become vLLM's server, with `repo` as its model. Does not return.

    Args:
        repo: Hub id or directory of a ShortV repo.
        arguments: further arguments of `vllm serve`, such as `["--port", "8080"]`.
        revision: commit or branch of the repo.

    Raises:
        ValueError: vLLM is missing; `repo` is not a ShortV repo, or of a family that the plug-in does not have.
        OSError: it cannot be found.
    """
    if find_spec("vllm") is None:
        raise ValueError("this engine needs the extra: pip install '.[vllm]' in this package's checkout")
    architectures = shortv_config(repo, revision).get("architectures") or []
    if not set(architectures) & set(MODELS):
        raise ValueError(f"{repo} is a {', '.join(architectures)}; on vLLM there are {', '.join(MODELS)}")
    command = [
        sys.executable,
        "-m",
        SERVER,
        "--model",
        repo,
        *(["--revision", revision] if revision else []),
        *arguments,
    ]
    sys.stdout.flush()
    os.execv(command[0], command)
