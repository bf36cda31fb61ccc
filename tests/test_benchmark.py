"""The benchmark on tiny models: what it counts and computes is right, and every method and mode runs. No time is judged."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import N_LAYERS, make_config
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shortv_hf import benchmark, benchmark_models, roofline
from shortv_hf import benchmark_report as reports
from shortv_hf.benchmark_meters import LiveTensorBytes, profile_prefill, time_prefill
from shortv_hf.benchmark_models import FASTV, SUBJECTS, Method, Subject, build_models, choose_methods, make_inputs
from shortv_hf.flops import layer_flops, prefill_flops
from shortv_hf.paper_models import PAPER_MODELS
from shortv_hf.roofline import Peak, device_peak, layer_parts, prefill_seconds


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


def run(tmp_path, *arguments):
    (tmp_path / "out").mkdir()
    given = ["--text-tokens", T, "--repeats", 2, *arguments, "--output", tmp_path / "out" / "r.json"]
    benchmark.main([str(each) for each in given], "bench")
    return json.loads((tmp_path / "out" / "r.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method(subjects, tmp_path, capsys, family):
    name = {"llava": "tiny", "llava_next": "tiny-next"}[family]
    report = run(tmp_path, "--models", name, "--images", 2, "--batch", 1, 2)
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
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "out" / "r.md").read_text().strip()
    assert printed.count("\n| tiny") == len(rows) and printed.count("- skipped") == len(skipped)
    Image.open(tmp_path / "out" / "r.png").verify()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(subjects, monkeypatch, tmp_path, dynamic):
    monkeypatch.setitem(benchmark.COMPILED, "cpu", {"backend": "eager", "dynamic": False})
    monkeypatch.setattr(benchmark, "DYNAMIC", {"backend": "eager", "dynamic": True})
    options, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: options.append(given["dynamic"]) or compile_(f, **given))
    given = ["--compile", "some", *(["--dynamic"] if dynamic else []), "--images", 1, 2]
    report = run(tmp_path, "--models", "tiny", "--methods", "shortv", "--num-layers", 1, 2, *given)
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


def test_what_fails_is_skipped(subjects, monkeypatch, tmp_path, capsys):
    def compiling_fails(*_, **__):
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiling_fails)
    report = run(tmp_path, "--models", "tiny", "--methods", "shortv", "--num-layers", 2, "--compile", "all")
    assert [row["mode"] for row in report["results"]] == ["eager", "eager"]
    assert [(each["method"], each["mode"]) for each in report["skipped"]] == [
        ("stock", "compiled"), ("ShortV N=2", "compiled"),
    ]  # fmt: skip
    assert "skipped stock, compiled: TorchDynamoException: no compiler" in capsys.readouterr().err


def test_without_a_baseline(subjects, monkeypatch, tmp_path):
    time_once = benchmark.Bench._time_once

    def stock_fails(bench, variant, *args):
        if variant.method.name == "stock":
            raise AssertionError("a broken graph")
        return time_once(bench, variant, *args)

    monkeypatch.setattr(benchmark.Bench, "_time_once", stock_fails)
    report = run(tmp_path, "--models", "tiny", "--methods", "shortv", "--num-layers", 2)
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
    report = run(tmp_path, "--models", "tiny", "--methods", "shortv", "--images", 4, 8, 16, "--repeats", 0)
    assert all("prefill" not in row and row["peak_memory_bytes"] > 0 for row in report["results"])
    peaks = {
        name: [row["peak_memory_bytes"] for row in report["results"] if row["method"] == name]
        for name in ("stock", "ShortV N=3")
    }
    for small, middle, large in peaks.values():  # linear in v: no [S, S] mask, no attention matrix
        assert (large - middle) / (middle - small) == pytest.approx(2, rel=0.05)
    assert not (tmp_path / "out" / "r.png").exists()


def test_loading(subjects, tmp_path):
    report = run(tmp_path, "--models", "tiny", "--methods", "shortv", "--num-layers", 1, "--loading")
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
        assert memory.live == memory.peak == 4000
        c = a + 1
        del a
        assert memory.live == 8000  # a's storage is b's
        del b
        assert memory.live == 4000
        d = torch.empty(500)
        assert (memory.live, memory.peak) == (6000, 8000)
    del c, d
    assert (memory.live, memory.peak) == (0, 8000)


def test_layer_parts():
    config = make_config().text_config  # h = 32, FFN 48, 4 heads, 2 of K and V
    parts = layer_parts(3, 5, config, frozen=True, batch=2, value_bytes=4)
    assert parts == [
        (2 * 2 * 3 * 2 * 32 * 32, 4 * 2 * 32 * 32),
        (2 * 2 * 8 * 2 * 32 * 16, 4 * 2 * 32 * 16),
        (2 * 2 * 3 * 3 * 32 * 48, 4 * 3 * 32 * 48),
        (4 * 2 * 3 * 8 * 32, 4 * 2 * 2 * 8 * 16),
    ]
    for frozen in (False, True):
        flops = sum(part[0] for part in layer_parts(3, 5, config, frozen=frozen))
        assert flops == layer_flops(3, 5, config, frozen=frozen)


def test_roofline():
    config = make_config().text_config
    layers = [(5, False), (5, True)]
    arithmetic = prefill_seconds(layers, 3, config, Peak(1e6, 1e30, "given"))
    assert arithmetic == pytest.approx((layer_flops(3, 5, config) + layer_flops(3, 5, config, frozen=True)) / 1e6)
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    keys_and_values = 2 * (2 * 8 * 16)
    memory = prefill_seconds(layers, 3, config, Peak(1e30, 1e6, "given"))
    assert memory == pytest.approx(2 * (weights + keys_and_values) / 1e6)
    # 6 FLOPs per byte: 3 text tokens (3 FLOPs per byte) wait for the weights, 8 tokens (8 per byte) do not
    mixed = prefill_seconds([(5, True)], 3, config, Peak(6e6, 1e6, "given"))
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
    assert Method("stock", None).per_layer(9, 3) == [(9, False)] * 3
    assert Method("both", (2, 0), FASTV).per_layer(9, 4) == [(9, True), (9, False), (4, True), (4, False)]
    assert Method("vtw", (), {"method": "vtw", "k": 1}).per_layer(9, 3) == [(9, False), (0, False), (0, False)]


def test_choice_of_methods():
    methods = choose_methods(tiny(), ["shortv", "shortv+fastv"], None)
    assert [each.shortv_layers for each in methods] == [None, (3,), (3, 1), (3, 1, 2), (3, 1)]
    assert [each.visual_reduction for each in methods] == [None] * 4 + [FASTV]
    assert tiny().layers(N_LAYERS) == (3, 1, 2, 0)


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
    ],
)
def test_refusals(subjects, arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark.main(["--models", "tiny", *map(str, arguments)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(subjects):
    with pytest.raises(ValueError, match="no GPU"):
        benchmark.main(["--models", "tiny", "--device", "cuda"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "0"), "0 is not 1 or more"),
        (("--repeats", "-1"), "expected one argument|-1 is negative"),
        (("--repeat", "1"), "unrecognized"),
    ],
)
def test_mistakes_in_the_command_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        benchmark.parse_arguments(list(arguments), "shortv bench")
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_commands():
    typer_testing = pytest.importorskip("typer.testing")
    from shortv_hf import cli

    result = typer_testing.CliRunner().invoke(cli.app, ["bench", "--help"])
    assert result.exit_code == 0 and "usage: shortv bench" in result.output and "--num-layers" in result.output
    result = typer_testing.CliRunner().invoke(cli.app, ["bench", "--output", "x"])
    assert isinstance(result.exception, ValueError) and "must end in .json" in str(result.exception)
    script = Path(__file__).parent.parent / "scripts" / "benchmark.py"
    wrong = subprocess.run([sys.executable, script, "--output", "x"], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.strip().splitlines()[-1].startswith("--output is x")
