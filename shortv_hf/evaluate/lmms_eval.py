"""lmms-eval's model `shortv`: whatever this package loads, with frozen layers and token reduction by `--model_args`.

    lmms-eval --model shortv --tasks gqa --batch_size 8 \\
        --model_args 'pretrained=M,layers=[31,29],reduction={"method":"fastv","k":2,"ratio":0.5}'

Differences from lmms-eval's own classes for Hugging Face models (0.7.3): prompts are padded on the left whatever the
tokenizer's setting; each request of a batch is read by its own task; `until` is honoured; a failed generation is an error
and not an empty answer; no option of a request is changed; device and dtype are those asked for.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from ..command_line.options import parse_layers, parse_reduction
from ..data.inputs import to_device
from ..data.prompts import check_system_prompt
from ..data.video import MAX_FRAMES, load_video
from ..hub.loading import any_config, load, load_stock
from .dialogue import Dialogue, encode_dialogues, read_dialogue
from .figures import Clock, Figures, answer_lengths
from .journal import Answer, Journal


MAX_NEW_TOKENS = 1024  # of tasks that name no number, as lmms-eval's own LLaVA class has it
PROFILED_BATCHES = 4


class ShortV(lmms):
    """A ShortV model for lmms-eval.

    Args:
        pretrained: Hub id or directory of a ShortV repo or an original checkpoint.
        layers: frozen layers instead of the config's: `[31,29]`, or `31-29`, as a plain comma ends a model argument; empty
            for none.
        reduction: token reduction instead of the config's, as `--reduction` of the commands takes it.
        dtype: float32, bfloat16, float16, or auto for the checkpoint's.
        device: of a single process, "auto" for the GPU if there is one; of several, each has its own.
        batch_size: requests answered together.
        system_prompt: put before each question, by templates that have a place for it.
        max_new_tokens: of tasks that name no number.
        max_frames, fps: frames of a video, see `shortv chat`.
        profiled_batches: of how many batches FLOPs, memory and cache are measured, which takes two prefills more of each.

    Raises:
        ValueError: for a model, layers, a reduction, a dtype or a device that cannot be used, or a system prompt that the
            model's template does not print.
    """

    is_simple = False  # it wants chat messages

    def __init__(
        self,
        pretrained: str,
        layers: str | int | Sequence[int | str] | None = None,
        reduction: str | dict | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # lmms-eval passes it to all classes; it is for an automatic size
        system_prompt: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_frames: int = MAX_FRAMES,
        fps: float | None = None,
        profiled_batches: int = PROFILED_BATCHES,
    ):
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:  # "cpu:0" is no device to Transformers 4.57
            own = self.accelerator.device
            device = own.type if own.type == "cpu" else str(own)
        config, has_class = any_config(pretrained)
        fields = parse_reduction(_as_text(reduction), config)
        model: Any
        if has_class:
            model, processor = load(pretrained, _as_layers(layers), device or "auto", dtype, **fields)
        else:
            model, processor = load_stock(pretrained, device or "auto", dtype)
            model.set_shortv_layers(_as_layers(layers) or [])
            model.set_visual_reduction(fields.get("visual_reduction"))
        if system_prompt:
            check_system_prompt(system_prompt, processor)
        # lmms.clean(), which lmms-eval calls at the end, deletes attributes that are modules.
        self._model = [model]
        self.processor, self.config = processor, model.config
        self.pretrained = pretrained
        self.batch_size, self.max_new_tokens = int(batch_size), int(max_new_tokens)
        self.profiled_batches = int(profiled_batches)
        self._read = partial(
            read_dialogue,
            processor=processor,
            load_video=partial(load_video, max_frames=int(max_frames), fps=None if fps is None else float(fps)),
            system_prompt=system_prompt,
        )
        self.journal: Journal | None = None  # where answers are kept, and looked for
        self.figures = Figures()  # of what `generate_until` answered last, by all processes

    @property
    def model(self) -> Any:
        return self._model[0]

    @property
    def device(self) -> torch.device:
        """Where lmms-eval gathers what several processes have."""
        return self.accelerator.device if self._world_size > 1 else self.model.device

    def __repr__(self) -> str:  # a part of the name under which lmms-eval keeps responses
        return f"ShortV({self.pretrained!r})"

    def loglikelihood(self, requests):
        raise NotImplementedError("shortv answers tasks of the output type generate_until; this one wants likelihoods")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError(
            "shortv answers tasks of the output type generate_until; this one has several rounds"
        )

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests; figures go to lmms-eval's table and to `figures`."""
        known, keys = {} if self.journal is None else self.journal.answers, _keys(requests)
        answers = {number: known[key] for number, key in enumerate(keys) if key in known}
        figures = Figures() if self.journal is None else self.journal.figures
        open_ = [number for number in range(len(requests)) if number not in answers]
        with tqdm(total=len(requests), initial=len(answers), disable=self._rank != 0, desc="shortv") as bar:
            for numbers, dialogues in self._batches(requests, open_):
                profile = figures.profiled < self.profiled_batches
                new, added = self._answer([requests[number] for number in numbers], dialogues, profile)
                answers.update(zip(numbers, new, strict=True))
                figures += added
                if self.journal is not None:
                    self.journal.add({keys[number]: each for number, each in zip(numbers, new, strict=True)}, added)
                bar.update(len(numbers))
        if self._world_size > 1:
            figures = sum((Figures(**each) for each in gather_object([asdict(figures)])), Figures())
        self.figures = figures
        log_metrics(
            total_elapsed_time=figures.seconds,
            total_gen_tokens=figures.tokens,
            avg_speed=figures.tokens / figures.seconds if figures.seconds else 0.0,
            additional_metrics=figures.summary(),
        )
        given = [answers[number] for number in range(len(requests))]
        return [GenerationResult(each.text, TokenCounts(each.prompt_tokens, each.tokens)) for each in given]

    def _batches(self, requests: list[Instance], numbers: list[int]) -> Iterator[tuple[list[int], list[Dialogue]]]:
        """Those of the `numbers` of requests that can be answered together, and what they ask: the same options, the same
        kinds of media. Of the pictures, no more are held than what is waiting for its kind to fill a batch."""

        def options(number: int) -> list[tuple[str, str]]:
            return sorted((name, repr(value)) for name, value in requests[number].args[2].items())

        for _, group in groupby(sorted(numbers, key=options), options):
            waiting: dict[tuple[bool, bool], list[tuple[int, Dialogue]]] = {}
            for number in group:
                dialogue = self._dialogue(requests[number])
                batch = waiting.setdefault(dialogue.kinds, [])
                batch.append((number, dialogue))
                if len(batch) == self.batch_size:
                    yield _unzip(waiting.pop(dialogue.kinds))
            yield from map(_unzip, waiting.values())

    def _dialogue(self, request: Instance) -> Dialogue:
        _, doc_to_messages, _, doc_id, task, split = request.args
        try:
            return self._read(doc_to_messages(self.task_dict[task][split][doc_id]))
        except ValueError as error:
            raise ValueError(f"{task}, document {doc_id}: {error}") from None

    @torch.inference_mode()
    def _answer(
        self, requests: list[Instance], dialogues: list[Dialogue], profile: bool
    ) -> tuple[list[Answer], Figures]:
        """The answers of a batch, and what they add to the figures; FLOPs and so on where a `profile` is wanted."""
        model, given, figures = self.model, requests[0].args[2], Figures()
        inputs = to_device(model, encode_dialogues(dialogues, self.processor))
        if profile:  # before the answer: the first forward of a process, which warms up, is not timed
            figures.add_profile(model, inputs)
        options = self._options(given)
        clock = Clock() if options["num_beams"] == 1 else None
        start = time.perf_counter()
        new = model.generate(**inputs, **options, streamer=clock)[:, inputs["input_ids"].shape[1] :]
        end = time.perf_counter()
        ends = model.generation_config.eos_token_id
        lengths = answer_lengths(new, ends if isinstance(ends, list) else [] if ends is None else [ends])
        counted = [
            length
            for length, request in zip(lengths, requests, strict=True)
            if not (request.metadata or {}).get("__padding_only__")  # repeated, so that all ranks have as many
        ]
        if counted:
            figures.add_answers(clock, start, end, counted)
        texts = [_cut(text, given.get("until")) for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        return list(map(Answer, texts, inputs["attention_mask"].sum(1).tolist(), lengths)), figures

    def _options(self, given: dict) -> dict[str, Any]:
        """Arguments of `generate`; greedy unless the task says otherwise."""
        most = given.get("max_new_tokens") or given.get("max_gen_toks") or self.max_new_tokens
        options: dict[str, Any] = {"max_new_tokens": int(most), "num_beams": int(given.get("num_beams") or 1)}
        sampling = ("temperature", "top_p", "top_k")
        if given.get("do_sample") and (given.get("temperature") or 0) > 0:
            return {"do_sample": True, **options, **{name: given[name] for name in sampling if given.get(name)}}
        return {"do_sample": False, **options, **dict.fromkeys(sampling)}  # not what the checkpoint samples with


def _keys(requests: Sequence[Instance]) -> list[str]:
    """What tells each request from the others: of what a task asks several times (`repeats`), which time it is."""
    seen: Counter = Counter()
    keys = []
    for request in requests:
        key = f"{request.task_name} {request.doc_id} {request.idx}"
        keys.append(f"{key} {seen[key]}")
        seen[key] += 1
    return keys


def _unzip(batch: list[tuple[int, Dialogue]]) -> tuple[list[int], list[Dialogue]]:
    return [number for number, _ in batch], [dialogue for _, dialogue in batch]


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The answer before the first of the strings that end one. A blank line is none: lmms-eval puts it where a task names
    nothing, and its own LLaVA classes leave it out."""
    text = text.strip()
    for stop in [until] if isinstance(until, str) else until or []:
        if stop.strip("\n"):
            text = text.split(stop)[0]
    return text.strip()


def _as_layers(layers: str | int | Sequence[int | str] | None) -> list[int | str] | None:
    if layers is None:
        return None
    text = ",".join(map(str, layers)) if isinstance(layers, (list, tuple)) else str(layers)
    return parse_layers(text.strip("'\"[] ").replace("-", ","), "layers")


def _as_text(reduction: str | dict | None) -> str | None:
    """As `--reduction` has it: quotes, which protect commas, reach the model."""
    if isinstance(reduction, dict):
        return json.dumps(reduction)
    return None if reduction is None else reduction.strip().strip("'\"")
