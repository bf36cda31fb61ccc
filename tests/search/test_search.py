"""What a search measures, chooses and keeps, on tiny models."""

import json
from itertools import product

import families
import pytest
import torch
from helpers import make_inputs, make_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shortv_hf.configuration_shortv import frozen_updates
from shortv_hf.flops import flops_ratio
from shortv_hf.layer_contribution.kl import Settings, kl_to_dense
from shortv_hf.search import SearchOptions, SearchResult, search
from shortv_hf.search import run as running
from shortv_hf.search.choose import Prompt, Schedules, key_of
from shortv_hf.search.passes import isolated, joint
from shortv_hf.search.result import Row, choose
from shortv_hf.search.space import PARTS, TOKEN_METHODS, Space


CLOSE = {"abs": 3e-6, "rel": 1e-3}
FAMILIES = ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "gemma3"]


def kl_of(model, samples, settings) -> list[float]:
    return kl_to_dense(model, samples, [settings])[0].tolist()


@pytest.fixture
def model():
    return make_model(shortv_layers=[1], visual_reduction={"method": "fastv", "k": 2})


@pytest.fixture
def samples(model):
    return [make_inputs(model, ["ttIttt"], seed=seed) for seed in range(5)]


@pytest.fixture(scope="module", params=FAMILIES)
def of_family(request):
    stock = families.build(request.param)
    return families.shortv_of(stock, []), families.make_inputs(request.param, ["tIttt"])


class TestPasses:
    def test_everything_alone_equals_its_own_pass(self, of_family):
        model, sample = of_family
        space = Space.of(model.config, PARTS, int((families.visual_mask(sample)).sum()))
        found = isolated(model, sample, space, "forward", 3)
        reductions = [{"method": "vtw", "k": k} for k in space.tails] + list(space.reductions)
        assert len(space.entries) == 3 * families.N_LAYERS and space.tails and space.reductions
        for entry, value in zip(space.entries, found["entries"], strict=True):
            assert value == pytest.approx(kl_of(model, [sample], Settings([entry]))[0], **CLOSE), entry
        for reduction, value in zip(reductions, [*found["tails"], *found["reductions"]], strict=True):
            assert value == pytest.approx(kl_of(model, [sample], Settings((), reduction))[0], **CLOSE), reduction

    def test_together(self, of_family):
        model, sample = of_family
        v = int(families.visual_mask(sample).sum())
        tail = {"method": "vtw", "k": families.N_LAYERS - 1}
        some = {"method": "fastv", "k": families.N_LAYERS - 1, "ratio": 0.5}
        settings = [Settings([0, "1.mlp"], tail), Settings((), some), Settings([2])]
        found = joint(model, sample, settings, "reverse")
        for each, value in zip(settings, found["kl"], strict=True):
            expected = kl_to_dense(model, [sample], [each], "reverse")[0].item()
            assert value == pytest.approx(expected, **CLOSE)
        counts = [v] * (families.N_LAYERS - 1)
        assert found["left"] == [[*counts, 0], [*counts, round(v / 2)], [*counts, v]] and found["visual"] == v

    def test_text_costs_nothing(self, model):
        space = Space(("0.mlp", 1), (2,), ({"method": "fastv", "k": 2, "ratio": 0.5},))
        found = isolated(model, make_inputs(model, ["tttt"]), space, "forward", 4)
        values = [*found["entries"], *found["tails"], *found["reductions"]]
        assert values == pytest.approx([0] * 4, abs=1e-6) and found["left"] == [[0] * 4]

    def test_at_most_62_passes_for_32_layers(self, monkeypatch):
        """Three parts: what each change alone costs, what the schedules and the methods alone cost, in dense passes."""
        model = make_model(text="deep")
        monkeypatch.setattr(running, "possible_methods", lambda *_: TOKEN_METHODS)  # asked once, not for every sample
        samples = [make_inputs(model, ["ttIttt"], seed=seed) for seed in range(2)]

        def count(function):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                function()
            return counter.get_total_flops()

        with torch.no_grad():
            dense = count(lambda: model.model(**samples[0], use_cache=False))
        options = SearchOptions(max_kl=0.01, parts=("layer", "mlp", "tail"))
        both_halves = count(lambda: search(model, samples, options))
        assert 40 * dense <= both_halves <= 62 * dense, both_halves / dense


