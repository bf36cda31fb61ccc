"""`shortv serve`: Transformers' server, asked by the real `openai` client."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
import transformers
from helpers import FAMILIES, make_model
from PIL import Image
from processor_files import write_processor
from test_base_weights import write_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor

from shortv_hf.hub import build_repo
from shortv_hf.serving.transformers_serve import serve


openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("typer")
ON_4 = transformers.__version__.startswith("4.")
COLORS = [(200, 30, 30), (20, 90, 220), (240, 240, 60), (5, 5, 5)]


def picture(color):
    image = Image.linear_gradient("L").resize((20, 14)).convert("RGB")
    return Image.blend(image, Image.new("RGB", image.size, color), 0.8)


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    base = write_processor(write_checkpoint(folder / "base", make_model(seed=3)))
    # the random model must not say <image>
    (base / "generation_config.json").write_text(json.dumps({"suppress_tokens": [98], "pad_token_id": 0}))
    config = FAMILIES["llava"][0].from_pretrained(base, shortv_layers=[3, 1])
    return build_repo(config, folder / "repo", processor_dir=base)


@pytest.fixture(scope="module")
def client(repo):
    with serving(repo) as client:
        yield client


@contextmanager
def serving(repo):
    """A client of `shortv serve REPO`, which runs inside."""
    if ON_4:
        pytest.skip("serving needs Transformers 5")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "shortv_hf.cli", "serve", str(repo), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32"]
    log = open(repo.parent / "log", "w+")
    server = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=log, stderr=subprocess.STDOUT, env=os.environ
    )
    try:
        for _ in range(600):
            try:
                urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                assert server.poll() is None, (repo.parent / "log").read_text()
                time.sleep(0.1)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.close()


def ask(client, repo, image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is this ?"}]
    messages = [{"role": "user", "content": content}]
    options = {"max_tokens": 6, "temperature": 0, **options}
    return client.chat.completions.create(model=str(repo), messages=messages, **options)


def expected(repo, images):
    """What `generate` answers."""
    model = AutoModelForImageTextToText.from_pretrained(repo, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(repo)
    content = [{"type": "image"}, {"type": "text", "text": "what is this ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    answers = []
    for image in images:
        inputs = processor(images=image, text=text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(new, skip_special_tokens=True))
    return answers


def test_answers_are_those_of_generate(client, repo):
    """Streamed or not; requests at the same time keep their own pictures."""
    images = [picture(color) for color in COLORS]
    answers = expected(repo, images)
    assert len(set(answers)) == len(answers)  # else a mix-up would go unnoticed
    reply = ask(client, repo, images[0])
    assert reply.choices[0].message.content == answers[0] and reply.choices[0].finish_reason == "length"

    chunks = [chunk.choices[0].delta.content for chunk in ask(client, repo, images[1], stream=True) if chunk.choices]
    chunks = [chunk for chunk in chunks if chunk]
    assert "".join(chunks) == answers[1] and len(chunks) > 1

    with ThreadPoolExecutor(len(images)) as pool:
        replies = list(pool.map(lambda image: ask(client, repo, image), images * 2))
    assert [reply.choices[0].message.content for reply in replies] == answers * 2
    log = (repo.parent / "log").read_text()
    assert "FutureWarning" not in log and "past_key_values" not in log, log


def test_only_the_named_model_is_served(client):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="org/another", messages=[{"role": "user", "content": "what ?"}])
    assert "org/another" in refusal.value.response.text


def test_refuses_other_models_before_it_starts(tmp_path):
    base = write_checkpoint(tmp_path / "base", make_model())
    with pytest.raises(
        ValueError, match="serving needs Transformers 5" if ON_4 else "model_type 'llava', which is not"
    ):
        serve(str(base))
