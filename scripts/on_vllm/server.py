"""vLLM's server in a process of its own, and clients that ask it as users do."""

import asyncio
import base64
import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from openai import AsyncOpenAI
from PIL import Image


@dataclass
class Server:
    """A running server."""

    model: str
    url: str

    def client(self) -> AsyncOpenAI:
        """A client that tries once."""
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=600)

    def metric(self, name: str) -> float:
        """A gauge or counter of vLLM's, summed over its labels."""
        lines = urlopen(f"{self.url}/metrics").read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}{{"))


@contextmanager
def serving(repo: Path, log: Path, *options: str) -> Iterator[Server]:
    """vLLM's server for `repo` on a free port of this machine: a ShortV repo by `shortv serve`, any other by vLLM itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["shortv_hf.cli", "serve", str(repo), "--engine", "vllm"]
    if repo.name != "shortv":
        command = ["vllm.entrypoints.openai.api_server", "--model", str(repo)]
    command = [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port), *options]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while True:
                try:
                    urlopen(f"{url}/health").close()
                    break
                except OSError:
                    if process.poll() is not None:
                        raise SystemExit(f"{' '.join(command)} ended:\n{log.read_text()[-4000:]}") from None
                    time.sleep(1)
            yield Server(str(repo), url)
        finally:
            process.terminate()
            process.wait(timeout=60)


@dataclass
class Reply:
    """An answer as it came.

    Attributes:
        first: seconds to the first token.
        total: seconds to the last.
        tokens: how many came.
        cancelled: the client went away after the first.
    """

    text: str
    first: float
    total: float
    tokens: int
    cancelled: bool = False


async def ask(
    client: AsyncOpenAI, server: Server, image: Image.Image, question: str, max_tokens: int, cancel: bool = False
) -> Reply:
    """Ask about a picture, streamed, decoded greedily for exactly `max_tokens`; `cancel` closes the stream at the first token."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    start, first, text, tokens = time.perf_counter(), 0.0, "", 0
    stream = await client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": content}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async with stream:
        async for chunk in stream:
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
            if not chunk.choices:
                continue
            first = first or time.perf_counter() - start
            text += chunk.choices[0].delta.content or ""
            if cancel:
                return Reply(text, first, first, 0, cancelled=True)
    return Reply(text, first, time.perf_counter() - start, tokens)


async def in_parallel(jobs: list, concurrency: int) -> list:
    """Results of coroutine functions in their order, `concurrency` at a time."""
    gate = asyncio.Semaphore(concurrency)

    async def one(job):
        async with gate:
            return await job()

    return await asyncio.gather(*map(one, jobs))
