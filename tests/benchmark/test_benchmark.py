"""The benchmark on tiny models: what it counts and computes is right, and every method and mode runs. No time is judged."""

import itertools
import json
import sys
import warnings

import pytest
import torch
from helpers import N_LAYERS, make_config
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shortv_hf.benchmark import report as reports
from shortv_hf.benchmark import run as benchmark
from shortv_hf.benchmark import subjects as benchmark_models
from shortv_hf.benchmark.run import BenchmarkOptions, run_benchmark
from shortv_hf.benchmark.subjects import FASTV, SUBJECTS, Method, Subject, build_models, choose_methods, make_inputs
from shortv_hf.flops import layer_flops, prefill_flops, roofline
from shortv_hf.flops.meters import LiveTensorBytes, profile_prefill, time_prefill
from shortv_hf.flops.roofline import Peak, device_peak, layer_parts, prefill_seconds
from shortv_hf.hub.paper import PAPER_MODELS


CPU, T = torch.device("cpu"), 40
FAMILIES = {"llava": 16, "llava_next": 16 + 64 + 8}  # visual tokens of one image


def tiny(family="llava"):
    return Subject(make_config(family, shortv_layers=[3, 1]), swept=(1, 3), vtw_layer=2)


@pytest.fixture
def subjects(monkeypatch):
    monkeypatch.setitem(SUBJECTS, "tiny", tiny)
    monkeypatch.setitem(SUBJECTS, "tiny-next", lambda: tiny("llava_next"))


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    torch.manual_seed(0)
    return build_models(tiny(request.param).config, CPU, torch.float32)


def invoke(*arguments):
    """`shortv bench`; what it raises is raised."""
    typer_testing = pytest.importorskip("typer.testing")
    from shortv_hf import cli

    given = ["bench", *map(str, arguments)]
    return typer_testing.CliRunner().invoke(cli.app, given, catch_exceptions=False, standalone_mode=False)


def run(tmp_path, *arguments):
    """The report of `shortv bench`, and what it printed."""
    (tmp_path / "out").mkdir()
    result = invoke("--text-tokens", T, "--repeats", 2, *arguments, "--output", tmp_path / "out" / "r.json")
    return json.loads((tmp_path / "out" / "r.json").read_text()), result


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method(subjects, tmp_path, family):
    name = {"llava": "tiny", "llava_next": "tiny-next"}[family]
    report, result = run(tmp_path, "--models", name, "--images", 2, "--batch", "1,2")
    rows, skipped = report["results"], report["skipped"]
    names = {"stock", "ShortV N=1", "ShortV N=2", "ShortV N=3", "FastV", "VTW", "ShortV N=2 + FastV"}
    assert {row["method"] for row in rows} | {each["method"] for each in skipped} == names
    assert {each["method"] for each in skipped} <= {"FastV", "VTW", "ShortV N=2 + FastV"}  # not in every version
    assert all("visual_reduction" in each["reason"] for each in skipped)
    assert len(rows) + len(skipped) == 2 * len(names)
    for row in rows:
        assert (row["text_tokens"], row["visual_tokens"], row["mode"]) == (T, 2 * FAMILIES[family], "eager")
        assert row["language_model_flops"] < row["flops"] and row["peak_memory_bytes"] > 0
        for stage in reports.STAGES:
            low, high = row[stage]["quartiles_s"]
            assert 0 < low <= row[stage]["median_s"] <= high
        if row["method"] == "stock":
            assert row["shortv_layers"] is None and all(row[stage]["speed_up"] == 1 for stage in reports.STAGES)
            assert row["language_model"]["bound"] == row["language_model"]["roofline_bound"] == 1
        else:
            assert row["language_model"]["bound"] > row["time_to_first_token"]["bound"] > 1
        if row["visual_reduction"] is None:
            per_row = prefill_flops(T, row["visual_tokens"], tiny(family).config, N=len(row["shortv_layers"] or ()))
            assert row["language_model_flops"] == pytest.approx(row["batch"] * per_row, rel=0.01)
    for name in ("device", "threads", "dtype", "torch", "transformers", "command", "compiled", "peak_source"):
        assert name in report["conditions"]
    printed = result.stdout
    assert printed.strip() == (tmp_path / "out" / "r.md").read_text().strip()
    assert printed.count("\n| tiny") == len(rows) and printed.count("- skipped") == len(skipped)
    Image.open(tmp_path / "out" / "r.png").verify()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(subjects, monkeypatch, tmp_path, dynamic):
    monkeypatch.setitem(benchmark.COMPILED, "cpu", {"backend": "eager", "dynamic": False})
    monkeypatch.setattr(benchmark, "DYNAMIC", {"backend": "eager", "dynamic": True})
    options, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: options.append(given["dynamic"]) or compile_(f, **given))
    given = ["--compile", "some", *(["--dynamic"] if dynamic else []), "--images", "1,2"]
    report, _ = run(tmp_path, "--models", "tiny", "--methods", "shortv", "--num-layers", "1,2", *given)
    assert options == (
        [True] * 4 if dynamic else [False] * 8
    )  # text model and tower of both classes; again per prompt
    modes = [(row["method"], row["mode"]) for row in report["results"]]
    assert modes == 2 * [
        ("stock", "eager"), ("ShortV N=1", "eager"), ("ShortV N=2", "eager"), ("stock", "compiled"),
        ("ShortV N=2", "compiled"),
    ]  # fmt: skip
    for row in report["results"]:
        assert ("output_token" in row) == (row["mode"] == "eager")
    assert report["conditions"]["compiled"] == {"backend": "eager", "dynamic": dynamic, "methods": "some"}


