"""Every script says what it does, and does nothing else, when it is asked for help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.once
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("script", sorted(file.name for file in (ROOT / "scripts").glob("*.py")))
def test_help(script):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / script), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert result.returncode == 0 and result.stdout.startswith("usage: "), result.stderr
    assert "| " not in result.stdout  # no table of results
