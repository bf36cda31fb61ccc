"""Rankings against the released code's scores, and against the deliberately simple reference."""

import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from helpers import N_LAYERS, make_inputs, make_model, make_stock, solo_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shortv_hf import ShortVLlavaForConditionalGeneration, ShortVLlavaNextForConditionalGeneration
from shortv_hf.data import Samples
from shortv_hf.flops import flops_ratio
from shortv_hf.hub.loading import demo_model, load
from shortv_hf.layer_contribution import Budget, LayerRanking, Settings, calibrate, kl_to_dense, rank_layers
from shortv_hf.layer_contribution import ranking as ranking_module
from shortv_hf.layer_contribution.budget import choose_by_flops, choose_by_kl, measure_costs
from shortv_hf.layer_contribution.freezing import frozen_tokens
from shortv_hf.layer_contribution.kl import logits_with


GOLDENS = Path(os.environ.get("SHORTV_GOLDENS", Path(__file__).parents[1] / "goldens" / "shortv"))
CLASSES = {
    "llava15_mha": ShortVLlavaForConditionalGeneration,
    "llavanext_gqa": ShortVLlavaNextForConditionalGeneration,
}
INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
ROWS = ["tItttt", "ttttttIt", "ItItt"]
CLOSE = {"atol": 2e-6, "rtol": 1e-4}


@pytest.fixture(scope="module")
def model():
    return make_model(shortv_layers=[1])


@pytest.fixture(scope="module")
def batch(model):
    return make_inputs(model, ROWS)


def simple_scores(model, inputs, tokens, kl, base=()):
    """Eq. 2 without any of the shortcuts: a stock model, in which updates are thrown away; `[L]` for one row."""
    stock = make_stock(model)
    visual = inputs["input_ids"] == model.config.image_token_id
    frozen = {"visual": visual, "text": ~visual, "all": torch.ones_like(visual)}[tokens]

    def logits(layers):
        def discard(module, args, kwargs, output):
            return torch.where(frozen[..., None], args[0] if args else kwargs["hidden_states"], output)

        handles = [
            stock.model.language_model.layers[layer].register_forward_hook(discard, with_kwargs=True)
            for layer in layers
        ]
        with torch.no_grad():
            result = stock(**inputs).logits[:, -1].double().log_softmax(-1)
        for handle in handles:
            handle.remove()
        return result

    dense, scores = logits([]), []
    for layer in range(N_LAYERS):
        other = logits([*base, layer])
        p, q = (dense, other) if kl == "forward" else (other, dense)
        scores.append(float((p.exp() * (p - q)).sum()))
    return scores


# ------------------------------------------------------------------------------------------------- the released code


@pytest.mark.parametrize("kl", ["reverse", "forward"])
@pytest.mark.parametrize("variant", CLASSES)
def test_goldens(variant, kl):
    model = CLASSES[variant].from_pretrained(GOLDENS / variant, dtype=torch.float32)
    expected = load_file(GOLDENS / variant / "lc.safetensors")
    names = json.loads((GOLDENS / variant / "manifest.json").read_text())["lc"]["samples"]
    samples = []
    for name in names:
        tensors = load_file(GOLDENS / variant / "cases" / f"{name}.safetensors")
        samples.append({key: tensors[key] for key in INPUTS if key in tensors})
    ranking = rank_layers(model, samples, kl=kl)
    scores = expected["lc" if kl == "reverse" else "lc_forward_kl"]
    torch.testing.assert_close(torch.tensor(ranking.sample_scores), scores.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(ranking.scores), scores.mean(0).float(), atol=1e-5, rtol=0)
    if kl == "reverse":
        assert ranking.order == expected["order"].tolist()
    assert ranking.scores[-1] == 0.0 and all(row[-1] == 0.0 for row in ranking.sample_scores)


# --------------------------------------------------------------------------------------------- the simple reference


