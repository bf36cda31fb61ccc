"""`shortv serve`."""

from enum import Enum
from typing import Annotated

import typer


SERVE_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}  # what follows is the server's


class Engine(str, Enum):
    """Whose server it is."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


def serve(
    context: typer.Context,
    repo: Annotated[str, typer.Argument(help="Hub id or directory of a ShortV repo.")],
    revision: Annotated[str | None, typer.Option(help="Commit or branch of the repo.")] = None,
    engine: Annotated[Engine, typer.Option(help="Whose server.")] = Engine.TRANSFORMERS,
):
    """Serve a ShortV repo, OpenAI-compatibly: `transformers serve` (Transformers 5) or `vllm serve` with our classes; the
    server's own options may follow."""
    if engine is Engine.VLLM:
        from .vllm.serve import serve as run_server
    else:
        from .transformers_serve import serve as run_server

    run_server(repo, context.args, revision)