def test_compiled_model_computes_the_same(monkeypatch):
    monkeypatch.setitem(benchmark.COMPILED, "cpu", {"backend": "eager"})
    torch.manual_seed(0)
    bench = benchmark.Bench(tiny(), CPU, torch.float32)
    inputs = make_inputs(bench.stock, T, 1, 2)
    for method in (Method("a", (3, 1)), Method("b", (2,))):
        logits = []
        for mode in ("eager", "compiled"):
            with bench.running(benchmark.Variant(method, mode)) as model, torch.inference_mode():
                assert tuple(model.config.shortv_layers) == method.shortv_layers
                logits.append(model(**inputs, logits_to_keep=1).logits)
        torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    assert "forward" not in vars(bench.shortv.model.language_model)


def test_what_fails_is_skipped(subjects, monkeypatch, tmp_path):
    def compiling_fails(*_, **__):
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiling_fails)
    given = ["--models", "tiny", "--methods", "shortv", "--num-layers", 2, "--compile", "all"]
    report, result = run(tmp_path, *given)
    assert [row["mode"] for row in report["results"]] == ["eager", "eager"]
    assert [(each["method"], each["mode"]) for each in report["skipped"]] == [
        ("stock", "compiled"), ("ShortV N=2", "compiled"),
    ]  # fmt: skip
    assert "skipped stock, compiled: TorchDynamoException: no compiler" in result.stderr


def test_without_a_baseline(subjects, monkeypatch, tmp_path):
    time_once = benchmark.Bench._time_once

    def stock_fails(bench, variant, *args):
        if variant.method.name == "stock":
            raise AssertionError("a broken graph")
        return time_once(bench, variant, *args)

    monkeypatch.setattr(benchmark.Bench, "_time_once", stock_fails)
    report, _ = run(tmp_path, "--models", "tiny", "--methods", "shortv", "--num-layers", 2)
    assert report["results"] == []
    assert [(each["method"], each["reason"]) for each in report["skipped"]] == [
        ("stock", "AssertionError: a broken graph"), ("ShortV N=2", "the stock class could not be measured"),
    ]  # fmt: skip


def test_stages_of_a_prefill(models):
    stock, shortv = models
    with torch.no_grad():
        seconds, cache = time_prefill(shortv, make_inputs(stock, T, 1, 1))
    assert 0 < seconds["language_model"] < seconds["prefill"] < seconds["time_to_first_token"]
    assert cache.get_seq_length() > T


def test_without_timing(subjects, tmp_path):
    report, _ = run(tmp_path, "--models", "tiny", "--methods", "shortv", "--images", "4,8,16", "--repeats", 0)
    assert all("prefill" not in row and row["peak_memory_bytes"] > 0 for row in report["results"])
    assert all(0 < row["largest_tensor_bytes"] < row["peak_memory_bytes"] for row in report["results"])
    peaks = {
        name: [row["peak_memory_bytes"] for row in report["results"] if row["method"] == name]
        for name in ("stock", "ShortV N=3")
    }
    for small, middle, large in peaks.values():  # linear in v: no [S, S] mask, no attention matrix
        assert (large - middle) / (middle - small) == pytest.approx(2, rel=0.05)
    assert not (tmp_path / "out" / "r.png").exists()


