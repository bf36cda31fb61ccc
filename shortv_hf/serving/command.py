"""`shortv serve`."""

from typing import Annotated

import typer


SERVE_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}  # what follows is the server's


def serve(
    context: typer.Context,
    repo: Annotated[str, typer.Argument(help="Hub id or directory of a ShortV repo.")],
    revision: Annotated[str | None, typer.Option(help="Commit or branch of the repo.")] = None,
):
    """Serve a ShortV repo: `transformers serve` (Transformers 5) with our classes; its options may follow."""
    from .transformers_serve import serve as run_server

    run_server(repo, context.args, revision)
