"""lmms-eval's tasks by name, those of this package (`shapes`) and of a folder of the user's among them.

    _, tasks = load_tasks(["gqa"])  # by name

Needs lmms-eval (the `eval` extra).
"""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any


TASKS = Path(__file__).parent / "tasks"
OLD_OWNER, NEW_OWNERS = "lmms-lab", ("lmms-lab-encoder", "lmms-eval")  # pictures and videos since July 2026


def check_lmms_eval():
    """Raises `ValueError` if lmms-eval cannot be imported, or would fail for want of a module of `filelock` that it reaches
    into later, and that 4.3 has no more."""
    try:
        import filelock._api  # noqa: F401
        import lmms_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise ValueError(f"lmms-eval is needed: pip install '.[eval]' ({error})") from None


def task_manager(names: Sequence[str], include_path: str | Path | None = None) -> Any:
    """lmms-eval's index of tasks, its own 2,000 only where `names` are not all in this package or in `include_path`.

    Raises:
        ValueError: lmms-eval is missing, there is no such folder, or one of the names is unknown.
    """
    check_lmms_eval()
    from lmms_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include-path is {include_path}; there is no such folder")
    folders = [str(TASKS), *([] if include_path is None else [str(include_path)])]
    manager = TaskManager("ERROR", include_path=folders, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager("ERROR", include_path=folders)
    for name in names:
        if name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise ValueError(f"lmms-eval has no task {name!r}{hint}")
    return manager


def metrics_of(manager: Any, name: str) -> list[str]:
    """The names of a task's figures, of a group those of its first task."""
    from lmms_eval import utils

    entry = manager.task_index[name]
    if not isinstance(entry.get("yaml_path"), str):
        return []
    config = utils.load_yaml_config(entry["yaml_path"], mode="simple")
    if entry["type"] == "group":
        first = config["task"][0] if isinstance(config.get("task"), list) else None
        return metrics_of(manager, first) if isinstance(first, str) and first in manager.task_index else []
    return [str(each["metric"]) for each in config.get("metric_list") or ()]


def load_tasks(names: Sequence[str], include_path: str | Path | None = None) -> tuple[Any, dict[str, Any]]:
    """lmms-eval's index, and the tasks of these names with their data sets; of a group, those in it.

    Raises:
        ValueError: as [`task_manager`], or a task cannot be loaded: its data set cannot be read, or a package is missing.
    """
    manager = task_manager(names, include_path)
    from huggingface_hub.constants import HF_HOME
    from lmms_eval.tasks import get_task_dict

    os.environ.setdefault("HF_HOME", HF_HOME)  # some tasks of videos look for them there, and want it said

    found: dict[str, Any] = {}
    for name in names:
        try:
            with either_name_of_data_sets():
                found.update(_leaves(get_task_dict([name], manager, "chat")))
        except Exception as error:  # as many kinds as there are ways not to reach a server
            raise ValueError(f"task {name} cannot be loaded: {reason_of(error)}") from None
    return manager, found


def _leaves(tasks: dict) -> dict[str, Any]:
    """The tasks in nested groups by their names."""
    found: dict[str, Any] = {}
    for name, task in tasks.items():
        found.update(_leaves(task) if isinstance(task, dict) else {str(name): task})
    return found


def documents(task: Any) -> Any:
    """The questions of a task, those that it is scored on: a sequence of dicts."""
    return task.test_docs() if task.has_test_docs() else task.validation_docs()


def reason_of(error: BaseException) -> str:
    """One line; of an attempt that lmms-eval repeated, what went wrong in the last one."""
    attempt = getattr(error, "last_attempt", None)
    error = attempt.exception() if attempt is not None else error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def either_name_of_data_sets() -> Iterator[None]:
    """Inside, a data set that is not found under its name is looked for under the one it had before it moved, or has since:
    tasks name them as they were when lmms-eval was released, and a mirror or a cache as they were when it was made."""
    import datasets

    original = datasets.load_dataset

    @functools.wraps(original)
    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        first: Exception | None = None
        for name in (path, *other_names(path)):
            try:
                return original(name, *args, **kwargs)
            except (FileNotFoundError, ConnectionError) as error:  # not found; not there while offline
                first = first or error
        assert first is not None
        raise first

    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = original


def other_names(path: str) -> list[str]:
    """What else a data set of lmms-eval's may be called."""
    owner, _, name = str(path).partition("/")
    owners = NEW_OWNERS if owner == OLD_OWNER else (OLD_OWNER,) if owner in NEW_OWNERS else ()
    return [f"{each}/{name}" for each in owners]