def test_loading(subjects, tmp_path):
    report, _ = run(tmp_path, "--models", "tiny", "--methods", "shortv", "--num-layers", 1, "--loading")
    (loading,) = report["loading"]
    assert loading["model"] == "tiny" and [len(loading[name]) for name in ("stock", "shortv")] == [2, 2]
    assert "loading tiny: stock" in (tmp_path / "out" / "r.md").read_text()


def test_models_share_weights(models):
    stock, shortv = models
    ours = dict(shortv.named_parameters())
    assert all(ours[name].data_ptr() == weight.data_ptr() for name, weight in stock.named_parameters())
    assert type(stock).__name__ == type(shortv).__name__.removeprefix("ShortV")
    inputs = make_inputs(stock, T, 1, 2)
    start = benchmark_models.TEXT_BEFORE_IMAGE
    image = inputs["input_ids"] == stock.config.image_token_id
    assert image.sum(1).tolist() == 2 * [inputs["input_ids"].shape[1] - T] and image[:, start].all()
    shortv.set_shortv_layers([])
    with torch.no_grad():
        torch.testing.assert_close(shortv(**inputs).logits, stock(**inputs).logits, atol=0, rtol=0)


@pytest.mark.parametrize("layers", [[], [3, 1], [0, 1, 2, 3]], ids=len)
def test_counted_flops(models, layers):
    """With the fused kernel as with the decomposed one, and equal to the formula."""
    stock, shortv = models
    inputs = make_inputs(stock, T, 2, 1)
    v = int((inputs["input_ids"] == stock.config.image_token_id).sum())
    shortv.set_shortv_layers(layers)
    profile = profile_prefill(shortv, inputs)
    assert profile["language_model_flops"] == pytest.approx(prefill_flops(T, v, shortv.config), rel=0.01)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        shortv(**inputs, logits_to_keep=1)
    assert profile["flops"] == counter.get_total_flops()


def test_live_tensor_bytes():
    kept = torch.zeros(100)
    with LiveTensorBytes() as memory:
        a = torch.zeros(1000)  # 4000 bytes
        assert memory.live == 4000
        b = a.view(10, 100)[1:]
        kept.add_(1)
        kept.view(2, 50)
        assert memory.live == memory.peak == memory.largest == 4000
        c = a + 1
        del a
        assert memory.live == 8000  # a's storage is b's
        del b
        assert memory.live == 4000
        d = torch.empty(500)
        assert (memory.live, memory.peak) == (6000, 8000)
    del c, d
    assert (memory.live, memory.peak, memory.largest) == (0, 8000, 4000)


def test_layer_parts():
    config = make_config().text_config  # h = 32, FFN 48, 4 heads, 2 of K and V
    parts = layer_parts(3, 5, config, attention_frozen=True, ffn_frozen=True, batch=2, value_bytes=4)
    assert parts == [
        (2 * 2 * 3 * 2 * 32 * 32, 4 * 2 * 32 * 32),
        (2 * 2 * 8 * 2 * 32 * 16, 4 * 2 * 32 * 16),
        (2 * 2 * 3 * 3 * 32 * 48, 4 * 3 * 32 * 48),
        (4 * 2 * 3 * 8 * 32, 4 * 2 * 2 * 8 * 16),
    ]
    for attention, ffn in itertools.product((False, True), repeat=2):
        frozen = {"attention_frozen": attention, "ffn_frozen": ffn}
        assert sum(part[0] for part in layer_parts(3, 5, config, **frozen)) == layer_flops(3, 5, config, **frozen)


