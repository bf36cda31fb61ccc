"""Dense model and methods on lmms-eval's tasks in one run, with what they cost beside what they score.

[`evaluate`] is `shortv eval` without its printing.

    OUTPUT/settings.json      what was asked for; a run with other settings does not go on here
    OUTPUT/answers/           the answers as they came, a line a batch
    OUTPUT/parts/             a file for each task and method with its settings: scores and figures. Other tasks and methods
                              can be added later
    OUTPUT/submissions/       what tasks write for an upload
    OUTPUT/report.json, .md, .png
"""

import hashlib
import importlib.metadata
import inspect
import io
import json
import math
import os
import re
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ..benchmark.subjects import Method, Subject, choose_methods
from ..configuration_shortv import validate_shortv_layers
from ..data import outputs
from ..data.jsonl import read_json
from ..hub.loading import any_config, place
from . import report as reports
from .journal import Journal
from .suites import KNOWN, Benchmark, choose_benchmarks, lacking
from .tasks import check_lmms_eval, either_name_of_data_sets, load_tasks, metrics_of, reason_of, task_manager


DENSE = Method("dense", ())
AS_SET = "model"  # the method that is the model as its config sets it


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate, and how. In messages, an option has the name that it has on the command line.

    Attributes:
        model: Hub id or directory.
        suites, tasks: names of [`suites.SUITES`] and of lmms-eval's tasks.
        methods: beside the dense model: "model" for what the config sets; "shortv" for its frozen layers alone; a token
            reduction as text; or one after "shortv+".
        layers: frozen layers instead of the config's.
        limit: questions of each task, the first ones; `None`: all.
        batch_size, device, dtype, system_prompt, max_new_tokens, max_frames, fps: as `lmms_eval.ShortV` has them.
        include_path: a folder with further tasks.
        available: leave out the tasks that this machine cannot score, instead of refusing them.
        output: a folder; what an earlier run of the same settings left there is not done again.
        overwrite: forget what is there.
    """

    model: str
    suites: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    methods: tuple[str, ...] = (AS_SET,)
    layers: tuple[int | str, ...] | None = None
    limit: int | None = None
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"
    system_prompt: str | None = None
    max_new_tokens: int = 1024
    max_frames: int = 32
    fps: float | None = None
    include_path: Path | None = None
    available: bool = False
    output: Path = Path("eval")
    overwrite: bool = False


@dataclass
class Part:
    """One method on one task.

    Attributes:
        score: the task's figure, by its benchmark's scale; `metric` is its name in lmms-eval.
        questions: by the question, what the task gives for its answer, by 100; empty where it scores them only together.
        answers: by the question.
        figures: see `figures.py`.
        data_set: what the task reads.
    """

    task: str
    method: str
    metric: str
    score: float
    questions: dict[str, float]
    answers: dict[str, str]
    figures: dict[str, float]
    data_set: str


def methods_of(
    config: PretrainedConfig, names: Sequence[str], layers: Sequence[int | str] | None = None
) -> list[Method]:
    """The dense model and the methods of these names. `config`: the model's.

    Raises:
        ValueError: for a name that is none; "model" or "shortv" of a model that freezes no layer and reduces nothing.
    """
    frozen = list(getattr(config, "shortv_layers", []) if layers is None else layers)
    n_layers = config.get_text_config().num_hidden_layers
    validate_shortv_layers(frozen, n_layers)
    reduction = getattr(config, "visual_reduction", None)
    set_up = type(config).from_dict({**config.to_dict(), "shortv_layers": frozen})
    subject = Subject(set_up, swept=(), vtw_layer=n_layers // 2)
    found: list[Method] = [DENSE]
    for name in names:
        if name == AS_SET:
            if not frozen and reduction is None:
                raise ValueError("the model freezes no layer and reduces nothing: pass --layers, or --methods")
            title = f"ShortV N={len(frozen)}" if frozen else ""
            found.append(Method(" + ".join(filter(None, (title, _text_of(reduction)))), tuple(frozen), reduction))
            continue
        if name.startswith("shortv") and not frozen:
            raise ValueError(f"--methods {name}: the model freezes no layer; pass --layers")
        found += choose_methods(subject, [name], [len(frozen)])[1:]
    by_name: dict[str, Method] = {}
    for method in found:
        if by_name.setdefault(method.name, method) != method:
            raise ValueError(f"two methods would be called {method.name!r}; give one of them its options")
        type(config).from_dict({**config.to_dict(), **method.settings})  # an error now, not after the dense run
    return list(by_name.values())


def _text_of(reduction: dict | None) -> str:
    """A reduction as `--methods` has it."""
    if reduction is None:
        return ""
    options = ",".join(f"{name}={value}" for name, value in reduction.items() if name != "method")
    return f"{reduction['method']}:{options}" if options else reduction["method"]


def rank() -> int:
    """Of this process among those of `torch.distributed.run`."""
    return int(os.environ.get("RANK", 0))


def evaluate(options: EvaluationOptions, say: Callable[[str], None] = print, command: str | None = None) -> dict:
    """Evaluate, and write the folder `options.output`.

    Under `torch.distributed.run` (or `accelerate launch` on GPUs) the questions are shared out; rank 0 writes and returns.

    Args:
        say: called with a line about what is done.
        command: how the report says that it was made.

    Returns:
        The report, see `report.py`; of the other ranks `{}`. What failed is in it, under "failed".

    Raises:
        ValueError: for options that are not valid, tasks that are unknown or cannot be scored here, and settings that are
            not those of what the folder holds; before any weight is read.
    """
    check_lmms_eval()
    benchmarks, left_out = choose(options)
    config, _ = any_config(options.model)
    methods = methods_of(config, options.methods, options.layers)
    conditions = conditions_of(options, config, methods, benchmarks)
    _prepare(options, conditions)
    for reason in left_out:
        say(f"left out: {reason}")
    run = _Run(options)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        run.model.accelerator.wait_for_everyone()  # until rank 0 has cleared and made the folder
    parts: list[Part] = []
    failed: list[dict] = []
    for benchmark in benchmarks:
        for method in methods:
            file = options.output / "parts" / f"{_file_name(benchmark.task, method)}.json"
            if not file.exists():
                say(f"{benchmark.title}: {method.name}")
                try:
                    part = run.measure(benchmark, method)
                except Exception as error:  # the other tasks and methods are still worth having
                    if "RANK" in os.environ or isinstance(error, ImportError):  # others would wait for this rank
                        raise
                    failed.append({"task": benchmark.task, "method": method.name, "reason": reason_of(error)})
                    say(f"failed: {reason_of(error)}")
                    if run.loaded != benchmark:  # nor can it be loaded for the next method
                        break
                    continue
                if part is not None:
                    outputs.write_text(file, json.dumps(asdict(part), ensure_ascii=False) + "\n")
            if rank() == 0:
                parts.append(read_saved(file))
    if rank() != 0:
        return {}
    if command is not None:
        conditions = {"command": command, **conditions}
    report = reports.make(conditions, methods, benchmarks, parts, failed, left_out)
    reports.write(report, options.output)
    return report


def choose(options: EvaluationOptions) -> tuple[list[Benchmark], list[str]]:
    """The benchmarks that can be scored here, and why others are left out.

    Raises:
        ValueError: for options out of range; unknown tasks; benchmarks that cannot be scored, unless these are to be left out; none.
    """
    for name, value in (("limit", options.limit), ("batch-size", options.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; the least is 1")
    if options.fps is not None and options.fps <= 0:
        raise ValueError(f"--fps is {options.fps}; it must be more than 0")
    benchmarks = choose_benchmarks(options.suites, options.tasks)
    manager = task_manager([each.task for each in benchmarks], options.include_path)
    chosen = choose_benchmarks(options.suites, options.tasks, partial(metrics_of, manager))
    lacks = {each: reason for each in chosen if (reason := lacking(each)) is not None}
    if lacks and not options.available:
        raise ValueError(f"{'; '.join(lacks.values())}. --available leaves out what cannot be scored here")
    if len(lacks) == len(chosen):
        raise ValueError(f"nothing is left to evaluate: {'; '.join(lacks.values())}")
    return [each for each in chosen if each not in lacks], list(lacks.values())


def conditions_of(
    options: EvaluationOptions, config: PretrainedConfig, methods: Sequence[Method], benchmarks: Sequence[Benchmark]
) -> dict:
    """What a result depends on: settings, files, device, versions. No paths of this machine."""
    device, folder = place(options.device), Path(options.model)
    base = getattr(config, "base_model_name_or_path", None)
    if folder.is_dir():
        files = [file for file in folder.iterdir() if file.is_file() and file.suffix != ".md"]
    else:
        files = []
    if base is not None and Path(base).is_dir():
        files += [file for file in Path(base).iterdir() if file.is_file()]
    included = [] if options.include_path is None else sorted(Path(options.include_path).rglob("*.[yp][ay]*"))
    return {
        "model": folder.resolve().name if folder.is_dir() else options.model,
        "files": fingerprint(files, contents=False),
        "commit": getattr(config, "_commit_hash", None),
        "base": None if base is None or Path(base).is_dir() else [base, getattr(config, "base_model_revision", None)],
        "include_path": fingerprint([file for file in included if file.is_file()], contents=True),
        "tasks": [each.task for each in benchmarks],
        "methods": {each.name: each.settings for each in methods},
        "limit": options.limit,
        "batch_size": options.batch_size,
        "system_prompt": options.system_prompt,
        "max_new_tokens": options.max_new_tokens,
        "max_frames": options.max_frames,
        "fps": options.fps,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "lmms_eval": importlib.metadata.version("lmms_eval"),
        **outputs.versions(),
    }


def fingerprint(files: Iterable[Path], contents: bool) -> str | None:
    """A hash of the files' names and `contents`, or in place of these of their sizes and times; `None` of no files."""
    digest = hashlib.sha256()
    files = sorted(files)
    for file in files:
        stat = file.stat()
        digest.update(
            f"{file.name} {file.read_bytes().hex() if contents else (stat.st_size, stat.st_mtime_ns)}".encode()
        )
    return digest.hexdigest()[:16] if files else None