@pytest.mark.parametrize(
    ("family", "text"), [("llava", "llama"), ("llava", "mistral_sliding"), ("llava_next", "qwen2_sliding")]
)
@pytest.mark.parametrize("tokens", ["visual", "text", "all"])
def test_simple_reference(family, text, tokens):
    model = make_model(family, text)
    inputs = make_inputs(model, ["ttItt"])
    for kl in ("forward", "reverse"):
        ranking = rank_layers(model, [inputs], tokens=tokens, kl=kl, layers_per_batch=3)
        expected = torch.tensor(simple_scores(model, inputs, tokens, kl))
        torch.testing.assert_close(torch.tensor(ranking.scores), expected, **CLOSE)
        assert ranking.order == sorted(range(N_LAYERS), key=ranking.scores.__getitem__)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", ["visual", "text", "all"])
@pytest.mark.parametrize("metric", ["lc", "cosine"])
def test_batch_equals_solo(metric, tokens, attn):
    model = make_model(attn=attn)
    batch = make_inputs(model, ROWS)
    together = rank_layers(model, [batch], metric, tokens)
    apart = rank_layers(model, [solo_inputs(batch, ROWS, i) for i in range(3)], metric, tokens)
    torch.testing.assert_close(torch.tensor(together.sample_scores), torch.tensor(apart.sample_scores), **CLOSE)
    assert (together.text_tokens, together.visual_tokens) == (apart.text_tokens, apart.visual_tokens)
    assert apart.text_tokens == sum(row.count("t") for row in ROWS) / 3 and apart.visual_tokens == 16 * 4 / 3


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.text("tI", min_size=1, max_size=5).map(lambda row: "I" + row + "t"), min_size=1, max_size=3),
    layers_per_batch=st.integers(1, 5),
)
def test_any_batch_equals_solo(model, rows, layers_per_batch):
    batch = make_inputs(model, rows)
    together = rank_layers(model, [batch], layers_per_batch=layers_per_batch)
    apart = rank_layers(model, [solo_inputs(batch, rows, i) for i in range(len(rows))], layers_per_batch=1)
    torch.testing.assert_close(torch.tensor(together.sample_scores), torch.tensor(apart.sample_scores), **CLOSE)


def test_right_padding_and_text_rows(model):
    rows = ["ttIt", "tttt"]
    ranking = rank_layers(model, [make_inputs(model, rows, padding_side="right")])
    expected = simple_scores(model, solo_inputs(make_inputs(model, rows), rows, 0), "visual", "forward")
    torch.testing.assert_close(torch.tensor(ranking.sample_scores[0]), torch.tensor(expected), **CLOSE)
    assert max(map(abs, ranking.sample_scores[1])) < 1e-6  # nothing to freeze


def test_prompt_that_ends_with_an_image(model):
    """The last layer does count there: what it makes of the last visual token is the answer."""
    inputs = make_inputs(model, ["ttI"])
    ranking = rank_layers(model, [inputs])
    expected = simple_scores(model, inputs, "visual", "forward")
    assert expected[-1] > 1e-3
    torch.testing.assert_close(torch.tensor(ranking.scores), torch.tensor(expected), **CLOSE)


def test_cosine_is_that_of_the_hidden_states(model):
    inputs = make_inputs(model, ["ttIt"])
    stock = make_stock(model)
    states = []
    handles = [
        layer.register_forward_hook(
            lambda module, args, kwargs, output: states.append((args[0], output)), with_kwargs=True
        )
        for layer in stock.model.language_model.layers
    ]
    with torch.no_grad():
        stock(**inputs)
    for handle in handles:
        handle.remove()
    visual = inputs["input_ids"] == model.config.image_token_id
    expected = [float(torch.cosine_similarity(a[visual], b[visual], dim=-1).mean()) for a, b in states]
    ranking = rank_layers(model, [inputs], metric="cosine")
    torch.testing.assert_close(torch.tensor(ranking.scores), torch.tensor(expected))
    assert ranking.order == sorted(range(N_LAYERS), key=lambda layer: -expected[layer])  # the most similar first


