"""What one forward pass takes: FLOPs, time, and bytes of live tensors, measured while it runs. And what loading takes."""

import statistics
import tempfile
import time
import weakref
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from ..upstream import CACHE, find_cache, text_model


DECODING_STEPS = 4  # per repetition
# Not every torch version's counter knows the CPU's kernel, or keys with fewer heads than queries in those of CUDA.
FUSED_ATTENTION = [
    f"_scaled_dot_product_{kernel}_attention{end}"
    for kernel, end in (("flash", "_for_cpu"), ("flash", ""), ("efficient", ""), ("cudnn", ""))
]
VISION = ("vision_tower", "visual", "multi_modal_projector")  # parts of models, in the order in which they run


def vision_parts(base) -> list[nn.Module]:
    """What makes features of pictures, in a model without its head: the tower first."""
    return [getattr(base, name) for name in VISION if hasattr(base, name)]


class Stopwatch:
    """Named points in time: CUDA events in the order of the device's work, on the CPU the clock."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.marks: dict[str, Any] = {}

    def mark(self, name: str):
        if self.on_cuda:
            self.marks[name] = torch.cuda.Event(enable_timing=True)
            self.marks[name].record()
        else:
            self.marks[name] = time.perf_counter()

    def synchronize(self):
        if self.on_cuda:
            torch.cuda.synchronize()

    def seconds(self, start: str, end: str) -> float:
        """Between two marks; on CUDA after `synchronize` only."""
        if self.on_cuda:
            return self.marks[start].elapsed_time(self.marks[end]) / 1000
        return self.marks[end] - self.marks[start]


def time_prefill(model, inputs: dict):
    """One forward pass of a prompt with images.

    Returns:
        Seconds of `time_to_first_token`, the whole forward; of `prefill`, the same without vision tower and projector,
        in which what a method does between these and the text model (finding visual tokens, planning) counts; and of
        `language_model`, the text model alone. And the cache.
    """
    watch = Stopwatch(model.device)

    def marking(name):
        return lambda *_: watch.mark(name)

    vision, text = vision_parts(model.model), text_model(model.model)
    hooks = [
        vision[0].register_forward_pre_hook(marking("vision")),
        vision[-1].register_forward_hook(marking("vision_end")),
        text.register_forward_pre_hook(marking("language_model")),
        text.register_forward_hook(marking("language_model_end")),
    ]
    try:
        watch.synchronize()
        watch.mark("start")
        cache = find_cache(model(**inputs, use_cache=True, logits_to_keep=1))
        watch.mark("end")
        watch.synchronize()
    finally:
        for hook in hooks:
            hook.remove()
    total = watch.seconds("start", "end")
    seconds = {
        "time_to_first_token": total,
        "prefill": total - watch.seconds("vision", "vision_end"),
        "language_model": watch.seconds("language_model", "language_model_end"),
    }
    return seconds, cache


def time_decoding(model, cache, tokens: torch.Tensor) -> float:
    """Seconds per output token after a prefill; `tokens` `[B, 1]` are fed in every step."""
    watch = Stopwatch(model.device)
    watch.synchronize()
    watch.mark("start")
    for _ in range(DECODING_STEPS):
        cache = find_cache(model(input_ids=tokens, **{CACHE: cache}, use_cache=True))
    watch.mark("end")
    watch.synchronize()
    return watch.seconds("start", "end") / DECODING_STEPS


def time_loading(stock, shortv, repeats: int) -> dict:
    """`from_pretrained` of the class of `stock` and of that of `shortv` in turn, from the same files in a temporary
    directory into CPU memory.

    Returns:
        Seconds by class, one per repetition: `{"stock": [...], "shortv": [...]}`. A first round, which brings the files
        into the system's cache, is left out.
    """
    times: dict[str, list[float]] = {"stock": [], "shortv": []}
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        for round_ in logging.tqdm(range(repeats + 1), desc="loading"):
            for name, model in (("stock", stock), ("shortv", shortv)):
                options = {} if name == "stock" else {"shortv_layers": model.config.shortv_layers}
                start = time.perf_counter()
                type(model).from_pretrained(folder, dtype=model.dtype, **options)
                if round_:
                    times[name].append(time.perf_counter() - start)
    return times


def profile_prefill(model, inputs: dict) -> dict:
    """FLOPs and memory of one forward pass, counted while it runs (slower than without).

    Returns:
        `flops` of the whole forward, `language_model_flops` of the text model in it (attention matrices in full, causal
        or not, as in Eq. 3-5), `kv_tokens`: of how many tokens a row a layer's cache holds keys, mean over the layers;
        `peak_memory_bytes`: what was allocated at most above weights and inputs, and on the CPU `largest_tensor_bytes`: of
        the largest tensor that an operator returned.
    """
    counter = _flop_counter()
    # no_grad, not inference_mode: there, composite operators reach the modes in one piece.
    with torch.no_grad(), peak_memory(model.device) as memory, counter:
        cache: Any = find_cache(model(**inputs, use_cache=True, logits_to_keep=1))
    return {
        "flops": counter.get_total_flops(),
        "language_model_flops": _of_the_language_model(counter, model),
        "kv_tokens": statistics.mean(layer.keys.shape[-2] for layer in cache.layers),
        **memory,
    }


def language_model_flops(model, inputs: dict) -> int:
    """FLOPs of the text model in one forward pass without a cache, counted as in [`profile_prefill`]."""
    counter = _flop_counter()
    with torch.no_grad(), counter:
        model(**inputs, use_cache=False, logits_to_keep=1)
    return _of_the_language_model(counter, model)


def _flop_counter() -> FlopCounterMode:
    return FlopCounterMode(
        display=False,
        custom_mapping={getattr(torch.ops.aten, name): _fused_attention_flops for name in FUSED_ATTENTION},
    )


def _of_the_language_model(counter: FlopCounterMode, model) -> int:
    text = text_model(model.model)
    name = next(name for name, module in model.named_modules() if module is text)
    return sum(counter.get_flop_counts()[f"{type(model).__name__}.{name}"].values())


def _fused_attention_flops(query: tuple, key: tuple, *args, **kwargs) -> int:
    """Shapes `[B, heads, tokens, head_dim]`; keys may have fewer heads than queries."""
    batch, heads, queries, head_dim = query
    return 4 * batch * heads * queries * key[2] * head_dim


@contextmanager
def peak_memory(device: torch.device):
    """Inside, bytes allocated at most at a time above those on entry; on leaving, in the yielded dict as
    `peak_memory_bytes`.

    CUDA: the allocator's statistics. CPU: storages of the tensors that operators return, the size of the largest one as
    `largest_tensor_bytes`; a kernel's own scratch memory is not seen.
    """
    result: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device) - before
    else:
        with LiveTensorBytes() as live:
            yield result
        result.update(peak_memory_bytes=live.peak, largest_tensor_bytes=live.largest)


class LiveTensorBytes(TorchDispatchMode):
    """Adds up the storages that operators create inside, until they are freed: `live` bytes now, their `peak`, and the
    bytes of the `largest` storage."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if torch.is_tensor(leaf):
                storage = leaf.untyped_storage()
                if storage._cdata not in given:  # neither a view nor a change in place
                    given.add(storage._cdata)
                    self._add(storage)
        return output

    def _add(self, storage: torch.UntypedStorage):
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int):
        self.live -= size
