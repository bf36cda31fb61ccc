"""The benchmarks of the papers as lmms-eval's tasks: which figure of a task is the papers', and what it takes to score it.

Of a benchmark with several tasks, the one is named that is scored without a judge where there is one. Not the papers' runs
in everything: LLaVA's scripts and lmms-eval ask and score a little differently (the package's README says where).
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec


JUDGE, JAVA, UPLOAD = "judge", "Java", "upload"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        title: what papers call it.
        task: lmms-eval's, or a group of its tasks.
        metric: the task's figure that papers print; `None`: the first one that is a number.
        scale: by which it is printed.
        of: the most that it can be, printed.
        needs: `JUDGE`, `JAVA` or `UPLOAD`, if it is not scored here alone.
        equal: where the task does not say whether a question is answered right: names of what was answered and of what is
            right in what it says, which are then equal.
        alone: the same, for tasks that know by the way they score many; with a single one.
        mean: its figure is taken for the mean of the questions' own (OCRBench's adds up what it has scored before).
    """

    title: str
    task: str
    metric: str | None = None
    scale: float = 100.0
    of: float = 100.0
    needs: str | None = None
    equal: tuple[str, str] | None = None
    alone: bool = False
    mean: bool = False


MME = Benchmark("MME", "mme", "mme_perception_score", 1.0, 2000.0)  # perception alone, the papers' column
MMBENCH = Benchmark("MMBench EN", "mmbench_en_dev_static", "gpt_eval_score", 1.0, alone=True)
MMBENCH_CN = Benchmark("MMBench CN", "mmbench_cn_dev", "gpt_eval_score", 1.0, needs=JUDGE)
MMMU = Benchmark("MMMU (val)", "mmmu_val", "mmmu_acc", alone=True)
MMSTAR = Benchmark("MMStar", "mmstar", "average")
SEED = Benchmark("SEED-Bench (image)", "seedbench", "seed_image", equal=("pred", "answer"))
GQA = Benchmark("GQA", "gqa", "exact_match")
MMVET = Benchmark("MM-Vet", "mmvet", "gpt_eval_score", 1.0, needs=JUDGE)
SHAPES = Benchmark("shapes", "shapes", "exact_match")

SUITES: dict[str, tuple[Benchmark, ...]] = {
    # Tables 1 and 2 of the ShortV paper
    "shortv": (
        MME,
        MMBENCH,
        MMMU,
        MMSTAR,
        SEED,
        GQA,
        Benchmark("Flickr30k (CIDEr)", "flickr30k_test", "flickr_CIDEr", needs=JAVA),
        Benchmark("VQAv2 (val)", "vqav2_val", "exact_match"),
    ),
    # What VTC-CLS's scripts evaluate
    "vtc-cls": (
        GQA,
        Benchmark("ScienceQA (image)", "scienceqa_img", "exact_match"),
        Benchmark("TextVQA (val)", "textvqa_val", "exact_match"),
        Benchmark("POPE (F1)", "pope", "pope_f1_score"),
        MMBENCH,
        MMBENCH_CN,
        SEED,
        MMVET,
    ),
    # What iLLaVA's README and lmms-eval have in common, for LLaVA-OneVision and Qwen2-VL
    "illava-image": (
        MME,
        MMBENCH,
        MMMU,
        MMSTAR,
        MMVET,
        Benchmark("AI2D", "ai2d", "exact_match"),
        Benchmark("ChartQA", "chartqa", "relaxed_overall"),
        Benchmark("DocVQA (val)", "docvqa_val", "anls"),
        Benchmark("InfoVQA (val)", "infovqa_val", "anls"),
        Benchmark("OCRBench", "ocrbench", "ocrbench_accuracy", mean=True),
        Benchmark("RealWorldQA", "realworldqa", "exact_match"),
        Benchmark("MuirBench", "muirbench", "muirbench_score_overall", equal=("pred", "answer")),
    ),
    "illava-video": (
        Benchmark("VideoMME", "videomme", "videomme_perception_score", 1.0, equal=("pred_answer", "answer")),
        Benchmark("MVBench", "mvbench", "mvbench_accuracy", 1.0),
        Benchmark("EgoSchema (subset)", "egoschema_subset", "score", equal=("pred", "ground_truth")),
        Benchmark("NextQA (choice)", "nextqa_mc_test", "exact_match"),
        # Its figure is spelt so.
        Benchmark("MLVU (dev)", "mlvu_dev", "mlvu_percetion_score", 1.0, equal=("pred_answer", "answer")),
        Benchmark("LongVideoBench (val)", "longvideobench_val_v", "lvb_acc", alone=True),
        Benchmark("ActivityNet-QA", "activitynetqa", "gpt_eval_accuracy", 1.0, needs=JUDGE),
    ),
    "shapes": (SHAPES,),
}
KNOWN = {each.task: each for suite in SUITES.values() for each in suite}


def needs_of(metrics: Sequence[str]) -> str | None:
    """What a task needs that is not one of ours, by the names of its figures."""
    if metrics and all("submission" in each for each in metrics):
        return UPLOAD
    if any("gpt" in each.lower() or "judge" in each.lower() for each in metrics):
        return JUDGE
    return JAVA if any("CIDEr" in each or "METEOR" in each for each in metrics) else None


def choose_benchmarks(
    suites: Sequence[str], tasks: Sequence[str], metrics_of: Callable[[str], Sequence[str]] = lambda task: ()
) -> list[Benchmark]:
    """Those of the suites and of the tasks, each once.

    Args:
        metrics_of: the names of the figures of a task that is not one of ours.

    Raises:
        ValueError: for an unknown suite, or none of both.
    """
    chosen: list[Benchmark] = []
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"--suite is {suite!r}; the suites are {', '.join(SUITES)}")
        chosen += SUITES[suite]
    for task in tasks:
        chosen.append(KNOWN.get(task) or Benchmark(task, task, None, 1.0, 1.0, needs_of(metrics_of(task))))
    if not chosen:
        raise ValueError(f"name a --suite ({', '.join(SUITES)}) or --tasks of lmms-eval's")
    return list(dict.fromkeys(chosen))


def lacking(benchmark: Benchmark) -> str | None:
    """What this machine lacks to score it, or `None`."""
    if benchmark.needs == JUDGE and not os.environ.get("OPENAI_API_KEY"):
        return f"{benchmark.task} is scored by a judge, a model behind an OpenAI API: set OPENAI_API_KEY"
    if benchmark.needs == JAVA and shutil.which("java") is None:
        return f"{benchmark.task} (CIDEr) needs Java on the path"
    if benchmark.needs == JAVA and find_spec("pycocoevalcap") is None:
        return f"{benchmark.task} (CIDEr) needs the package pycocoevalcap"
    if benchmark.needs == UPLOAD:
        return f"{benchmark.task} is scored by its authors: lmms-eval alone (--tasks {benchmark.task}) writes what to upload"
    return None