def test_roofline():
    config = make_config().text_config
    layers = [(5, False, False), (5, True, True)]
    arithmetic = prefill_seconds(layers, 3, config, Peak(1e6, 1e30, "given"))
    assert arithmetic == pytest.approx((layer_flops(3, 5, config) + layer_flops(3, 5, config, frozen=True)) / 1e6)
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    keys_and_values = 2 * (2 * 8 * 16)
    memory = prefill_seconds(layers, 3, config, Peak(1e30, 1e6, "given"))
    assert memory == pytest.approx(2 * (weights + keys_and_values) / 1e6)
    # 6 FLOPs per byte: 3 text tokens (3 FLOPs per byte) wait for the weights, 8 tokens (8 per byte) do not
    mixed = prefill_seconds([(5, True, True)], 3, config, Peak(6e6, 1e6, "given"))
    assert mixed == pytest.approx((2 * 2 * 32 * 32 + 2 * 3 * 32 * 48) / 1e6 + (4 * 8 * 32 * 16 + 4 * 3 * 8 * 32) / 6e6)


def test_device_peak(monkeypatch):
    assert device_peak(CPU, torch.float32, 2, 30) == Peak(2e12, 30e9, "given")
    with pytest.raises(ValueError, match="go together"):
        device_peak(CPU, torch.float32, 2, None)
    with pytest.raises(ValueError, match="above 0"):
        device_peak(CPU, torch.float32, 2, 0)
    probed = roofline.probe_peak(CPU, torch.float32, size=64, repeats=1)
    assert probed.flops_per_s > 0 and probed.bytes_per_s > 0 and probed.source == "probe"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert device_peak(torch.device("cuda"), torch.bfloat16, None, None) == Peak(989e12, 4.8e12, "data sheet")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 NVL")
    assert device_peak(torch.device("cuda"), torch.bfloat16, None, None) == Peak(835e12, 4.8e12, "data sheet")


def test_methods_per_layer():
    config = make_config()  # of 4 layers, 16 visual tokens in an image
    dense, frozen = (False, False), (True, True)
    assert Method("stock", None).per_layer(9, config) == [(9, *dense)] * 4
    both = Method("both", (2, 0), FASTV).per_layer(9, config)
    assert both == [(9, *frozen), (9, *dense), (4, *frozen), (4, *dense)]
    halves = Method("halves", ("1.mlp", "2.self_attn")).per_layer(9, config)
    assert halves == [(9, *dense), (9, False, True), (9, True, False), (9, *dense)]
    vtw = Method("vtw", (), {"method": "vtw", "k": 2}).per_layer(9, config)
    assert vtw == [(9, *dense), (9, *frozen), (0, *dense), (0, *dense)]  # nobody reads what the second makes of them
    chosen = Method("random", (1,), {"method": "random", "token_num": 3})
    assert chosen.per_layer(32, config) == [(6, *dense), (6, *frozen), (6, *dense), (6, *dense)]
    with pytest.raises(ValueError, match="depends on the image"):
        Method("prumerge", (), {"method": "prumerge"}).per_layer(32, config)
    for images in (1, 2):  # 8 newlines in each; two images have as many tokens as 11 tiles
        with pytest.raises(ValueError, match="newline"):
            chosen.per_layer(images * FAMILIES["llava_next"], make_config("llava_next"))


def test_choice_of_methods():
    methods = choose_methods(tiny(), ["shortv", "shortv+fastv"], None)
    assert [each.shortv_layers for each in methods] == [None, (3,), (3, 1), (3, 1, 2), (3, 1)]
    assert [each.visual_reduction for each in methods] == [None] * 4 + [FASTV]
    assert tiny().layers(N_LAYERS) == (3, 1, 2, 0)
    given = ["vtw", "shortv+vtw", "fastv:k=1", "shortv+random:token_num=3", '{"method": "prumerge"}', "fastv", "fastv"]
    methods = choose_methods(tiny(), given, None)
    assert [(each.name, each.shortv_layers, each.visual_reduction) for each in methods[1:]] == [
        ("VTW", (), {"method": "vtw", "k": 2}),
        ("ShortV N=2 + VTW", (3, 1), {"method": "vtw", "k": 2}),
        ("fastv:k=1", (), {"method": "fastv", "k": 1}),
        ("ShortV N=2 + random:token_num=3", (3, 1), {"method": "random", "token_num": 3}),
        ('{"method": "prumerge"}', (), {"method": "prumerge"}),
        ("FastV", (), FASTV),
    ]


