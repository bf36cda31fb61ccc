"""Run Transformers' own common model tests on ShortV, and report every test that a stock model passes and ShortV does not.

    python scripts/run_common_tests.py [--sdist transformers-X.Y.Z.tar.gz]

The tests come from the source distribution of the installed Transformers version, which pip downloads unless `--sdist`
names it. Exit code 1 if there is such a test. Needs the `test` extra and `parameterized`.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import transformers


ROOT = Path(__file__).parent.parent
# The source distribution lacks the sub-packages of the tests; what the common tests import of them, empty.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
}


def fetch_sdist(folder: Path) -> Path:
    requirement = f"transformers=={transformers.__version__}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary=transformers",
        "-d",
        str(folder),
    ]
    subprocess.run([*command, requirement], check=True)
    return next(folder.glob("transformers-*.tar.gz"))


def unpack_tests(sdist: Path, folder: Path):
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            parts = Path(member.name).parts
            if len(parts) == 3 and parts[1] == "tests" and member.isfile():
                target = folder / "tests" / parts[2]
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
    for name, text in STUBS.items():
        stub = folder / "tests" / name
        if not stub.exists():
            stub.parent.mkdir(exist_ok=True)
            (stub.parent / "__init__.py").touch()
            stub.write_text(text)
    (folder / "tests" / "__init__.py").touch()


def outcomes(report: Path) -> dict[str, dict[str, str]]:
    """class → test → passed, failed or skipped."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found.setdefault((case.get("classname") or "").split(".")[-1], {})[case.get("name")] = outcome
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, help="source distribution of the installed version")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        unpack_tests(arguments.sdist or fetch_sdist(folder), folder)
        module = folder / "test_common_models.py"
        module.write_text((ROOT / "tests" / "upstream" / "common_model_tests.py").read_text())
        report = folder / "report.xml"
        path = os.pathsep.join(filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
        command += ["-o", "addopts=", f"--rootdir={folder}", f"--junitxml={report}", str(module)]
        log = folder / "log.txt"
        with open(log, "w") as output:
            subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        if not report.exists():
            print(log.read_text())
            return 1
        found = outcomes(report)
        if "TestStock" not in found:  # nothing could be collected
            print(log.read_text())
            return 1
    worse, not_run = [], []
    print(f"transformers {transformers.__version__}: common model tests, {len(found['TestStock'])} per class")
    for name, tests in sorted(found.items()):
        stock = found[name.replace("ShortV", "Stock").removesuffix("Dense")]
        counts = {outcome: list(tests.values()).count(outcome) for outcome in ("passed", "failed", "skipped")}
        print(f"{name}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
        passed = [test for test in stock if stock[test] == "passed"]
        worse += [f"{name}::{test}" for test in passed if tests[test] == "failed"]
        not_run += [f"{name}::{test}" for test in passed if tests[test] == "skipped"]
    if not_run:
        print("run on the stock model only (the tests choose by upstream's own class names):", *not_run, sep="\n  ")
    if worse:
        print("passed by the stock model, failed by ShortV:", *worse, sep="\n  ")
    else:
        print("ShortV fails no test that the stock models pass")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