def test_random_is_seeded(model):
    orders = {tuple(rank_layers(model, None, metric="random", seed=seed).order) for seed in range(20)}
    assert len(orders) > 5
    assert rank_layers(model, None, "random", seed=3).order == rank_layers(model, None, "random", seed=3).order


@pytest.mark.parametrize("tokens", ["visual", "text", "all"])
def test_greedy_scores_are_joint(model, tokens):
    inputs = make_inputs(model, ["ttItt"])
    ranking = rank_layers(model, [inputs], metric="greedy", tokens=tokens)
    assert sorted(ranking.order) == list(range(N_LAYERS))
    for step, chosen in enumerate(ranking.order):
        costs = simple_scores(model, inputs, tokens, "forward", base=ranking.order[:step])
        assert ranking.scores[chosen] == pytest.approx(costs[chosen], abs=2e-6, rel=1e-4)
        if step == 0:
            assert costs[chosen] <= min(costs) + 1e-6


def test_greedy_is_as_good_as_trying_every_layer_at_every_step(monkeypatch):
    """Of a trained model, for a part of the passes. Layers that cost about the same can change places."""
    trained, processor = load(demo_model(), [], "cpu", "float32")
    samples, order, left = list(Samples("shapes", processor, 4)), [], list(range(12))
    while left:
        costs = kl_to_dense(trained, samples, [Settings([*order, layer]) for layer in left]).mean(1)
        order.append(left.pop(int(costs.argmin())))
    passes = []

    def counted(*args):
        passes.append(1)
        return logits_with(*args)

    monkeypatch.setattr(ranking_module, "logits_with", counted)
    lazy = rank_layers(trained, samples, "greedy").order
    assert len(passes) <= 2 * 12 * len(samples)  # at every step, all: 66
    settings = [Settings(each[:n]) for each in (order, lazy) for n in range(1, 13)]
    costs, lazy_costs = kl_to_dense(trained, samples, settings).mean(1).view(2, 12)
    assert (lazy_costs <= 1.25 * costs + 1e-6).all(), lazy_costs / costs


# --------------------------------------------------------------------------------------------------- frozen for real


def joint_kl(model, inputs, layers, **settings) -> float:
    return kl_to_dense(model, [inputs], [Settings(layers, **settings)]).mean().item()


@pytest.mark.parametrize("tokens", ["visual", "text", "all"])
def test_joint_kl(model, tokens):
    inputs = make_inputs(model, ["tItt"])
    expected = simple_scores(model, inputs, tokens, "forward", base=[0, 2])
    settings = [Settings(layers, tokens=tokens) for layers in ((), [0, 2, 1], [2, 0, 3])]
    curve = kl_to_dense(model, [inputs], settings).mean(1).tolist()
    assert curve[0] == pytest.approx(0, abs=1e-6)
    assert curve[1:] == pytest.approx([expected[1], expected[3]], abs=2e-6, rel=1e-4)
    assert joint_kl(model, inputs, [0, 1, 2], tokens=tokens) == pytest.approx(curve[1])


def test_joint_kl_with_a_reduction(model, batch):
    """Against the model without it; a setting that drops nothing changes nothing."""
    fastv = {"method": "fastv", "k": 2, "ratio": 0.5}
    model.set_visual_reduction(fastv)  # what the model does at the moment does not count
    try:
        nothing = joint_kl(model, batch, [0], visual_reduction={**fastv, "ratio": 0})
        assert nothing == joint_kl(model, batch, [0])
        assert rank_layers(model, [batch]).scores == rank_layers(make_model(), [batch]).scores
        with_fastv = joint_kl(model, batch, [0], visual_reduction=fastv)
        assert model.config.visual_reduction == fastv
        logits = []
        for layers, reduction in (([], None), ([0], fastv)):
            with frozen_tokens(model, layers), torch.no_grad():
                model.set_visual_reduction(reduction)
                logits.append(model(**batch).logits[:, -1].log_softmax(-1))
        expected = float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())
        assert with_fastv == pytest.approx(expected, abs=1e-6) and abs(with_fastv - nothing) > 1e-3
    finally:
        model.set_visual_reduction(None)