IMAGE_METHODS = ["vtc_cls:layer=0,token_num=4", "shortv+random:token_num=4", "downsample:factor=2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_that_work_on_images(subjects, tmp_path, family):
    """Rows without a roofline bound where the number of tokens depends on the image; without a method, a reason."""
    name = {"llava": "tiny", "llava_next": "tiny-next"}[family]
    methods = [option for each in IMAGE_METHODS for option in ("--methods", each)]
    report, result = run(tmp_path, "--models", name, "--images", 2, *methods, "--methods", "prumerge")
    rows = {row["method"]: row for row in report["results"]}
    skipped = {each["method"]: each["reason"] for each in report["skipped"]}
    names = ["vtc_cls:layer=0,token_num=4", "ShortV N=2 + random:token_num=4", "downsample:factor=2", "prumerge"]
    assert sorted(rows | skipped) == sorted(["stock", *names])
    assert set(skipped) == ({"downsample:factor=2", "prumerge"} if family == "llava_next" else set())
    assert all("is not defined for LLaVA-NeXT" in reason for reason in skipped.values())
    known = set(names[:3]) if family == "llava" else set()
    for name, row in rows.items():
        if name == "stock":
            continue
        assert row["language_model"]["bound"] > 1
        assert ("roofline_bound" in row["language_model"]) == (name in known)
        assert ("share_of_roofline_bound" in row["time_to_first_token"]) == (name in known)
        (line,) = (line for line in result.stdout.splitlines() if f"| {name} | eager |" in line)
        assert line.count("× (–)") == (0 if name in known else 2)
        if name in known:
            counted = prefill_flops(
                T,
                32,
                tiny(family).config,
                shortv_layers=row["shortv_layers"],
                visual_reduction=row["visual_reduction"],
            )
            assert row["language_model_flops"] == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(("name", "bytes_"), [("llava-1.5-7b", 14126854144), ("qwen2.5-vl-7b", 16584333312)])
def test_sizes_are_those_of_the_checkpoint(name, bytes_):
    """The `total_size` of the original's `model.safetensors.index.json`, whose weights have 16 bits."""
    stock, _ = build_models(SUBJECTS[name]().config, torch.device("meta"), torch.bfloat16)
    assert sum(parameter.nbytes for parameter in stock.parameters()) == bytes_


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_models_of_the_paper(name):
    subject, model = SUBJECTS[name](), PAPER_MODELS[name]
    assert list(subject.layers(len(model.shortv_layers))) == model.shortv_layers
    assert len(model.shortv_layers) in subject.swept  # Tables 3 and 4 hold the N of Table 1


def test_speed_ups():
    def row(method, mode, flops, seconds, least):
        both = dict.fromkeys(("language_model", "time_to_first_token"), seconds)
        return {
            "model": "m", "visual_tokens": 9, "batch": 1, "visual_reduction": None, "method": method, "mode": mode,
            "shortv_layers": None if method == "stock" else [0], "flops": 2 * flops, "language_model_flops": flops,
            "seconds": both, "roofline_s": dict.fromkeys(both, least),
        }  # fmt: skip

    rows = reports.add_speed_ups(
        [
            row("stock", "eager", 100, [8.0, 9.0, 10.0], 3.0),
            row("stock", "compiled", 100, [6.0, 7.0, 5.0], 3.0),
            row("ShortV N=1", "eager", 40, [3.0, 4.0, 5.0], 1.5),
        ]
    )
    assert [each["language_model"]["speed_up"] for each in rows] == [6 / 8, 1, 7 / 4]
    found = rows[2]["language_model"]
    assert (found["median_s"], found["quartiles_s"]) == (4, [3.5, 4.5])
    assert found["speed_up_quartiles"] == [(1 + 7 / 4) / 2, (7 / 4 + 2) / 2]  # of 6 / 3, 7 / 4, 5 / 5
    assert (found["bound"], found["roofline_bound"]) == (2.5, 2)
    assert (found["share_of_bound"], found["share_of_roofline_bound"]) == (0.7, 0.875)
    assert rows[2]["achieved_flops_per_s"] == 10
    unknown = [row("stock", "eager", 100, [8.0], 3.0), row("prumerge", "eager", 40, [4.0], None)]
    unknown[1]["roofline_s"] = None
    unknown = reports.add_speed_ups(unknown)[1]["language_model"]
    assert unknown["bound"] == 2.5 and "roofline_bound" not in unknown and "share_of_roofline_bound" not in unknown
    rows.append({**rows[2], "shortv_layers": [0, 1]})
    ((label, curves),) = reports.sweeps({"results": rows}).items()
    assert "v = 9" in label and curves["measured, eager"]["x"] == [0, 1, 2]
    assert curves["FLOPs bound"] == {"x": [0, 1, 2], "y": [1, 2.5, 2.5]}
    assert reports.sweeps({"results": rows[:2]}) == {}
    failed = [row("stock", "eager", 100, [8.0], 3.0), row("ShortV N=1", "eager", 40, [4.0], 1.5)]
    del failed[0]["seconds"]["language_model"]
    failed = reports.add_speed_ups(failed)
    assert "language_model" not in failed[1] and failed[1]["time_to_first_token"]["speed_up"] == 2
    with pytest.raises(ValueError, match="no baseline"):
        reports.add_speed_ups([row("ShortV N=1", "eager", 1, [1.0], 1.0)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-layers", 5), "valid range is 1 to 4"),
        (("--output", "table.md"), "must end in .json"),
        (("--device", "meta"), "knows cpu and cuda"),
        (("--peak-tflops", 3), "go together"),
        (("--loading", "--repeats", 0), "takes none"),
        (("--dynamic",), "--compile is none"),
        (("--models", "gpt"), "cpu-small.* or a ShortV repo, and gpt is neither: no such directory"),
        (("--methods", "shortv,fastv:k=2"), "--methods takes shortv, a token reduction .*got 'shortv,fastv:k=2'"),
        (("--methods", "shortv+none"), "got 'none'"),
        (("--methods", "fastv:k=two"), "cannot read 'k=two'"),
        (("--batch", "0"), "--batch: 0 is not 1 or more"),
        (("--num-layers", "1,-1"), "--num-layers: -1 is not 1 or more"),
        (("--images", "1 2"), "--images takes numbers separated by commas, got '1 2'"),
        (("--batch", ""), "--batch names nothing"),
    ],
)
def test_refusals(subjects, arguments, message):
    with pytest.raises(ValueError, match=message):
        invoke("--models", "tiny", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(subjects):
    with pytest.raises(ValueError, match="no GPU"):
        invoke("--models", "tiny", "--device", "cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--repeats", "-1"), "not in the range|greater than or equal to 0"),
        (("--text-tokens", "0"), "not in the range|greater than or equal to 1"),
        (("--repeat", "1"), "No such option"),
        (("--batch", "1", "4"), "unexpected extra argument"),
    ],
)
def test_mistakes_in_the_command_line(arguments, message):
    with pytest.raises(Exception, match=message) as raised:
        invoke(*arguments)
    assert hasattr(raised.value, "format_message")  # `cli.main` makes one line of it


