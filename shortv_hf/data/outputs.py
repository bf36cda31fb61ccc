"""Where commands write, and what they may replace. One rule for all of them:

A command writes into a folder that is new, empty (hidden files do not count) or its own, and to files that are not there
yet; anything else it refuses before it starts, unless `--overwrite` is given. Its own is what it recorded with a hash and
nobody has changed since: a repo that is built again is replaced, and what it no longer needs is removed. Whatever else
lies in a folder stays as it is. Results (rankings, reports, pictures) are not recorded: to replace one is to ask for it.

An output folder is made, with its parents; the folder of an output file has to exist. Both are tried by really writing.
Files appear whole or not at all.
"""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import __version__


RECORD = ".shortv_files.json"  # of a repo; hidden, so it is not published


def check_files(*files: str | Path, overwrite: bool = False):
    """Raises `ValueError` unless all `files` can be written: in folders that exist, and new or to be overwritten."""
    paths = [Path(file) for file in files]
    for file in paths:
        if file.is_dir():
            raise ValueError(f"{file} is a folder; name a file")
        if not file.parent.is_dir():
            raise ValueError(f"{file} cannot be written: there is no folder {file.parent}")
    taken = [str(file) for file in paths if file.exists()]
    if taken and not overwrite:
        raise ValueError(f"already there: {', '.join(taken)}; name another file, or pass --overwrite to replace it")
    for file in paths:
        _try_writing(Path(os.path.realpath(file)).parent, file)


def check_folder(folder: str | Path, overwrite: bool = False, own: bool = False):
    """Raises `ValueError` unless `folder` can be written: new, empty, the command's `own` or to be overwritten. Leaves
    nothing behind, not even the folder."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    if folder.is_dir() and not (own or overwrite) and any(not each.name.startswith(".") for each in folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty; name another folder, or pass --overwrite to replace files of the same names in it"
        )
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try_writing(folder, folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from None
    finally:
        for each in new:
            with suppress(OSError):
                each.rmdir()


def _try_writing(folder: Path, output: Path):
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error.strerror}") from None


@contextmanager
def whole_file(file: str | Path) -> Iterator[Path]:
    """The path of a file to write, beside `file` and with its suffix; it takes the place of `file` when the block ends,
    and goes if the block fails. Devices and pipes are written directly."""
    if os.path.exists(file) and not os.path.isfile(file):
        yield Path(file)
        return
    file = Path(os.path.realpath(file))
    temporary = file.with_name(f".{os.getpid()}-{file.name}")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: str | Path, text: str):
    """Write `text` in UTF-8, whole or not at all."""
    with whole_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def rewrite_text(file: Path, text: str):
    """[`write_text`] over a file. What was recorded and unchanged stays so: the command that wrote it may do so again."""
    was_own = file.name in unchanged_files(file.parent)
    write_text(file, text)
    if was_own:
        record = {**read_record(file.parent), file.name: _sha256(file)}
        write_text(file.parent / RECORD, json.dumps({"files": dict(sorted(record.items()))}, indent=1) + "\n")


def read_record(folder: str | Path) -> dict[str, str]:
    """Name to SHA-256 of the files that were recorded in `folder`; empty without a readable record."""
    try:
        return dict(json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def unchanged_files(folder: str | Path) -> set[str]:
    """Names of the files in `folder` that are as they were recorded."""
    record = read_record(folder)
    if not record:
        return set()
    return {
        file.name
        for file in Path(folder).iterdir()
        if file.name in record and file.is_file() and _sha256(file) == record[file.name]
    }


def install(staged: Path, folder: Path, kept: Set[str] = frozenset(), unneeded: Set[str] = frozenset()):
    """Move the files of `staged`, on the same file system, into `folder`, remove `unneeded` ones, and record what is
    the command's own now: what was moved, and what of `kept` was recorded before."""
    before = read_record(folder)
    record = {name: before[name] for name in kept if name in before}
    record |= {file.name: _sha256(file) for file in staged.iterdir()}
    for file in list(staged.iterdir()):
        os.replace(file, folder / file.name)
    for name in unneeded:
        (folder / name).unlink()
    write_text(folder / RECORD, json.dumps({"files": dict(sorted(record.items()))}, indent=1) + "\n")


def versions() -> dict[str, str]:
    """What a result depends on: the versions of this package, Transformers, torch and Python."""
    import torch
    import transformers

    return {
        "shortv_hf": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
