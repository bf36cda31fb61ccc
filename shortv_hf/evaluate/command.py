"""`shortv eval`, `shortv answer`, `shortv score`: they read options and print; the files beside this one do the work."""

import shlex
import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..command_line.options import (
    DefaultModel,
    Device,
    Dtype,
    IncludePath,
    Layers,
    ModelOption,
    Reduction,
    choose_model,
    load_config,
    parse_layers,
    parse_reduction,
    split_names,
)


if TYPE_CHECKING:
    from .llava_scores import PopeScore

FormatName = Literal["pope", "gqa", "textvqa", "sqa", "mmbench", "mmbench-cn", "seed", "mm-vet", "vqav2"]
Scored = Literal["pope", "gqa"]


def evaluate(
    model: DefaultModel = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="Benchmarks of a paper: shortv, vtc-cls, illava-image, illava-video; or shapes, the demonstration model's. "
            "May be given several times.",
            show_default="for the demonstration model, shapes",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks of lmms-eval's, separated by commas; may be given several times.", show_default=False
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Beside the dense model: model, as its config sets it; shortv, its frozen layers alone; token reductions, "
            "e.g. fastv,random; shortv+fastv and the like for both. One with options is an entry of its own: "
            "--methods fastv:k=2,ratio=0.5.",
            show_default="model",
        ),
    ] = None,
    layers: Layers = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first questions of each task only.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 8,
    system_prompt: Annotated[
        str | None,
        typer.Option(
            help="Put before each question, by models whose template has a place for it.", show_default="none"
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, of tasks that do not say.")] = 1024,
    max_frames: Annotated[int, typer.Option(min=1, help="The most frames of a video.")] = 32,
    fps: Annotated[
        float | None, typer.Option(help="Frames of a video a second, where they are not too many.", show_default=False)
    ] = None,
    include_path: IncludePath = None,
    available: Annotated[
        bool, typer.Option("--available", help="Leave out the tasks that cannot be scored here.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the report and what it is made from; a run that broke off goes on there.",
            show_default="eval-MODEL",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew.")] = False,
    save_results: Annotated[
        bool,
        typer.Option(
            "--save-results", help="Write the scores into MODEL, the directory of a ShortV repo, and its card."
        ),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    model_option: ModelOption = None,
):
    """Score a model on lmms-eval's tasks: dense and with methods in one run, with what each costs.

    shortv eval MODEL --suite shortv --methods shortv,fastv,shortv+fastv

    Several GPUs: python -m torch.distributed.run --nproc-per-node 8
    -m shortv_hf.cli eval ... Needs lmms-eval (the `eval` extra).

    The table has, of each method, score, counted FLOPs, length of the cache
    and time to first token beside those of the dense model, and differences
    question by question with their standard error.
    """
    from ..hub import eval_results
    from ..hub.loading import demo_model
    from .report import markdown
    from .run import EvaluationOptions, methods_of, rank
    from .run import evaluate as run
    from .tasks import check_lmms_eval

    check_lmms_eval()
    from loguru import logger

    model = choose_model(model, model_option)
    suites = split_names(suite) or (() if tasks or model != demo_model() else ("shapes",))
    config = None
    if save_results:
        if not Path(model).is_dir():
            raise ValueError(f"--save-results writes into a directory, and {model} is none")
        if limit is not None:
            raise ValueError("--save-results is for scores of whole tasks; leave --limit out")
        config = load_config(model)
    logger.remove()  # lmms-eval's
    logger.add(sys.stderr, level="WARNING")
    options = EvaluationOptions(
        model=model,
        suites=suites,
        tasks=split_names(tasks) or (),
        methods=split_names(methods) or ("model",),
        layers=None if layers is None else tuple(parse_layers(layers)),
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        system_prompt=system_prompt,
        max_new_tokens=max_new_tokens,
        max_frames=max_frames,
        fps=fps,
        include_path=include_path,
        available=available,
        output=output or Path(f"eval-{Path(model).resolve().name}"),
        overwrite=overwrite,
    )
    if config is not None:
        chosen = methods_of(config, options.methods, options.layers)
        eval_results.method_of(config, {each.name: each.settings for each in chosen})  # an error before the run
    made_by = shlex.join(["shortv", *sys.argv[1:]])
    report = run(options, lambda message: print(message, file=sys.stderr), made_by)
    if rank() != 0:
        return
    print(markdown(report))
    written = [name for name in ("report.md", "report.png", "report.json") if (options.output / name).is_file()]
    print(f"\n{options.output}: {', '.join(written)}, and the answers")
    if config is not None:
        entries = eval_results.entries_of(report, model, config, date.today().isoformat())
        if entries:
            eval_results.write(model, entries)
        print(f"{model}: {f'{eval_results.FILE}, README.md' if entries else 'nothing to save'}")
    if report["failed"]:
        raise typer.Exit(1)


def answer(
    format: Annotated[FormatName, typer.Option(help="Of the questions, one of those that LLaVA's scripts read.")],
    questions: Annotated[Path, typer.Option(help="LLaVA's question file.")],
    answers: Annotated[
        Path,
        typer.Option(help="Answers file, a line per question; one that the same command began is continued."),
    ],
    model: DefaultModel = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures; MMBench's tables hold theirs.")] = None,
    upload: Annotated[
        Path | None,
        typer.Option(help="Also write what servers score: gqa, mm-vet, vqav2 .json; mmbench .xlsx; seed .jsonl."),
    ] = None,
    upload_questions: Annotated[
        Path | None,
        typer.Option(
            help="vqav2: all questions that the upload has to name; those that were not asked get an empty answer.",
            show_default="--questions",
        ),
    ] = None,
    num_chunks: Annotated[int, typer.Option(min=1, help="Parts that several processes answer.")] = 1,
    chunk_idx: Annotated[int, typer.Option(min=0, help="Which of them this process answers, from 0.")] = 0,
    layers: Layers = None,
    reduction: Reduction = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time; LLaVA's scripts ask 1.")] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer.", show_default="LLaVA's for the format, 128 or 1024")
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="Before every question, where the model's chat template prints one.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Ask all anew, and replace what is there.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    model_option: ModelOption = None,
):
    """Answer a benchmark's questions, and write the answers file that LLaVA's own scorers read."""
    from transformers.utils import logging

    from ..configuration_shortv import validate_settings
    from ..data.outputs import versions
    from ..data.prompts import check_system_prompt
    from ..hub.loading import load, load_processor
    from ..layer_contribution.trace import layer_of
    from .answering import AnswersFile, asker, chunk
    from .llava_formats import FORMATS, read_questions
    from .llava_uploads import check_upload, check_upload_questions, write_upload

    model = choose_model(model, model_option)
    config = load_config(model)
    if layers is not None:
        config.shortv_layers = parse_layers(layers)
    if reduction is not None:
        config.visual_reduction = parse_reduction(reduction, config)["visual_reduction"]
    validate_settings(config)
    asked = chunk(read_questions(format, questions, images), num_chunks, chunk_idx)
    if upload is not None and num_chunks > 1:
        raise ValueError("--upload needs all answers: join the chunks' files, then pass the joined one as --answers")
    if upload_questions is not None and upload is None:
        raise ValueError("--upload-questions needs --upload")
    if upload is not None:
        check_upload(format, upload, overwrite)
    if upload_questions is not None:
        check_upload_questions(format, upload_questions, asked)
    longest = max_new_tokens or FORMATS[format].max_new_tokens
    settings = {
        "format": format,
        "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "shortv_layers": sorted(config.shortv_layers, key=lambda entry: (layer_of(entry), str(entry))),
        "visual_reduction": config.visual_reduction,
        "dtype": dtype,
        "max_new_tokens": longest,
        "system_prompt": system_prompt,
        "chunk": f"{chunk_idx} of {num_chunks}",
        "versions": versions(),
    }
    file = AnswersFile(answers, asked, settings, overwrite)
    if file.answers:
        print(f"{answers}: {len(file.answers)} answers are there, {len(file.rest)} questions are left")
    if file.rest:
        if system_prompt is not None:
            check_system_prompt(system_prompt, load_processor(model, config))

        loaded, processor = load(model, config.shortv_layers, device, dtype, visual_reduction=config.visual_reduction)
        ask = asker(loaded, processor, longest, system_prompt)
        file.write(ask, batch_size, Path(model).resolve().name, lambda starts: logging.tqdm(starts, desc=format))
    else:
        file.begin()
    print(f"{answers}: {len(file.answers)} answers")
    if upload is not None:
        write_upload(format, file.answers, upload_questions or questions, upload)
        print(f"{upload}: the upload file")


def score(
    format: Annotated[Scored, typer.Option(help="Whose rule; LLaVA's own scripts score the other formats.")],
    answers: Annotated[Path, typer.Option(help="Answers file; those of several chunks joined in order.")],
    labels: Annotated[
        Path,
        typer.Option(
            help="pope: the folder with coco_pope_CATEGORY.json; gqa: the questions with their answers, such as "
            "testdev_balanced_questions.json."
        ),
    ],
    questions: Annotated[
        Path | None, typer.Option(help="pope: the question file, which knows the categories.")
    ] = None,
):
    """Score an answers file of POPE or GQA by the published rules, as LLaVA does."""
    from .llava_scores import score_gqa, score_pope

    if format == "gqa":
        if questions is not None:
            raise ValueError("gqa's --labels hold its questions; leave --questions out")
        right, total = score_gqa(answers, labels)
        print(f"{right / total:.2%} of {total} answers are right (exact match)")
        return
    if questions is None:
        raise ValueError("pope needs --questions, which knows the category of each")
    _print_pope(score_pope(answers, questions, labels))


def _print_pope(scores: dict[str, "PopeScore"]):
    from rich.console import Console
    from rich.table import Table

    columns = {
        "accuracy": "accuracy",
        "precision": "precision",
        "recall": "recall",
        "F1": "f1",
        "yes ratio": "yes_ratio",
    }
    table = Table("category", "questions", *columns)
    undefined = []
    for category, found in scores.items():
        values = [getattr(found, name) for name in columns.values()]
        undefined += [f"{name} of {category}" for name, value in zip(columns, values, strict=True) if value is None]
        table.add_row(category, str(found.total), *("undefined" if v is None else f"{v:.2%}" for v in values))
    Console().print(table)
    if undefined:
        print(f"undefined, because they divide by zero: {', '.join(undefined)}")
