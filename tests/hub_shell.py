"""The `shortv` command in one process with the environment of a local Hub.

`huggingface_hub` reads `HF_ENDPOINT` once, on import, so commands for a local Hub need a process of their own; one for
all of them spares the imports.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent
LOOP = """
import contextlib, io, json, os, sys
from shortv_hf import cli
for line in sys.stdin:
    arguments, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    sys.argv = ["shortv", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


def hub_environment(hub, home) -> dict[str, str]:
    """What sends `huggingface_hub` to `hub`, and keeps its files in `home`."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


class HubShell:
    """Use as a context manager."""

    def __init__(self, hub, home):
        self.home = Path(home)
        environment = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | hub_environment(hub, home)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, "-c", LOOP], cwd=ROOT, env=environment, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)

    def __call__(self, *arguments, token: str | None = None) -> tuple[int, str, str]:
        """Run `shortv ARGUMENTS`; (exit code, stdout, stderr)."""
        self._process.stdin.write(json.dumps([[str(argument) for argument in arguments], token]) + "\n")
        self._process.stdin.flush()
        return tuple(json.loads(self._process.stdout.readline()))
