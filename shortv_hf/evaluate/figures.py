"""What answering costs: time to the first token, output tokens per second, FLOPs, length of the KV cache, memory.

One definition of each, for the plug-in's table and for `shortv eval`:
    first_token_s        seconds from the call of `generate` to the first tokens of a batch: vision tower, prefill and all.
                         Median over the batches, since a busy machine makes some of them slow; `first_token_low_s` and
                         `first_token_high_s`: the quartiles
    decode_tokens_per_s  the later tokens of all requests of a batch by the seconds that they take together
    flops_ratio          counted FLOPs of the language model's prefill by those of the dense model (Eq. 5 of the ShortV
                         paper, whose t and v are here the real prompts'); `model_flops_ratio`: vision tower included
    kv_tokens            tokens a row whose keys a layer holds after the prefill, mean over the layers; `kv_ratio`: by the
                         dense model's
    memory_ratio         most bytes allocated at a time in a prefill, above the weights, by the dense model's
"""

import statistics
import time
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..flops.meters import profile_prefill


class Clock(BaseStreamer):
    """Notes when the prompt came in, and each token after it. For batches too."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


@dataclass
class Figures:
    """Sums over requests; those of several processes, or of several runs, are added up.

    Attributes:
        requests, tokens, seconds: answered, their output tokens, and the time in `generate`.
        first_token_s: of each batch (beam search has no such time).
        later_tokens, later_s: output tokens after the first, and the time of their batches.
        profiled: batches of which two prefills were counted, as the model is set and dense, and the sums of `flops` and
            so on over them.
        memory, dense_memory: bytes of the most expensive of them.
    """

    requests: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_token_s: list[float] = field(default_factory=list)
    later_tokens: int = 0
    later_s: float = 0.0
    profiled: int = 0
    profiled_rows: int = 0
    flops: int = 0
    dense_flops: int = 0
    language_model_flops: int = 0
    dense_language_model_flops: int = 0
    kv_tokens: float = 0.0
    dense_kv_tokens: float = 0.0
    memory: int = 0
    dense_memory: int = 0

    def __add__(self, other: "Figures") -> "Figures":
        sums = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)}
        for name in ("memory", "dense_memory"):
            sums[name] = max(getattr(self, name), getattr(other, name))
        return Figures(**sums)

    def add_answers(self, clock: Clock | None, start: float, end: float, lengths: list[int]):
        """A batch that `generate` answered between `start` and `end`, seconds of `time.perf_counter`, with so many tokens a
        row."""
        self.requests += len(lengths)
        self.tokens += sum(lengths)
        self.seconds += end - start
        if clock is not None and len(clock.times) > 1:
            self.first_token_s.append(clock.times[1] - start)
            self.later_tokens += sum(lengths) - len(lengths)
            self.later_s += end - clock.times[1]

    def add_profile(self, model: Any, inputs: dict):
        """Two prefills of a batch, counted while they run."""
        own = profile_prefill(model, inputs)
        if model.settings == ([], None):
            dense = own
        else:
            with model.using(shortv_layers=[], visual_reduction=None):
                dense = profile_prefill(model, inputs)
        self.profiled += 1
        self.profiled_rows += len(inputs["input_ids"])
        for name in ("flops", "language_model_flops", "kv_tokens"):
            setattr(self, name, getattr(self, name) + own[name])
            setattr(self, f"dense_{name}", getattr(self, f"dense_{name}") + dense[name])
        self.memory = max(self.memory, own["peak_memory_bytes"])
        self.dense_memory = max(self.dense_memory, dense["peak_memory_bytes"])

    def summary(self) -> dict[str, float]:
        """The figures by their names above; those that were not measured are left out."""
        found: dict[str, float] = {}
        if self.first_token_s:
            times = self.first_token_s
            low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
            found |= {"first_token_s": median, "first_token_low_s": low, "first_token_high_s": high}
        if self.later_s and self.later_tokens:
            found["decode_tokens_per_s"] = self.later_tokens / self.later_s
        if self.profiled:
            found["prefill_gflops"] = self.language_model_flops / self.profiled_rows / 1e9
            found["flops_ratio"] = self.language_model_flops / self.dense_language_model_flops
            found["model_flops_ratio"] = self.flops / self.dense_flops
            found["kv_tokens"] = self.kv_tokens / self.profiled
            found["kv_ratio"] = self.kv_tokens / self.dense_kv_tokens
            found["memory_mb"] = self.memory / 1e6
            found["memory_ratio"] = self.memory / self.dense_memory
        return found


def answer_lengths(tokens: torch.Tensor, ends: list[int]) -> list[int]:
    """Tokens of each row of `[B, S]` up to its first end-of-sequence token, this included; `ends`: their ids."""
    if not tokens.shape[1]:
        return [0] * len(tokens)
    ended = torch.isin(tokens, torch.tensor(ends, device=tokens.device))
    return torch.where(ended.any(1), ended.float().argmax(1) + 1, tokens.shape[1]).tolist()
