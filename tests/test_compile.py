"""torch.compile, and what a captured graph or a launch queue needs: no host synchronisation inside the layers."""

import pytest
import torch
import transformers
from helpers import IMAGE_TOKEN, make_config, make_inputs, make_model, make_stock
from torch.utils._python_dispatch import TorchDispatchMode

from shortv_hf import ShortVLlavaForConditionalGeneration
from shortv_hf.upstream import CACHE, find_cache


LAYERS = [0, 2, 3]
SYNCHRONISING = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
}


class Synchronisations(TorchDispatchMode):
    """Records the operators that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in SYNCHRONISING:
            self.found.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [["ttItt"], ["ttItt", "tttItIt"]], ids=len)
def test_layers_do_not_synchronise(attn, rows):
    model = make_model(attn=attn, shortv_layers=LAYERS)
    inputs = make_inputs(model, rows)
    found = {}

    def around(name, forward):
        def wrapped(*args, **kwargs):
            with Synchronisations() as mode:
                output = forward(*args, **kwargs)
            found[name] = mode.found
            return output

        return wrapped

    for i, layer in enumerate(model.model.language_model.layers):
        layer.forward = around(i, layer.forward)
    with torch.no_grad():
        model(**inputs)
    assert found == {i: [] for i in range(4)}


def test_the_detector_detects():
    with Synchronisations() as mode:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert mode.found == ["aten::_local_scalar_dense", "aten::nonzero"]


def graph_breaks(model, inputs):
    """Where the graph of the forward breaks, as (file, line). One place can count several times, once per frame."""
    torch._dynamo.reset()
    with torch.no_grad():
        reasons = torch._dynamo.explain(model.forward)(**inputs).break_reasons
    return {(reason.user_stack[-1].filename, reason.user_stack[-1].lineno) for reason in reasons}


@pytest.mark.parametrize("rows", [["ttItt"], ["ttItt", "tItttt"]], ids=len)
def test_no_graph_break_that_stock_does_not_have(rows):
    model = make_model(shortv_layers=LAYERS)
    stock = make_stock(model)
    inputs = make_inputs(model, rows)
    with torch.no_grad():
        model(**inputs), stock(**inputs)
    assert graph_breaks(model, inputs) <= graph_breaks(stock, inputs)


@pytest.mark.parametrize("rows", [["ttItt"], ["ttItt", "tItttt"]], ids=len)
def test_compiled_prefill_and_decoding(rows):
    model = make_model(shortv_layers=LAYERS)
    inputs = make_inputs(model, rows)
    fullgraph = transformers.__version__.startswith("5.")  # 4.57 checks image tokens with a data-dependent branch
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=fullgraph)
    with torch.no_grad():
        expected = model(**inputs)
        actual = compiled(**inputs)
        keep = inputs["attention_mask"].bool()
        torch.testing.assert_close(actual.logits[keep], expected.logits[keep], atol=1e-4, rtol=1e-4)
        step = {
            "input_ids": torch.full((len(rows), 1), 7),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(len(rows), 1, dtype=torch.long)], 1),
        }
        expected = model(**step, **{CACHE: find_cache(expected)})
        actual = compiled(**step, **{CACHE: find_cache(actual)})
        torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_compiled_prefill_of_one_row_skips_the_frozen_tokens():
    model = make_model(shortv_layers=LAYERS)
    inputs = make_inputs(model, ["ttItt"])
    lengths = []

    def backend(graph, example_inputs):
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if node.op == "call_function" and "linear" in str(node.target) and torch.is_tensor(value):
                if value.shape[-1] == model.config.text_config.intermediate_size and value.ndim == 3:
                    lengths.append(value.shape[1])
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model.forward, backend=backend)(**inputs)
    n_text = int((inputs["input_ids"] != IMAGE_TOKEN).sum())
    assert lengths.count(n_text) == 2 * len(LAYERS)  # gate_proj and up_proj


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_compiled_prefill_with_a_tower_without_class_token(strategy):
    """The number of visual tokens is only known of CLIP; of others, the graph assumes nothing."""
    config = make_config(shortv_layers=LAYERS, vision_feature_select_strategy=strategy)
    fields = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config.vision_config = transformers.SiglipVisionConfig(**fields, image_size=16, patch_size=4)
    torch.manual_seed(0)
    model = ShortVLlavaForConditionalGeneration(config).eval()
    n_visual = 16 - (strategy == "default")
    ids = torch.tensor([[5, 6, *[IMAGE_TOKEN] * n_visual, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    torch._dynamo.reset()
    with torch.no_grad():
        actual = torch.compile(model.forward, backend="eager")(**inputs).logits
        torch.testing.assert_close(actual, model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_flex_attention():
    """Frozen layers read the rows they need off the block mask's function."""
    if not transformers.utils.is_torch_flex_attn_available():
        pytest.skip("no flex attention")
    model = make_model(shortv_layers=LAYERS)
    inputs = make_inputs(model, ["tttItt", "tItItttt"])
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation({"text_config": "flex_attention"})
        torch._dynamo.reset()
        try:
            make_stock(model)(**inputs)
        except Exception as error:
            pytest.skip(f"stock LLaVA cannot run flex attention here: {type(error).__name__}")
        actual = model(**inputs).logits
    torch.testing.assert_close(actual[keep], expected[keep], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", [LAYERS, [0, "1.mlp", "2.self_attn"]], ids=["layers", "halves"])
def test_compiled_text_model_takes_other_prompts_without_a_new_graph(layers):
    """The plan is made outside the graph, exact for any family and batch. Only prompts without an image, which have no
    plan, need a graph that stock does not need."""
    model = make_model("llava_next", shortv_layers=layers)
    stock = make_stock(model)
    prompts = [["ttIt"], ["tIttt"], ["tItItt"], ["tIt", "tttIttt"], ["ttttIt", "tIttt"], ["tIt", "tIt"], ["ttttt"]]
    expected = []
    with torch.no_grad():
        for rows in prompts:
            expected.append(model(**make_inputs(model, rows)).logits)
    graphs = {}
    for each in (stock, model):
        torch._dynamo.reset()
        backend = torch._dynamo.testing.CompileCounter()
        each.model.language_model.compile(dynamic=True, backend=backend)
        counts = graphs[type(each)] = []
        for rows, logits in zip(prompts, expected, strict=True):
            inputs = make_inputs(model, rows)
            with torch.no_grad():
                output = each(**inputs)
            counts.append(backend.frame_count)
            if each is model:
                keep = inputs["attention_mask"].bool()
                torch.testing.assert_close(output.logits[keep], logits[keep], atol=1e-4, rtol=1e-4)
    assert graphs[type(stock)] == [1, 1, 1, 2, 2, 2, 2]
    assert graphs[type(model)] == [1, 1, 1, 2, 2, 2, 3]