def read_saved(file: Path) -> Part:
    """The part in a file. Raises `ValueError` that names it if it holds none."""
    saved = read_json(file)
    try:
        return Part(**saved)  # type: ignore[arg-type]  # the next line says so
    except TypeError:
        raise ValueError(f"{file} holds no part of an evaluation; remove it") from None


def _prepare(options: EvaluationOptions, conditions: dict):
    """Makes the folder; other ranks leave it to the first. Raises `ValueError` if it holds anything but an earlier run of the
    same settings."""
    if rank() != 0:
        return
    file = options.output / "settings.json"
    wanted = json.loads(
        json.dumps({name: conditions[name] for name in conditions if name not in ("tasks", "methods")})
    )
    found: Any = read_json(file) if file.is_file() and not options.overwrite else None
    if found is None:
        outputs.check_folder(options.output, options.overwrite)
    elif found != wanted:
        other = [name for name in wanted if found.get(name) != wanted[name]]
        name = other[0] if other else "another setting"
        raise ValueError(
            f"{options.output} holds a run of other settings ({name}: {json.dumps(found.get(name))}, now "
            f"{json.dumps(wanted.get(name))}); name another --output, or pass --overwrite to begin anew"
        )
    for name in ("answers", "parts"):
        if options.overwrite:
            shutil.rmtree(options.output / name, ignore_errors=True)
        (options.output / name).mkdir(parents=True, exist_ok=True)
    outputs.write_text(file, json.dumps(wanted, indent=1) + "\n")


