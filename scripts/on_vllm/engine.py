"""One engine of vLLM in a process of its own, all prompts four times: `python -m on_vllm.engine JOB.json RESULT.json`.

With log probabilities of the whole prompt; twice without, the second time with what the first left in the cache; and
staggered, each request arriving while others decode.
"""

import json
import os
import sys
import types
from pathlib import Path


def use_v2_runner() -> None:
    """vLLM's second model runner on a CPU: its kernels in Triton's interpreter."""
    os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
    import torch
    import triton.backends

    class Driver:
        is_active = staticmethod(lambda: True)

        def get_current_device(self):
            return 0

        def get_current_target(self):
            return types.SimpleNamespace(backend="cpu", arch="x86", warp_size=1)

        def get_device_interface(self):
            return torch.cpu

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_current_stream(self, *args):
            return 0

    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)


def request(text: str, pictures: list) -> dict:
    """A prompt as vLLM takes it."""
    return {"prompt": text, **({"multi_modal_data": {"image": pictures}} if pictures else {})}


def result(output, case: str, way: str) -> dict:
    """What is compared of an answer."""
    ids = list(output.prompt_token_ids)
    log_probabilities = None
    if output.prompt_logprobs:
        log_probabilities = [each[i].logprob for each, i in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
    return {
        "case": case,
        "way": way,
        "prompt": ids,
        "new": list(output.outputs[0].token_ids),
        "logprobs": log_probabilities,
        "cached": output.num_cached_tokens,
    }


def run(job: dict) -> list[dict]:
    """Answers of the engine of `job["options"]`."""
    from vllm import LLM, SamplingParams

    from .cases import NEW_TOKENS, batches, prompts

    llm = LLM(job["model"], **job["options"])
    greedy = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    results = []
    for way, parameters in (
        ("log probabilities", SamplingParams(prompt_logprobs=0, **greedy)),
        ("first", SamplingParams(**greedy)),
        ("cached", SamplingParams(**greedy)),
    ):
        for batch in batches(job["placeholder"]):
            outputs = llm.generate([request(*each[1:]) for each in batch], parameters, use_tqdm=False)
            results += [result(output, each[0], way) for output, each in zip(outputs, batch, strict=True)]
    if hasattr(llm.llm_engine, "step"):
        llm.reset_prefix_cache()
        results += staggered(llm.llm_engine, prompts(job["placeholder"]), SamplingParams(**greedy))
    return results


def staggered(engine, waiting: list, parameters) -> list[dict]:
    """A request arrives every third step."""
    cases, done, steps = [each[0] for each in waiting], {}, 0
    waiting = list(enumerate(waiting))
    while waiting or engine.has_unfinished_requests():
        if waiting and steps % 3 == 0:
            i, (_, text, pictures) = waiting.pop(0)
            engine.add_request(str(i), request(text, pictures), parameters)
        for output in engine.step():
            if output.finished:
                done[int(output.request_id.split("-")[0])] = output
        steps += 1
    return [result(done[i], case, "staggered") for i, case in enumerate(cases)]


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    if job.get("v2"):
        use_v2_runner()
    Path(sys.argv[2]).write_text(json.dumps(run(job)))
