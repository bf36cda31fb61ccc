"""Checking a ShortV repo before it is trusted: what its files say, and whether a stranger's process can load it.

Files are compared first. Code that is not the installed package's is never run.
"""

import ast
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from transformers import PretrainedConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from .. import __version__
from ..configuration_shortv import frozen_text
from ..modeling_shortv import MODELS
from . import eval_results
from .build import code_files, find_code
from .names import is_commit, is_hub_id
from .provenance import FILES, load_provenance


ALLOWED_IMPORTS = {"torch", "transformers"}
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass
class Check:
    """One line of the verdict.

    Attributes:
        name: what was looked at.
        problem: what is wrong with it; `None` if nothing is.
        note: what was found.
    """

    name: str
    problem: str | None = None
    note: str = ""

    def __str__(self):
        return f"{'FAIL' if self.problem else 'ok':5}{self.name}: {self.problem or self.note}"


def imported_packages(files: list[Path]) -> set[str]:
    """Top-level packages that Python files import, without the standard library and their own siblings.

    Raises:
        ValueError: a relative import that Transformers would not copy (of a sub-package or from a parent).
    """
    names = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
                names.add(node.module.split(".")[0])
            elif isinstance(node, ast.ImportFrom) and (node.level > 1 or "." in (node.module or ".")):
                raise ValueError(f"{file.name} imports from {'.' * node.level}{node.module or ''}")
    return names - set(sys.stdlib_module_names)


def check_files(folder: str | Path, without_weights: bool = False) -> list[Check]:
    """Checks of a repo's files; runs nothing of it and needs no network.

    Args:
        folder: the repo.
        without_weights: `folder` is a partial copy; weight files that the repo may hold are not there.
    """
    folder = Path(folder)
    checks = []
    of_the_layers: list[tuple[str, Callable[[], str]]] = [
        (kind, partial(_check_provenance, folder, kind)) for kind in FILES if (folder / FILES[kind]).is_file()
    ]
    for name, check in (
        ("config", lambda: _check_config(folder)),
        ("base", lambda: _check_base(folder, without_weights)),
        ("code files", lambda: _check_code(folder)),
        ("imports", lambda: _check_imports(folder)),
        ("other code", lambda: _check_other_code(folder)),
        *of_the_layers,
        *([("evaluation", lambda: _check_scores(folder))] if (folder / eval_results.FILE).is_file() else []),
    ):
        try:
            checks.append(Check(name, note=check()))
        except Exception as error:  # configs can be malformed in ways that have kinds of their own
            checks.append(Check(name, problem=_first_line(error)))
    return checks


def check_repo(repo: str, revision: str | None = None, device: str = "cpu") -> list[Check]:
    """All checks of a repo, local or on the Hub: its files, the pinned commit, and a trial in a fresh process which
    cannot import this package: it loads config, processor, model and all weights, and answers two prompts.

    The trial is left out if the files are not in order.

    Raises:
        ValueError: the repo or its revision does not exist, or cannot be read with the present token.
    """
    if Path(repo).is_dir():
        folder, commit = Path(repo), None
    elif not is_hub_id(repo):
        raise ValueError(f"no such directory: {repo} (and repos on the Hub are named owner/name)")
    else:
        try:
            folder = Path(
                snapshot_download(repo, revision=revision, ignore_patterns=[f"*{suffix}" for suffix in WEIGHTS])
            )
        except RevisionNotFoundError:
            raise ValueError(f"{repo} has no revision {revision}") from None
        except RepositoryNotFoundError:
            raise ValueError(f"there is no repo {repo}, or the present token may not read it") from None
        except Exception as error:  # the HTTP libraries under huggingface_hub have kinds of their own
            raise ValueError(f"{repo} cannot be read: {_first_line(error)}") from None
        commit = folder.name
    checks = check_files(folder, without_weights=commit is not None)
    if any(check.problem for check in checks):
        return checks
    checks.append(_check_pinned_commit(folder))
    if checks[-1].problem:
        return checks
    return checks + _try(repo if commit else str(folder.resolve()), commit, device)


def _read_config(folder: Path) -> dict:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError("there is no config.json")
    return json.loads(file.read_text(encoding="utf-8"))


def _load_config(folder: Path) -> PretrainedConfig:
    model_type = _read_config(folder).get("model_type")
    for config_class in (model_class.config_class for model_class in MODELS):
        if model_type == config_class.model_type:
            return config_class.from_pretrained(folder)
    raise ValueError(f"model_type is {model_type!r}, which is not ShortV's")