class _Run:
    """The model, loaded when it is first needed, and how one part is measured."""

    def __init__(self, options: EvaluationOptions):
        self.options = options
        self.loaded: Benchmark | None = None  # whose tasks are there

    @cached_property
    def model(self) -> Any:
        from .lmms_eval import ShortV

        options = self.options
        return ShortV(
            options.model,
            dtype=options.dtype,
            device=options.device,
            batch_size=options.batch_size,
            system_prompt=options.system_prompt,
            max_new_tokens=options.max_new_tokens,
            max_frames=options.max_frames,
            fps=options.fps,
        )

    def measure(self, benchmark: Benchmark, method: Method) -> Part | None:
        """Scores and figures; of other ranks than the first `None`."""
        from lmms_eval.evaluator import simple_evaluate

        options, model = self.options, self.model
        manager, tasks = self.tasks(benchmark)
        model.journal = Journal(options.output / "answers" / _file_name(benchmark.task, method), rank())
        with model.model.using(**method.settings), either_name_of_data_sets():
            found = simple_evaluate(
                model,
                tasks=list(tasks.values()),
                task_manager=manager,
                batch_size=options.batch_size,
                limit=options.limit,
                bootstrap_iters=0,  # the standard errors here are those of differences
                verbosity="ERROR",
                # What tasks ask for that write files for an upload; and pictures are not read again to score answers.
                cli_args=Namespace(output_path=str(options.output), process_with_media=False),
            )
        return None if found is None else read_part(benchmark, method.name, tasks, found, model.figures.summary())

    def tasks(self, benchmark: Benchmark) -> tuple[Any, dict[str, Any]]:
        """lmms-eval's index and the benchmark's tasks. Of ours, the last ones are kept for the next method; others are loaded
        anew, as what scores them may remember what it has scored."""
        if benchmark != self.loaded or benchmark.task not in KNOWN:
            self.index, self.found = load_tasks([benchmark.task], self.options.include_path)
            self.loaded = benchmark
        return self.index, self.found