def test_from_python(subjects, tmp_path, capsys):
    options = BenchmarkOptions(
        models=("tiny",), images=(1,), text_tokens=T, methods=("shortv", "prumerge"), num_layers=(1,), repeats=0,
        output=tmp_path / "r.json",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is skipped
        report = run_benchmark(options)
    assert [row["method"] for row in report["results"]] == ["stock", "ShortV N=1", "prumerge"]
    assert report["conditions"]["command"] == repr(options)
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(report))
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="already there"):
        run_benchmark(options)
    with pytest.raises(ValueError, match="--repeats: -1 is negative"):
        run_benchmark(BenchmarkOptions(models=("tiny",), repeats=-1))


def test_commands(subjects, tmp_path, monkeypatch, capsys):
    """The command's help, its error in one line, and that the report says what was typed."""
    help_ = invoke("--help").output
    assert "bench [OPTIONS]" in help_ and "--num-layers" in help_ and "shortv bench --output cpu-small.json" in help_
    from shortv_hf import cli

    monkeypatch.setattr(sys, "argv", ["/a/place/shortv", "bench", "--output", "x"])
    with pytest.raises(SystemExit, match="^shortv: --output is x; it must end in .json$"):
        cli.main()
    monkeypatch.chdir(tmp_path)
    given = "bench --models tiny --images 1 --repeats 0 --methods shortv --num-layers 1,2 --output x.json"
    monkeypatch.setattr(sys, "argv", ["/a/place/shortv", *given.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0 and capsys.readouterr().out.startswith(f"`shortv {given}`\n")
    assert json.loads((tmp_path / "x.json").read_text())["conditions"]["command"] == f"shortv {given}"