class TestChoosing:
    @pytest.fixture
    def schedules(self, model):
        left = {
            key_of(each): [1, 1, share, share] for each, share in ((self.fastv(0.5), 0.5), (self.fastv(0.75), 0.25))
        }
        prompt = Prompt(model.config, 5, 16, left)
        space = Space(("0.mlp", "1.mlp", "2.mlp", "3.mlp", 0, 1, 2, 3), (1, 2, 3), (self.fastv(0.5), self.fastv(0.75)))
        alone = {
            "entries": [0.5, 0.02, 0.01, 1e-5, 0.9, 0.05, 0.011, 0.0],
            "tails": [2.0, 0.3, 0.02],
            "reductions": [0.2, 0.4],
        }
        return Schedules(space, alone, prompt)

    @staticmethod
    def fastv(ratio):
        return {"method": "fastv", "k": 2, "ratio": ratio}

    def test_flops_are_the_equations(self, model, schedules):
        settings = [
            Settings([0, "3.mlp", "2.self_attn"]),
            Settings([1], {"method": "vtw", "k": 3}),
            Settings([3], self.fastv(0.5)),
        ]
        for each in settings:
            expected = flops_ratio(
                5, 16, model.config, shortv_layers=each.shortv_layers, visual_reduction=each.visual_reduction
            )
            assert schedules.prompt.flops_ratio(each) == pytest.approx(expected)

    def test_cache(self, schedules):
        cache = schedules.prompt.cache_ratio
        assert cache(Settings([0, 1])) == 1
        assert cache(Settings((), {"method": "vtw", "k": 1})) == pytest.approx((21 + 3 * 5) / (4 * 21))
        assert cache(Settings((), self.fastv(0.5))) == pytest.approx((2 * 21 + 2 * 13) / (4 * 21))

    @pytest.mark.parametrize("level", [0.95, 0.8, 0.6, 0.45, 0.35, 0.2])
    def test_equals_trying_everything(self, schedules, level):
        """Every combination of what a layer can do, with every reduction."""
        kl, prompt = schedules.kl, schedules.prompt
        cheapest = {}
        for reduction, own, *_ in schedules.reductions:
            for chosen in product(*((None, f"{layer}.mlp", layer) for layer in range(4))):
                entries = [entry for entry in chosen if entry is not None]
                if prompt.flops_ratio(Settings(entries, reduction)) <= level:
                    total = own + sum(kl[entry] for entry in entries)
                    cheapest[key_of(reduction)] = min(total, cheapest.get(key_of(reduction), torch.inf))
        found = schedules.within(level)
        assert {key_of(each.settings.visual_reduction) for each in found} == set(cheapest)
        assert [each.predicted_kl for each in found] == sorted(each.predicted_kl for each in found)
        for each in found:
            reduction = each.settings.visual_reduction
            assert prompt.flops_ratio(each.settings) <= level + 1e-9
            # At a layer that sees nothing, or whose update nobody reads, freezing is free and not listed.
            assert each.predicted_kl <= cheapest[key_of(reduction)] + 1e-9
            if reduction is None or reduction["method"] != "vtw":
                assert each.predicted_kl == pytest.approx(cheapest[key_of(reduction)])
            attention, ffn = frozen_updates(each.settings.shortv_layers)  # none twice
            if reduction is not None and reduction["method"] == "vtw":
                assert max(attention | ffn, default=0) < reduction["k"] - 1 or not attention | ffn
            ordered = [kl[entry] for entry in each.settings.shortv_layers]
            assert ordered == sorted(ordered)

    def test_finalists(self, schedules):
        near = schedules.finalists(10, max_kl=0.05)
        assert len(near) == len({str(each.settings) for each in near}) <= 10
        assert any(0.01 <= each.predicted_kl <= 0.075 for each in near)
        at = schedules.finalists(10, flops_ratio=0.5)
        reductions = {
            key_of(each.settings.visual_reduction) for each in at if schedules.prompt.flops_ratio(each.settings) <= 0.5
        }
        assert len(reductions) >= 3  # at the budget, with several methods
        assert all(each.predicted_kl <= 1 for each in near)

    def test_choice(self):
        rows = [row(0.3, 0.02), row(0.4, 0.009), row(0.5, 0.011), row(0.6, 0.001)]
        assert choose(rows, max_kl=0.01) == 1 and choose(rows, max_kl=0.0) is None
        assert choose(rows, flops_ratio=0.5) == 1 and choose(rows, flops_ratio=0.35) == 0
        assert choose(rows, flops_ratio=0.2) is None and choose(rows) is None

    def test_of_ties_the_other_half_chooses(self):
        rows = [row(0.3, 2.0, [0.0, 4.0], 0.5), row(0.4, 1.9, [1.9, 1.9], 0.7), row(0.45, 3.0, [3.0, 3.0], 0.1)]
        assert rows[0].is_tied_with(rows[1]) and not rows[2].is_tied_with(rows[1])
        assert choose(rows, flops_ratio=0.5) == 0  # the lowest is the second, and the first promised less
        assert choose(rows[1:], flops_ratio=0.5) == 0