def _check_config(folder: Path) -> str:
    raw, config = _read_config(folder), _load_config(folder)
    if raw.get("auto_map") != config.to_dict()["auto_map"]:
        raise ValueError("auto_map does not name ShortV's classes in this repo's own files")
    frozen = frozen_text(config.shortv_layers, config.get_text_config().num_hidden_layers)
    return f"{config.model_type}, {frozen} frozen: {config.shortv_layers}"


def _check_base(folder: Path, without_weights: bool) -> str:
    raw = _read_config(folder)
    base, revision = raw.get("base_model_name_or_path"), raw.get("base_model_revision")
    weights = [file.name for file in sorted(folder.rglob("*")) if file.suffix in WEIGHTS]
    pickles = [name for name in weights if not name.endswith(".safetensors")]
    if pickles:
        raise ValueError(f"the repo holds weights that are not safetensors: {', '.join(pickles)}")
    if base is not None and weights:
        raise ValueError(f"the repo references the weights of {base} and holds some itself: {', '.join(weights)}")
    if base is None:
        if not (without_weights or any(folder.glob("*.safetensors"))):
            raise ValueError("the repo references no base checkpoint, and holds no safetensors of its own")
        return "holds its own weights"
    if not is_hub_id(base):
        raise ValueError(
            f"the weights are those of {base}, which is not a repo on the Hub: nobody else can load them. Build the repo "
            "with --include-weights, or publish the checkpoint and build from there"
        )
    if not is_commit(revision):
        raise ValueError(f"the weights of {base} are not pinned to a commit: base_model_revision is {revision!r}")
    return f"weights of {base} at {revision}"


def _check_code(folder: Path) -> str:
    expected = {file.name: _sha256(file) for file in code_files()}
    found = {str(file.relative_to(folder)): _sha256(file) for file in sorted(folder.rglob("*.py"))}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is not ShortV's" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} differs from shortv_hf {__version__}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    if not found:
        raise ValueError(
            "there is no code: this is the config of a repo that has not been built (shortv build-repo; of a model with "
            "weights of its own, shortv lc --save-model)"
        )
    if "upstream.py" not in found:
        problems.append(
            "code from before shortv_hf 0.2.0, with which frozen layers lose keys and values on Transformers 5.24 and "
            "newer (wrong answers without an error): build the repo again"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return f"{len(found)} files, equal to those of shortv_hf {__version__}"


def _check_imports(folder: Path) -> str:
    found = imported_packages(sorted(folder.rglob("*.py")))
    if found - ALLOWED_IMPORTS:
        raise ValueError(f"code imports {', '.join(sorted(found - ALLOWED_IMPORTS))}")
    return "torch, transformers and the standard library"


def _check_other_code(folder: Path) -> str:
    """That no JSON file but `config.json` names code, which `trust_remote_code=True` would run, from here or elsewhere."""
    for file in sorted(folder.rglob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if file == folder / "config.json":
            content = {
                name: value for name, value in content.items() if name != "auto_map"
            }  # `_check_config` compares it
        if named := find_code(content):
            raise ValueError(f"{file.name} names code to run: {named}")
    return "no other file names code"


def _check_provenance(folder: Path, kind: str) -> str:
    """That the frozen layers are what the ranking or the search beside the config says."""
    origin = load_provenance(folder, kind)
    origin.check(_load_config(folder))
    return origin.summary


def _check_scores(folder: Path) -> str:
    """That the scores are of the repo as it is."""
    return f"{len(eval_results.check(folder, _load_config(folder)))} scores"


def _check_pinned_commit(folder: Path) -> Check:
    raw = _read_config(folder)
    base, revision = raw.get("base_model_name_or_path"), raw.get("base_model_revision")
    if base is None:
        return Check("pinned commit", note="not needed")
    try:
        found = extract_commit_hash(cached_file(base, "config.json", revision=revision), None)
    except OSError as error:
        return Check("pinned commit", problem=f"{base} at {revision} cannot be read: {_first_line(error)}")
    if found != revision:
        return Check("pinned commit", problem=f"{base} gives commit {found} for {revision}")
    return Check("pinned commit", note=f"{base} has it")


def _try(repo: str, commit: str | None, device: str) -> list[Check]:
    source = Path(__file__).with_name("trial.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        result = subprocess.run(
            [sys.executable, "-c", source, repo, commit or "", device],
            capture_output=True,
            text=True,
            cwd=directory,  # not the checkout
            env={**os.environ, "HF_MODULES_CACHE": directory},  # no code of earlier loads
        )
    try:
        found = json.loads(result.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = [line for line in result.stderr.splitlines() if line.strip()][-1:]
        return [Check("trial", problem=f"the process ended with code {result.returncode}: {''.join(last)}")]
    return [Check(**each) for each in found]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