@pytest.mark.parametrize("tokens", ["text", "all"])
def test_frozen_tokens_generate_without_cache(model, batch, tokens):
    """Every step is the simple reference's full recompute, in which the generated tokens are frozen as well."""
    with frozen_tokens(model, [0, 2], tokens), torch.no_grad():
        output = model.generate(**batch, max_new_tokens=3, do_sample=False, use_cache=False)
    stock = make_stock(model)
    inputs = dict(batch)
    for _ in range(3):
        visual = inputs["input_ids"] == model.config.image_token_id
        frozen = ~visual if tokens == "text" else torch.ones_like(visual)

        def discard(module, args, output, frozen=frozen):
            return torch.where(frozen[..., None], args[0], output)

        handles = [stock.model.language_model.layers[i].register_forward_hook(discard) for i in (0, 2)]
        with torch.no_grad():
            token = stock(**inputs).logits[:, -1].argmax(-1, keepdim=True)
        for handle in handles:
            handle.remove()
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)
    assert output.tolist() == inputs["input_ids"].tolist()


def test_measuring_leaves_the_model_as_it_was(batch):
    model = make_model(shortv_layers=[1]).train()
    rank_layers(model, [batch])  # Transformers adds hooks of its own at the first call
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    for tokens in ("visual", "text", "all"):
        rank_layers(model, [batch], tokens=tokens)
    with pytest.raises(ValueError, match="9"), frozen_tokens(model, [9], "text"):
        pass
    assert model.config.shortv_layers == [1] and model.training
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_divergence_is_float32_in_half_precision(model, batch, dtype):
    """Scores of a half-precision model are those that its own logits give in float32."""
    half = make_model().to(dtype)
    half.load_state_dict(model.state_dict())
    row = solo_inputs(batch, ROWS, 0)
    ranking = rank_layers(half, [row], layers_per_batch=1)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in row.items()}
    logits = []
    for layers in ([], [0]):
        half.set_shortv_layers(layers)
        with torch.no_grad():
            logits.append(half(**cast).logits[:, -1].float().log_softmax(-1))
    expected = float((logits[0].exp() * (logits[0] - logits[1])).sum())
    assert ranking.scores[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("offloaded", ["model.vision_tower", "model.language_model.layers.2"])
def test_device_map(model, batch, tmp_path, offloaded):
    """A model whose parts lie on several devices; here one part waits on the disk."""
    model.save_pretrained(tmp_path / "repo")
    device_map = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "cpu",
        **{f"model.language_model.layers.{i}": "cpu" for i in range(N_LAYERS)},
        offloaded: "disk",
    }
    parts = type(model).from_pretrained(
        tmp_path / "repo", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    assert any(p.device.type == "meta" for p in parts.parameters())
    for metric in ("lc", "cosine"):
        expected, ranking = rank_layers(model, [batch], metric), rank_layers(parts, [batch], metric)
        torch.testing.assert_close(torch.tensor(ranking.sample_scores), torch.tensor(expected.sample_scores), **CLOSE)
    assert joint_kl(parts, batch, [0, 2]) == pytest.approx(joint_kl(model, batch, [0, 2]), abs=1e-6)


# --------------------------------------------------------------------------------------------------------- the cost


def count(function):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it cannot see fused CPU attention
        function()
    return counter.get_total_flops()


def test_cost_of_a_ranking():
    """At most 0.56 x (L + 1) dense passes at L = 32, vision tower included."""
    model = make_model(text="deep")
    inputs = make_inputs(model, ["tttIttt"])
    with torch.no_grad():
        dense = count(lambda: model.model(**inputs, use_cache=False))
    ranking = count(lambda: rank_layers(model, [inputs]))
    assert ranking <= 0.56 * 33 * dense, ranking / dense / 33


def test_memory_does_not_grow_with_the_samples(model):
    """Samples are taken one after another from an iterator and not kept."""
    yielded, alive = [], []

    def samples():
        inputs = make_inputs(model, ["tIt"])
        for _ in range(5):
            alive.append(sum(reference() is not None for reference in yielded))
            ids = inputs["input_ids"].clone()
            yielded.append(weakref.ref(ids))
            yield {**inputs, "input_ids": ids}
            del ids

    assert len(rank_layers(model, samples()).sample_scores) == 5
    assert max(alive) <= 1, alive


# ------------------------------------------------------------------------------------------------------- choosing N


def test_choose_by_flops(model, batch):
    ranking = rank_layers(model, [batch])
    for ratio in (1.0, 0.8, 0.5):
        n = choose_by_flops(ranking, model.config, ratio)
        ratios = [flops_ratio(ranking.text_tokens, ranking.visual_tokens, model.config, N=i) for i in range(5)]
        assert ratios[n] <= ratio and all(value > ratio for value in ratios[:n])
    with pytest.raises(ValueError, match=r"0\.1 .*all 4 layers"):
        choose_by_flops(ranking, model.config, 0.1)
    with pytest.raises(ValueError, match="random"):
        choose_by_flops(rank_layers(model, None, "random"), model.config, 0.5)


def test_choose_by_kl(model, batch):
    ranking = rank_layers(model, [batch])
    costs = measure_costs(model, [batch], ranking, range(N_LAYERS + 1))
    curve = [cost.kl for cost in costs]
    assert [cost.num_layers for cost in costs] == list(range(N_LAYERS + 1))
    for n, expected in enumerate(curve):
        assert joint_kl(model, batch, ranking.order[:n]) == pytest.approx(expected, abs=1e-7)
    for limit in (0, max(curve), sorted(curve)[2]):
        n = choose_by_kl(costs, limit)
        assert n == 0 or curve[n] <= limit
        assert all(value > limit for value in curve[n + 1 :])
    assert choose_by_kl(costs, -1) == 0


def test_costs_have_standard_errors(model):
    """Of the mean over rows, whichever batches they come in."""
    ranking = rank_layers(model, None, "random")
    rows = [make_inputs(model, [row], seed=seed) for seed, row in enumerate(("tIt", "ttIt", "tItt"))]
    values = torch.tensor([joint_kl(model, row, ranking.layers(3)) for row in rows], dtype=torch.float64)
    (cost,) = measure_costs(model, rows, ranking, [3])
    assert cost.kl == pytest.approx(values.mean().item(), rel=1e-6)
    assert cost.kl_error == pytest.approx(values.std().item() / 3**0.5, rel=1e-4) and cost.kl_error > 0
    assert measure_costs(model, rows[:1], ranking, [3])[0].kl_error == 0 and cost.flops_ratio is None


def test_kl_of_rows_is_that_of_each_alone(model):
    rows = [make_inputs(model, [row], seed=seed) for seed, row in enumerate(("tIt", "ttIt"))]
    settings = [Settings([0, 2]), Settings([1], {"method": "vtw", "k": 2})]
    together = kl_to_dense(model, rows, settings)
    assert together.shape == (2, 2) and together.dtype == torch.float64
    for number, row in enumerate(rows):
        torch.testing.assert_close(together[:, number : number + 1], kl_to_dense(model, [row], settings))


# -------------------------------------------------------------------------------------------------------- calibrating


@pytest.mark.parametrize("budget", [None, {"num_layers": 2}, {"flops_ratio": 0.7}, {"max_kl": 0.05}])
def test_calibrate(batch, budget):
    """What it chooses is what the parts choose one by one; the model stays as it was."""
    model, seen = make_model(shortv_layers=[1]), []
    found = calibrate(
        model,
        [batch],
        budget and Budget(**budget),
        text=True,
        on_scores=lambda found: seen.append((found.ranking, found.text_scores)),
    )
    assert found.ranking == rank_layers(model, [batch])
    assert seen == [(found.ranking, None), (found.ranking, found.text_scores)]
    assert found.text_scores == rank_layers(model, [batch], tokens="text").scores
    assert model.config.shortv_layers == [1]
    costs = measure_costs(model, [batch], found.ranking, range(N_LAYERS + 1))
    assert found.costs == ([] if budget and "max_kl" not in budget else costs)
    if budget is None:
        assert found.layers is None and found.cost is None
        return
    n = {
        "num_layers": lambda: 2,
        "flops_ratio": lambda: choose_by_flops(found.ranking, model.config, 0.7),
        "max_kl": lambda: choose_by_kl(costs, 0.05),
    }[next(iter(budget))]()
    assert 0 < n < N_LAYERS and found.layers == found.ranking.order[:n]
    assert found.cost.num_layers == n and found.cost.kl == pytest.approx(costs[n].kl, abs=1e-9)


def test_samples_that_come_once(model, batch):
    once = calibrate(model, iter([batch]), Budget(max_kl=0.05))
    assert once == calibrate(model, [batch], Budget(max_kl=0.05))


def test_budgets_are_checked_before_any_pass():
    with pytest.raises(ValueError, match="exactly one"):
        Budget(num_layers=2, max_kl=0.1)
    model = make_model()
    for budget in (Budget(num_layers=5), Budget(flops_ratio=1.5), Budget(max_kl=-1)):
        with pytest.raises(ValueError, match="5|1.5|-1"):
            calibrate(model, None, budget)
    with pytest.raises(ValueError, match="a random ranking has no samples"):
        calibrate(model, None, Budget(flops_ratio=0.7), metric="random")
    random_ranking = calibrate(model, None, metric="random")
    assert random_ranking.costs == [] and random_ranking.text_scores is None


# ------------------------------------------------------------------------------------------------- LayerRanking, input


def test_round_trip_and_apply(model, batch, tmp_path):
    ranking = rank_layers(model, [batch], data="made up", kl="reverse")
    ranking.save(tmp_path / "lc.json")
    loaded = LayerRanking.load(tmp_path / "lc.json")
    assert loaded == ranking
    assert loaded.data["name"] == "made up" and loaded.data["samples"] == 3 and len(loaded.data["sha256"]) == 64
    assert loaded.model["num_hidden_layers"] == N_LAYERS and {"torch", "transformers"} <= set(loaded.versions)
    other = make_model()
    loaded.apply(other, 2)
    assert other.config.shortv_layers == ranking.order[:2]
    with pytest.raises(ValueError, match="5"):
        loaded.apply(other, 5)
    with pytest.raises(ValueError, match="4 layers.*32"):
        loaded.apply(make_model(text="deep"), 2)


def test_data_identity(model, batch):
    same = rank_layers(model, [batch]).data["sha256"] == rank_layers(model, [dict(batch)]).data["sha256"]
    changed = {**batch, "pixel_values": batch["pixel_values"] + 1}
    assert same and rank_layers(model, [batch]).data["sha256"] != rank_layers(model, [changed]).data["sha256"]


@pytest.mark.parametrize("content", ["{}", "[1]", "no json", '{"scores": [1], "order": [1]}'])
def test_load_refuses_other_files(tmp_path, content):
    file = tmp_path / "lc.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="lc.json"):
        LayerRanking.load(file)


def test_bad_input(model, batch):
    for arguments in ({"metric": "norm"}, {"tokens": "image"}, {"kl": "both"}):
        with pytest.raises(ValueError, match="|".join(arguments.values())):
            rank_layers(model, [batch], **arguments)
    for metric in ("lc", "greedy", "cosine"):
        with pytest.raises(ValueError, match="no samples"):
            rank_layers(model, [], metric)
    with pytest.raises(ValueError, match="no sample holds visual tokens"):
        rank_layers(model, [make_inputs(model, ["ttt"])])
    with pytest.raises(ValueError, match="does not go with freezing text tokens"):
        joint_kl(model, batch, [1], tokens="text", visual_reduction={"method": "vtw", "k": 2})
    reduced = make_model(visual_reduction={"method": "vtw", "k": 2})
    with pytest.raises(ValueError, match="does not go with freezing all tokens"), frozen_tokens(reduced, [1], "all"):
        pass
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration cannot freeze"):
        rank_layers(make_stock(model), [batch])
    with pytest.raises(ValueError, match="visual_mask"):
        rank_layers(model, [{"inputs_embeds": torch.zeros(1, 3, 32)}])
    with pytest.raises(ValueError, match="not a permutation"):
        LayerRanking([0.0, 1.0], [0, 0], "lc", "visual", "forward", 0)


class TestHalves:
    """Layer Contribution of what each half of a layer does to visual tokens."""

    PARTS = ("layer", "mlp", "self_attn")

    @pytest.fixture(scope="class")
    @staticmethod
    def ranked():
        model = make_model()
        samples = [make_inputs(model, ["ttItt", "tttttI"][:1], seed=i) for i in range(2)]
        return model, samples, rank_layers(model, samples, parts=TestHalves.PARTS, layers_per_batch=3)

    def test_scores_are_those_of_single_passes(self, ranked):
        model, samples, ranking = ranked
        entries = [*range(4), *(f"{i}.{part}" for part in self.PARTS[1:] for i in range(4))]
        assert ranking.entries == entries and len(ranking.scores) == 12
        expected = kl_to_dense(model, samples, [Settings([entry]) for entry in entries]).mean(1)
        for entry, value in zip(entries, expected.tolist(), strict=True):
            assert ranking.score(entry) == pytest.approx(value, rel=1e-3, abs=1e-7), entry
        assert [ranking.score(entry) for entry in (3, "3.mlp", "3.self_attn")] == [0, 0, 0]
        assert [ranking.score(entry) for entry in ranking.order] == sorted(ranking.scores)
        whole = rank_layers(model, samples)
        assert ranking.scores[:4] == pytest.approx(whole.scores, rel=1e-4, abs=1e-8) and whole.entries is None

    def test_what_is_named_already_is_passed_over(self, ranked, tmp_path):
        model, _, ranking = ranked
        ranking.save(tmp_path / "lc.json")
        loaded = LayerRanking.load(tmp_path / "lc.json")
        assert loaded == ranking and loaded.num_hidden_layers == 4
        for n in range(1, 5):
            loaded.apply(model, n)
            assert model.config.shortv_layers == ranking.layers(n)  # and the config takes them
        model.set_shortv_layers([])
        order = ["1.mlp", 1, 0, "0.mlp", "1.self_attn", "0.self_attn"]
        some = LayerRanking([0.0] * 6, order, "lc", "visual", "forward", 0, entries=order)
        assert some.layers(3) == ["1.mlp", 0, "1.self_attn"]
        with pytest.raises(ValueError, match="the ranking has 3"):
            some.layers(4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"parts": ("ffn",)}, "parts is .*ffn.*layer, self_attn, mlp"),
            ({"parts": ()}, "parts is"),
            ({"parts": "mlp"}, "parts is"),
            ({"parts": ("mlp",), "metric": "greedy"}, "not by greedy of visual"),
            ({"parts": ("mlp",), "tokens": "all"}, "not by lc of all"),
        ],
    )
    def test_what_cannot_be_ranked(self, ranked, options, message):
        model, samples, _ = ranked
        with pytest.raises(ValueError, match=message):
            rank_layers(model, samples, **options)