def row(flops, kl, sample_kl=None, predicted=0.0) -> Row:
    return Row("search", [0], None, flops, 1.0, kl, 0.0, sample_kl or [kl], predicted)


def test_ties_are_of_differences_on_the_same_samples():
    one, other = row(0.3, 2.0, [1.0, 3.0, 2.0]), row(0.4, 2.1, [1.1, 3.1, 2.1])
    assert not one.is_tied_with(other)  # each sample says the same
    assert one.is_tied_with(row(0.4, 2.1, [0.0, 4.3, 2.0]))
    result = SearchResult([one, other, row(0.5, 0.5, [0.5] * 3)], [], 1, {}, {}, 1, 1, [], "forward", {}, {}, {})
    assert result.frontier == [one, result.rows[2]] and result.ties == []


class TestSearch:
    @pytest.mark.parametrize("budget", [{}, {"max_kl": 0.05}, {"flops_ratio": 0.5}], ids=["none", "kl", "flops"])
    def test_one_half_chooses_and_the_other_judges(self, model, samples, budget):
        before = model.settings
        result = search(model, samples, SearchOptions(**budget, finalists=6), data="pictures")
        assert model.settings == before
        assert result.samples == {"choosing": 3, "judging": 2} and result.data["name"] == "pictures"
        judges, choosers = samples[1::2], samples[0::2]
        for each in result.rows + result.baselines:
            assert each.sample_kl == pytest.approx(kl_of(model, judges, each.settings), **CLOSE)
            assert each.kl == pytest.approx(sum(each.sample_kl) / 2)
        for entry, kl in result.alone["entries"]:
            values = kl_of(model, choosers, Settings([entry]))
            assert kl == pytest.approx(sum(values) / 3, **CLOSE)
        assert {"LC", "VTW", "fastv", "random", "downsample"} == {each.name for each in result.baselines}
        assert (result.best is None) == (not budget)
        if "max_kl" in budget:
            assert result.best.kl <= 0.05
            assert all(each.flops_ratio >= result.best.flops_ratio for each in result.rows if each.kl <= 0.05)
        if "flops_ratio" in budget:
            assert result.best.flops_ratio <= 0.5
        shares = [each.flops_ratio for each in result.rows]
        assert shares == sorted(shares)

    def test_goes_on_where_it_was(self, model, samples, tmp_path, monkeypatch):
        options = SearchOptions(max_kl=0.05, finalists=6)
        whole = search(model, samples, options)
        measured = []

        def failing(at):
            def joint_or_not(*args):
                measured.append(1)
                if len(measured) == at:
                    raise KeyboardInterrupt
                return joint(*args)

            return joint_or_not

        monkeypatch.setattr(running, "joint", failing(2))
        with pytest.raises(KeyboardInterrupt):
            search(model, samples, options, progress=tmp_path)
        (tmp_path / "judging.0.jsonl").open("a").write('{"seal": "half a li')
        monkeypatch.setattr(running, "isolated", None)  # nothing is left to do alone
        monkeypatch.setattr(running, "joint", failing(-1))
        assert search(model, samples, options, progress=tmp_path) == whole
        assert len(measured) == 3  # one of the two was there
        assert search(model, samples, options, progress=tmp_path) == whole and len(measured) == 3
        # Another budget asks for other schedules, and for those only: the others are known.
        monkeypatch.setattr(
            running,
            "joint",
            lambda model, sample, settings, kl: asked.append(len(settings)) or joint(model, sample, settings, kl),
        )
        asked = []
        other = search(model, samples, SearchOptions(flops_ratio=0.4, finalists=6), progress=tmp_path)
        assert other.alone == whole.alone
        assert len(asked) == 2 and all(0 < number < len(other.rows) for number in asked)

    def test_text_is_left_out(self, model, samples):
        """A half of it would have nothing to judge by."""
        mixed = [each for sample in samples for each in (sample, make_inputs(model, ["tttttttt"]))]
        options = SearchOptions(max_kl=0.05, finalists=4)
        assert search(model, mixed, options) == search(model, samples, options)

    def test_shares_are_of_all_tokens(self, model):
        """Prompts of one and of three pictures: what is left is counted, not the mean of shares."""
        rows = ["tIt", "tIItIt"] * 2
        result = search(model, [make_inputs(model, [row]) for row in rows], SearchOptions(finalists=4))
        v, t = (16 + 48) / 2, (2 + 3) / 2
        for each in result.baselines:
            if each.name == "downsample":
                assert each.cache_ratio == pytest.approx((t + v / each.visual_reduction["factor"] ** 2) / (t + v))

    def test_a_budget_beyond_what_is_usual(self, model, samples):
        """Of random weights everything costs much; a budget in FLOPs or in nats is met all the same."""
        options = SearchOptions(flops_ratio=0.45, parts=("layer",), finalists=4)
        assert search(model, samples, options).best.flops_ratio <= 0.45
        assert search(model, samples, SearchOptions(max_kl=1e3, finalists=4)).best is not None

    @pytest.mark.parametrize("changed", ["weights", "samples", "direction"])
    def test_what_was_measured_of_something_else_does_not_count(self, model, samples, tmp_path, changed):
        search(model, samples, SearchOptions(finalists=4), progress=tmp_path)
        options = SearchOptions(finalists=4, kl="reverse" if changed == "direction" else "forward")
        if changed == "weights":
            with torch.no_grad():
                model.lm_head.weight[0, 0] += 3
        if changed == "samples":
            samples = samples[::-1]
        assert search(model, samples, options, progress=tmp_path) == search(model, samples, options)

    def test_round_trip(self, model, samples, tmp_path):
        result = search(model, iter(samples), SearchOptions(max_kl=0.05, finalists=4))
        result.save(tmp_path / "search.json")
        assert SearchResult.load(tmp_path / "search.json") == result
        config = make_model(
            shortv_layers=result.best.shortv_layers, visual_reduction=result.best.visual_reduction
        ).config
        assert result.row_of(config) == result.best
        config.shortv_layers = [0, 1, 2, 3]
        with pytest.raises(
            ValueError, match=r"the config freezes layers \[0, 1, 2, 3\] with .* no row of the search does"
        ):
            result.check_layers(config)

    @pytest.mark.parametrize(
        "content", ["[1]", '{"rows": []}', "no JSON", json.dumps({"rows": [{}], "baselines": []})]
    )
    def test_load_refuses_other_files(self, tmp_path, content):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=r"x\.json"):
            SearchResult.load(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kl": 0.1, "flops_ratio": 0.5}, "max_kl and flops_ratio exclude each other"),
        ({"max_kl": -0.1}, "max_kl is -0.1; a KL divergence is 0 or more"),
        ({"max_kl": float("nan")}, "max_kl is nan"),
        ({"flops_ratio": 0.0}, "flops_ratio is 0.0; the valid range is above 0 up to 1"),
        ({"flops_ratio": 1.2}, "flops_ratio is 1.2"),
        ({"parts": ("layer", "ffn")}, "parts is .*; it takes some of layer, self_attn, mlp, tail, tokens, each once"),
        ({"parts": ("layer", "layer")}, "parts is"),
        ({"parts": ()}, "parts is"),
        ({"parts": "layer"}, "parts is 'layer'"),
        ({"kl": "both"}, "unknown kl 'both'"),
        ({"finalists": 1}, "finalists is 1; the least is 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SearchOptions(**options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["tIt"]], "a search needs 2 samples with visual tokens or more, .* got 1"),
        ([["ttt"], ["tt"]], "a search needs 2 samples with visual tokens or more, .* got 0"),
        ([["ttt"], ["tIt"], ["tt"]], "got 1"),
        ([["tIt", "Ittt"]] * 2, "a search takes samples of one row each, not batches of 2"),
    ],
)
def test_bad_samples(model, rows, message):
    with pytest.raises(ValueError, match=message):
        search(model, [make_inputs(model, each) for each in rows])


def test_stock_model(samples):
    with pytest.raises(ValueError, match="call shortv_hf.apply_shortv"):
        search(families.build("llava"), samples)
