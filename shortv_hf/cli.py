"""The `shortv` command: mounts the `command.py` of each tool's folder. Needs the `cli` extra."""

import os
import sys
from typing import Annotated


try:
    import typer
except ImportError as error:
    raise SystemExit(f"the shortv command needs the extra: pip install '.[cli]' in its checkout ({error})") from error

from . import __version__
from .benchmark.command import bench
from .chat.command import chat
from .command_line.errors import one_line
from .evaluate.command import answer, evaluate, score
from .flops.command import flops
from .hub.command import build_repo, check_repo, publish
from .layer_contribution.command import lc, vtw_k
from .pictures.command import visualize
from .search.command import search
from .serving.command import SERVE_SETTINGS, serve
from .web.command import demo


app = typer.Typer(no_args_is_help=True, add_completion=False, help="ShortV for Hugging Face vision-language models.")
for command in (
    chat,
    demo,
    flops,
    bench,
    lc,
    search,
    visualize,
    vtw_k,
    answer,
    score,
    build_repo,
    check_repo,
    publish,
):
    app.command()(command)
app.command("eval")(evaluate)
app.command(context_settings=SERVE_SETTINGS)(serve)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def shortv(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """ShortV for Hugging Face vision-language models."""


def main() -> None:
    """Entry point: errors, those of the command line too, are one line, without a traceback unless SHORTV_TRACEBACK is
    set."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if os.environ.get("SHORTV_TRACEBACK"):
            raise
        name = type(error).__name__  # of click's classes, which newer versions of typer keep for themselves
        if name == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]  # its class is told by its name
            raise SystemExit(2) from None
        if hasattr(error, "format_message"):
            raise SystemExit(f"shortv: {' '.join(error.format_message().split())}") from None
        raise SystemExit(one_line(error)) from None
    if code == 130:  # typer's for Ctrl-C
        print("shortv: interrupted", file=sys.stderr)
    raise SystemExit(code or 0)


if __name__ == "__main__":
    main()
