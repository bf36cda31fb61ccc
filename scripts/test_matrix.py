"""Run the core tests on several versions of Transformers and print a table.

    python scripts/test_matrix.py [VERSION ... | --installed] [--python PYTHON] [--folder FOLDER] [--output FILE.json]

Each version is installed into a folder of its own beside the others and goes before what the interpreter has; everything
else (torch, pytest, accelerate) is the interpreter's, which needs the `test` extra. `--python` names another interpreter,
for another Python or torch. Rows of earlier runs stay in the output, which is written after every version; `--overwrite`
begins it anew.
Exit code 1 if a test failed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from shortv_hf.data import outputs


ROOT = Path(__file__).parent.parent
VERSIONS = ("4.57.0", "4.57.6", "5.0.0", "5.5.4", "5.12.1", "5.19.0", "5.23.0", "5.24.0")
CORE = (
    "test_goldens", "test_reduction_goldens", "test_modeling_shortv", "test_generation", "test_visual_reduction",
    "test_base_weights", "test_remote_code", "test_upstream",
)  # fmt: skip
PROBE = "import json, platform, torch, transformers; print(json.dumps([transformers.__version__, torch.__version__, platform.python_version()]))"


def install(version: str, python: str, folder: Path) -> Path:
    """The folder that holds this version and what it needs."""
    target = folder / f"transformers-{version}-python{python_version(python)}"
    if not target.is_dir():
        command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", str(target)]
        subprocess.run([*command, f"transformers=={version}"], check=True)
    return target


def python_version(python: str) -> str:
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def run_core(python: str, target: Path | None) -> dict:
    """One row: versions as the tests saw them, and how many tests ended how."""
    path = os.pathsep.join(map(str, filter(None, (target, os.environ.get("PYTHONPATH")))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    probe = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=True, env=environment)
    row = dict(zip(("transformers", "torch", "python"), json.loads(probe.stdout), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = [f"tests/{name}.py" for name in CORE]
        command = [python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        start = time.perf_counter()
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        row["seconds"] = round(time.perf_counter() - start)
        print("\n".join(result.stdout.splitlines()[-1:]), flush=True)
        if not report.exists():
            return {**row, "passed": 0, "failed": 0, "skipped": 0, "error": (result.stdout + result.stderr)[-2000:]}
        suite = ElementTree.parse(report).getroot().find("testsuite").attrib
        failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    row |= {"passed": int(suite["tests"]) - failed - skipped, "failed": failed, "skipped": skipped}
    if failed:
        row["failures"] = re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    return row


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = [
        "| Transformers | torch | Python | passed | failed | skipped | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    names = ("transformers", "torch", "python", "passed", "failed", "skipped", "seconds")
    return "\n".join(lines + ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]) + "\n"


def earlier_rows(report: Path) -> list[dict]:
    """The rows of a report of this script; none if it is something else, or not there."""
    try:
        return json.loads(report.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", help=f"of Transformers (default: {', '.join(VERSIONS)})")
    parser.add_argument("--installed", action="store_true", help="the version that the interpreter has, and no other")
    parser.add_argument("--python", default=sys.executable, help="interpreter with the test extra (default: this one)")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-matrix", help="where versions are installed")
    parser.add_argument("--output", type=Path, help="JSON file; a Markdown table is written beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace the two files, whatever they hold")
    arguments = parser.parse_args()
    rows = earlier_rows(arguments.output) if arguments.output and not arguments.overwrite else []
    if arguments.output:
        try:
            overwrite = arguments.overwrite or bool(rows)
            outputs.check_files(arguments.output, arguments.output.with_suffix(".md"), overwrite=overwrite)
        except ValueError as error:
            parser.error(str(error))
    for version in [None] if arguments.installed else arguments.versions or VERSIONS:
        target = None if version is None else install(version, arguments.python, arguments.folder)
        row = run_core(arguments.python, target)
        key = ("transformers", "torch", "python")
        rows = [old for old in rows if any(old[name] != row[name] for name in key)] + [row]
        rows.sort(key=lambda row: [[int(part) for part in re.findall(r"\d+", row[name])] for name in key])
        print(table([row]).splitlines()[-1], *row.get("failures", ()), row.get("error", ""), sep="\n", flush=True)
        if arguments.output:
            outputs.write_text(arguments.output, json.dumps({"tests": CORE, "rows": rows}, indent=1) + "\n")
            outputs.write_text(arguments.output.with_suffix(".md"), table(rows))
    print(table(rows))
    return int(any(row["failed"] or "error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
