"""What ShortV on vLLM refuses at start-up, since answers would be wrong, and would look right.

Each line says what to set instead. No import of vLLM: the checks read attributes of its config.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from ...configuration_shortv import validate_shortv_layers
from .architectures import TEXT_MODELS


BASE_LOAD_FORMATS = ("auto", "hf", "safetensors")  # that mean: read the checkpoint's files
SHORTV_LOAD_FORMAT = "shortv"  # ours (`loader.py`)


def check_settings(vllm_config: Any, environment: Mapping[str, str] = os.environ, rocm: bool = False) -> None:
    """Check a `VllmConfig` against what frozen layers can do; the layers become a list.

    Args:
        vllm_config: with its `model_config.hf_config`, stock or ShortV.
        environment: the variables of the process.
        rocm: whether it runs on a GPU of AMD's.

    Raises:
        ValueError: one line that names the setting, and what to set.
    """
    config = vllm_config.model_config.hf_config
    if getattr(config, "shortv_layers", None) is None:
        raise ValueError(
            """the config has no shortv_layers: give them with --hf-overrides '{"shortv_layers": [...]}'; [] is dense"""
        )
    config.shortv_layers = validate_shortv_layers(config.shortv_layers, config.get_text_config().num_hidden_layers)
    for problem in _problems(vllm_config, environment, rocm):
        raise ValueError(f"ShortV on vLLM: {problem}")


def _problems(vllm_config: Any, environment: Mapping[str, str], rocm: bool) -> Iterator[str]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    config, text = model.hf_config, model.hf_config.get_text_config()

    if getattr(config, "visual_reduction", None) is not None:
        yield (
            f"visual_reduction is {config.visual_reduction!r}, which would be ignored; serve a repo without it, or unset it "
            """with --hf-overrides '{"visual_reduction": null}'"""
        )
    if text.model_type not in TEXT_MODELS:
        yield f"the text model is {text.model_type!r}; layers are frozen of {', '.join(TEXT_MODELS)}"
    if getattr(model, "enable_prompt_embeds", False):
        yield "prompts of embeddings do not say which tokens are visual; leave --enable-prompt-embeds out"
    if getattr(model.multimodal_config, "mm_encoder_only", False):
        yield "--mm-encoder-only has no language model to freeze layers of; leave it out, or serve the original model"
    if config.shortv_layers == []:  # everything below is about frozen layers
        return

    if parallel.pipeline_parallel_size > 1:
        yield (
            "later pipeline stages do not learn which tokens are visual; use --tensor-parallel-size and "
            "--pipeline-parallel-size 1"
        )
    if parallel.tensor_parallel_size > text.num_key_value_heads:
        yield (
            f"--tensor-parallel-size {parallel.tensor_parallel_size} is more than the model's {text.num_key_value_heads} "
            "heads of keys; set it to that or less, and use more replicas"
        )
    for field in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, field, 1) > 1:
            option = field.replace("_", "-")
            yield f"--{option} splits what text tokens attend to; set it to 1"
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 1:
        yield "text tokens are not divided into microbatches; leave --enable-dbo and --ubatch-size out"
    if vllm_config.lora_config is not None:
        yield (
            "adapters are told apart by rows of the whole step, and frozen layers compute fewer; merge the adapter into "
            "the weights and leave --enable-lora out"
        )
    if vllm_config.speculative_config is not None:
        yield "speculative decoding is not known to leave visual tokens frozen; leave --speculative-config out"
    if vllm_config.kv_transfer_config is not None:
        yield (
            "a shared store of keys and values tells models apart by name and tokens, not by shortv_layers; leave "
            "--kv-transfer-config out"
        )
    if rocm:
        yield "attention on ROCm wants requests in an order that text tokens do not keep; use a CUDA GPU or a CPU"
    if environment.get("VLLM_USE_BREAKABLE_CUDAGRAPH", "0") not in ("", "0"):
        yield (
            "breakable CUDA graphs replay prompts without asking which tokens are visual; set "
            "VLLM_USE_BREAKABLE_CUDAGRAPH=0"
        )
    yield from _graph_problems(vllm_config)


def _graph_problems(vllm_config: Any) -> Iterator[str]:
    """A graph of the whole model is replayed without its Python, so it must never hold a visual token.

    vLLM replays it for steps in which each request has one token. A chunk of one visual token would be among them; where
    the budget of a step is larger than the number of requests, no chunk is cut down to that.
    """
    mode = getattr(vllm_config.compilation_config.cudagraph_mode, "name", None)
    scheduler = vllm_config.scheduler_config
    if mode == "FULL":
        yield (
            "cudagraph_mode FULL replays prompts without asking which tokens are visual; set "
            """--compilation-config '{"cudagraph_mode": "FULL_AND_PIECEWISE"}'"""
        )
    if mode not in (None, "NONE", "PIECEWISE") and scheduler.max_num_seqs >= scheduler.max_num_batched_tokens:
        yield (
            f"--max-num-seqs {scheduler.max_num_seqs} can cut a chunk of an image down to one token, which a CUDA graph "
            f"takes for a decoding request; set it below --max-num-batched-tokens {scheduler.max_num_batched_tokens}"
        )


def weights_load_format(config: Any, load_format: str) -> str:
    """The load format for a ShortV repo: ours where it references the weights of another repo.

    Raises:
        ValueError: another format was asked for, which would look for weights in the repo itself.
    """
    if not getattr(config, "base_model_name_or_path", None) or load_format in (SHORTV_LOAD_FORMAT, "dummy"):
        return load_format
    if load_format not in BASE_LOAD_FORMATS:
        raise ValueError(
            f"ShortV on vLLM: the weights are in {config.base_model_name_or_path}, which --load-format {load_format} does "
            "not read; leave it out, or serve that repo with --hf-overrides"
        )
    return SHORTV_LOAD_FORMAT