def read_part(
    benchmark: Benchmark, method: str, tasks: dict[str, Any], found: dict, figures: dict[str, float]
) -> Part:
    """What lmms-eval found of a benchmark's tasks; of several, the mean.

    Raises:
        ValueError: there is no such figure in it.
    """
    metric = benchmark.metric or _first_metric(found["results"][next(iter(tasks))])
    questions: dict[str, float] = {}
    answers: dict[str, str] = {}
    for name, task in tasks.items():
        alone = _score_alone(task, metric, benchmark)
        for sample in found["samples"][name]:
            key = f"{name} {sample['doc_id']}" if len(tasks) > 1 else str(sample["doc_id"])
            if key in answers:  # by another filter: the first one's is the figure
                continue
            answers[key] = str(sample["filtered_resps"][0]) if sample["filtered_resps"] else ""
            if metric in sample and (value := alone(sample[metric])) is not None:
                questions[key] = value
    if benchmark.mean:
        score = sum(questions.values()) / max(1, len(questions))
    else:
        score = benchmark.scale * sum(_figure(found["results"][name], metric) for name in tasks) / len(tasks)
    return Part(
        task=benchmark.task,
        method=method,
        metric=metric,
        score=score,
        questions=questions,
        answers=answers,
        figures=figures,
        data_set=str(next(iter(tasks.values())).config.dataset_path),
    )


def _score_alone(task: Any, metric: str, benchmark: Benchmark) -> Callable[[Any], float | None]:
    """How a single question is scored, in points of 100: right or wrong, or what the task gives for it. `None` where only
    many have a score, or a judge's is of another scale."""

    def alone(value: Any) -> float | None:
        if benchmark.needs is not None:
            return None
        if benchmark.equal is not None:
            answer, right = (str(value[name]).strip().lower() for name in benchmark.equal)
            return 100.0 * (answer == right)
        if isinstance(value, dict):
            value = value.get("score", value)
        if isinstance(value, int | float):
            return 100.0 * value
        if not benchmark.alone:
            return None
        aggregate = task.aggregation()[metric]
        if "args" in inspect.signature(aggregate).parameters:  # it writes a file for an upload, too
            aggregate = partial(aggregate, args=Namespace(output_path=scratch.name))
        with redirect_stdout(io.StringIO()):
            score = aggregate([value])
        return benchmark.scale * score

    scratch = tempfile.TemporaryDirectory()
    return alone


def _first_metric(results: dict) -> str:
    for name, value in results.items():
        if isinstance(value, int | float) and "stderr" not in name and "," in name:
            return name.split(",")[0]
    raise ValueError(f"the task gives no figure, but {', '.join(map(str, results))}")


def _figure(results: dict, metric: str) -> float:
    """A task's figure, by lmms-eval's first filter."""
    for name, value in results.items():
        if name.split(",")[0] == metric and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    raise ValueError(f"the task gives no {metric}, but {', '.join(map(str, results))}")


def _file_name(task: str, method: Method) -> str:
    settings = hashlib.sha256(json.dumps(method.settings, sort_keys=True).encode()).hexdigest()[:8]
    return re.sub(r"[^\w.=,+-]+", "_", f"{task}--{method.name}--{settings}")
