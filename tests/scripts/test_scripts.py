"""Every script says what it does, and does nothing else, when it is asked for help."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(map(str, (ROOT / "scripts").glob("*.py")))
RUN = """
import contextlib, io, json, runpy, sys
said = {}
for script in sys.argv[1:]:
    sys.argv, output = [script, "--help"], io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    said[script] = output.getvalue()
print(json.dumps(said))
"""


@pytest.mark.once
def test_help():
    """In one process, since each would import the same for seconds."""
    folder = ROOT / "scripts"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    environment["SHORTV_ON_VLLM"] = "1"  # else those of vLLM would begin anew, in the environment that it needs
    command = [sys.executable, "-c", RUN, *SCRIPTS]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert sorted(said) == SCRIPTS and len(SCRIPTS) > 5
    for script, text in said.items():
        assert text.startswith("usage: ") and "| " not in text, script  # no table of results
