"""What ShortV on vLLM refuses at start-up, told by vLLM's config alone."""

from types import SimpleNamespace

import pytest
from families import llava_config, qwen2_vl_config, text

from shortv_hf.serving.vllm.guards import check_settings, weights_load_format


pytestmark = pytest.mark.once
MODE = {
    name: SimpleNamespace(name=name)
    for name in ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")
}


def settings(config=None, **changes):
    """A `VllmConfig` that is right, but for `changes`, `part__field=value`."""
    config = llava_config() if config is None else config
    if not hasattr(config, "shortv_layers"):
        config.shortv_layers = [3, 1]
    found = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=config, enable_prompt_embeds=False, multimodal_config=SimpleNamespace(mm_encoder_only=False)
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            tensor_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
            ubatch_size=0,
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=256, max_num_batched_tokens=2048),
        compilation_config=SimpleNamespace(cudagraph_mode=MODE["FULL_AND_PIECEWISE"]),
        lora_config=None,
        speculative_config=None,
        kv_transfer_config=None,
    )
    for path, value in changes.items():
        *parts, name = path.split("__")
        part = found
        for each in parts:
            part = getattr(part, each)
        setattr(part, name, value)
    return found


@pytest.mark.parametrize(
    "config", [llava_config, qwen2_vl_config, lambda: llava_config(text("Mistral", sliding_window=None))]
)
def test_what_is_right_passes(config):
    given = settings(config())
    check_settings(given, {})
    assert given.model_config.hf_config.shortv_layers == [3, 1]
    for mode in (None, *MODE.values()):
        if mode is not MODE["FULL"]:
            check_settings(settings(compilation_config__cudagraph_mode=mode), {})


def test_halves_of_layers_pass():
    check_settings(settings(model_config__hf_config__shortv_layers=[3, "1.mlp", "0.self_attn"]), {})


GUARDS = {
    "pipeline parallel": ({"parallel_config__pipeline_parallel_size": 2}, "--pipeline-parallel-size 1"),
    "tensor parallel": ({"parallel_config__tensor_parallel_size": 4}, "more than the model's 2 heads of keys"),
    "decode context parallel": (
        {"parallel_config__decode_context_parallel_size": 2},
        "--decode-context-parallel-size .* set it to 1",
    ),
    "prefill context parallel": (
        {"parallel_config__prefill_context_parallel_size": 2},
        "--prefill-context-parallel-size .* set it to 1",
    ),
    "two batches": ({"parallel_config__enable_dbo": True}, "leave --enable-dbo and --ubatch-size out"),
    "microbatches": ({"parallel_config__ubatch_size": 2}, "leave --enable-dbo and --ubatch-size out"),
    "adapters": ({"lora_config": object()}, "leave --enable-lora out"),
    "speculation": ({"speculative_config": object()}, "leave --speculative-config out"),
    "shared cache": ({"kv_transfer_config": object()}, "leave --kv-transfer-config out"),
    "full graphs": (
        {"compilation_config__cudagraph_mode": MODE["FULL"]},
        "set --compilation-config .*FULL_AND_PIECEWISE",
    ),
    "one token of an image": (
        {"scheduler_config__max_num_seqs": 2048},
        "--max-num-seqs 2048 .* below --max-num-batched-tokens 2048",
    ),
    "embeddings": ({"model_config__enable_prompt_embeds": True}, "leave --enable-prompt-embeds out"),
    "encoder only": (
        {"model_config__multimodal_config__mm_encoder_only": True},
        "--mm-encoder-only has no language model",
    ),
    "reduction": (
        {"model_config__hf_config__visual_reduction": {"method": "fastv"}},
        "visual_reduction is {'method': 'fastv'}, which would be ignored",
    ),
}


@pytest.mark.parametrize("name", GUARDS)
def test_wrong_answers_are_refused(name):
    changes, message = GUARDS[name]
    with pytest.raises(ValueError, match=f"^ShortV on vLLM: .*{message}") as refusal:
        check_settings(settings(**changes), {})
    assert "\n" not in str(refusal.value)


def test_the_machine_and_its_variables_are_asked():
    with pytest.raises(ValueError, match="VLLM_USE_BREAKABLE_CUDAGRAPH=0"):
        check_settings(settings(), {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"})
    check_settings(settings(), {"VLLM_USE_BREAKABLE_CUDAGRAPH": "0"})
    with pytest.raises(ValueError, match="ROCm"):
        check_settings(settings(), {}, rocm=True)


@pytest.mark.parametrize("name", sorted(set(GUARDS) - {"reduction", "embeddings", "encoder only"}))
def test_without_frozen_layers_there_is_nothing_to_get_wrong(name):
    check_settings(settings(model_config__hf_config__shortv_layers=[], **GUARDS[name][0]), {}, rocm=True)


def test_other_text_models_are_refused():
    with pytest.raises(ValueError, match="the text model is 'gemma2'; layers are frozen of llama, mistral, qwen2"):
        check_settings(settings(llava_config(text("Gemma2"))), {})


@pytest.mark.parametrize(
    "layers, message",
    [
        (None, "the config has no shortv_layers: give them with --hf-overrides"),
        ([4], "4, which is out of range; valid layer ids are the integers 0 to 3"),
        ([1, "1.mlp"], "beside a part of it"),
        ("12", "must be a list"),
    ],
)
def test_layers_are_checked_as_in_the_package(layers, message):
    config = llava_config()
    config.shortv_layers = layers
    with pytest.raises(ValueError, match=message):
        check_settings(settings(config), {})


def test_weights_by_reference_have_a_loader():
    config = SimpleNamespace(base_model_name_or_path="org/base")
    for load_format, expected in {
        "auto": "shortv",
        "safetensors": "shortv",
        "shortv": "shortv",
        "dummy": "dummy",
    }.items():
        assert weights_load_format(config, load_format) == expected
    with pytest.raises(
        ValueError, match="the weights are in org/base, which --load-format sharded_state does not read"
    ):
        weights_load_format(config, "sharded_state")
    assert weights_load_format(SimpleNamespace(base_model_name_or_path=None), "auto") == "auto"
    assert weights_load_format(SimpleNamespace(), "sharded_state") == "sharded_state"
