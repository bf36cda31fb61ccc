"""ShortV on vLLM's HTTP server, asked by the `openai` client: speed against stock vLLM, and many requests at once.

    python scripts/load_vllm.py [--device cpu|cuda] [--shape cpu-small] [--concurrency 1,2,4,8] [--rounds 5] [--requests 1]
    python scripts/load_vllm.py --soak 500

Needs what `check_vllm.py` needs. **Speed:** stock vLLM and ShortV serve the same architecture (a subject of `shortv bench`, with
weights that vLLM makes up), both servers up at once and asked in turn, so that ratios are of one run; `--requests` questions
per client and round, each about another picture. Time to the first token is a client's: picture, vision tower, queue and prefill.
**Soak:** so many requests to a random Qwen2-VL, whose images of random sizes become 1 to 64 tokens, a fifth of them
cancelled at the first token. Every answer must be this package's; exit code 1 if one is lost or another's.
On a GPU this has not been run: none was at hand.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from on_vllm import environment


environment.enter()


import torch  # noqa: E402
from on_vllm.models import make, make_shape  # noqa: E402
from on_vllm.server import Server, ask, in_parallel, serving  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402
from transformers.utils import logging  # noqa: E402


NEW_TOKENS = 8
QUESTION = "How many red objects are there? Is there a large blue circle left of the yellow square?"


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A picture that no other is like: coarse coloured noise."""
    rng = random.Random(seed)
    coarse = Image.new("RGB", (8, 8))
    coarse.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(64)])
    return coarse.resize((width, height), Image.Resampling.NEAREST)


async def timed(server: Server, concurrency: int, requests: int, seed: int) -> dict[str, float]:
    """Medians of a client, and the throughput of all."""
    async with server.client() as client:
        jobs = [
            partial(ask, client, server, picture(seed + i, 336, 336), QUESTION, NEW_TOKENS)
            for i in range(concurrency * requests)
        ]
        start = time.perf_counter()
        replies = await in_parallel(jobs, concurrency)
        seconds = time.perf_counter() - start
    assert all(reply.tokens == NEW_TOKENS for reply in replies)
    return {
        "first_token_s": statistics.median(reply.first for reply in replies),
        "per_token_s": statistics.median((reply.total - reply.first) / (NEW_TOKENS - 1) for reply in replies),
        "requests_per_s": len(replies) / seconds,
    }


def speed(args: argparse.Namespace) -> dict:
    """Stock and ShortV in turn, at each concurrency."""
    folder = make_shape(args.shape, args.work)
    options = ["--load-format", "dummy", "--max-model-len", "2048", "--limit-mm-per-prompt", '{"image": 1}']
    options += ["--dtype", "float32" if args.device == "cpu" else "bfloat16", *args.option]
    rows = []
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(serving(folder / name, args.work / f"{name}.log", *options))
            for name in ("stock", "shortv")
        }
        for server in servers.values():
            asyncio.run(timed(server, 1, 2, seed=-10))
        seed = 0
        for concurrency in args.concurrency:
            for i in range(args.rounds):
                row = {"concurrency": concurrency, "round": i}
                for name in list(servers)[:: 1 if i % 2 == 0 else -1]:
                    row[name] = asyncio.run(timed(servers[name], concurrency, args.requests, seed))
                seed += concurrency * args.requests
                rows.append(row)
                print(json.dumps(row), flush=True)
    ratios = [ratio(rows, concurrency) for concurrency in args.concurrency]
    return {"shape": args.shape, "device": args.device, "requests": args.requests, "rounds": rows, "ratios": ratios}


def ratio(rows: list[dict], concurrency: int) -> dict[str, float]:
    """Medians over the rounds of stock over ShortV, above 1 where ShortV is faster."""
    mine = [row for row in rows if row["concurrency"] == concurrency]
    found = {"concurrency": concurrency}
    for name in ("first_token_s", "per_token_s"):
        found[name] = statistics.median(row["stock"][name] / row["shortv"][name] for row in mine)
    found["requests_per_s"] = statistics.median(
        row["shortv"]["requests_per_s"] / row["stock"]["requests_per_s"] for row in mine
    )
    return found


@torch.no_grad()
def expected(repo: Path, images: list[Image.Image]) -> list[str]:
    """This package's answers."""
    logging.set_verbosity_error()  # of an end of text that no model says
    model = AutoModelForImageTextToText.from_pretrained(repo, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(repo)
    content = [{"type": "image"}, {"type": "text", "text": "what is this ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    answers = []
    for image in images:
        inputs = processor(images=image, text=text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
        answers.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def soak(args: argparse.Namespace) -> dict:
    """Many requests at once, some of them cancelled."""
    repo = make("Qwen2-VL", args.work) / "shortv"
    rng = random.Random(0)
    images = [picture(1000 + i, rng.randrange(16, 129), rng.randrange(16, 129)) for i in range(args.soak)]
    cancelled = [rng.random() < 0.2 for _ in images]
    answers = expected(repo, images)
    with serving(repo, args.work / "soak.log", "--dtype", "float32", *args.option) as server:

        async def all_at_once():
            async with server.client() as client:
                jobs = [
                    partial(ask, client, server, image, "what is this ?", NEW_TOKENS, cancel)
                    for image, cancel in zip(images, cancelled, strict=True)
                ]
                return await in_parallel(jobs, 16)

        start = time.perf_counter()
        replies = asyncio.run(all_at_once())
        seconds = time.perf_counter() - start
        for _ in range(30):
            running, waiting = server.metric("num_requests_running"), server.metric("num_requests_waiting")
            if running == waiting == 0:
                break
            time.sleep(1)
    whole = [(reply, answer) for reply, answer in zip(replies, answers, strict=True) if not reply.cancelled]
    return {
        "requests": len(replies),
        "cancelled": sum(reply.cancelled for reply in replies),
        "answered": len(whole),
        "equal": sum(reply.text.strip() == answer.strip() for reply, answer in whole),
        "different_answers": len(set(answers)),
        "left_running": running + waiting,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", default="cpu-small", help="a subject of `shortv bench`")
    parser.add_argument(
        "--concurrency", type=lambda text: [int(each) for each in text.split(",")], default=[1, 2, 4, 8]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1, help="per client and round")
    parser.add_argument("--soak", type=int, help="requests; instead of the speed")
    parser.add_argument("--option", action="append", default=[], help="of vLLM's server, once a word")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "check-vllm")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.soak is None:
        report = speed(args)
        for row in report["ratios"]:
            print(
                f"concurrency {row['concurrency']}: first token {row['first_token_s']:.2f}x, "
                f"per token {row['per_token_s']:.2f}x, requests per second {row['requests_per_s']:.2f}x"
            )
    else:
        report = soak(args)
        print(json.dumps(report))
    if args.output:
        report["threads"] = os.environ["OMP_NUM_THREADS"]
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    if args.soak is not None and (report["equal"] < report["answered"] or report["left_running"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
