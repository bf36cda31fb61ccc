"""The kernels of a trace are told apart and added up; the way there, on the CPU, where a trace holds none."""

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import make_model

from shortv_hf.benchmark.subjects import Subject


pytestmark = pytest.mark.once

SCRIPT = Path(__file__).parents[2] / "scripts" / "profile_kernels.py"
specification = importlib.util.spec_from_file_location("profile_kernels", SCRIPT)
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_NTN", "products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("void at::native::_scatter_gather_elementwise_kernel<128, 4>", "moving"),
        ("void at::native::vectorized_gather_kernel<16, long>", "moving"),
        ("Memcpy DtoD (Device -> Device)", "moving"),
        ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::silu>>", "rest"),
    ],
)
def test_kinds(kernel, kind):
    assert script.kind_of(kernel) == kind


def test_a_trace_is_added_up():
    kernels = [("nvjet_a", 30), ("nvjet_a", 20), ("flash_fwd", 7), ("silu", 5)]
    events = [{"cat": "kernel", "name": name, "dur": duration} for name, duration in kernels]
    events += [
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "dur": 2},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 1000},  # the host's
        {"name": "process_name", "ph": "M"},
    ]
    found = script.add_up({"traceEvents": events})
    microseconds = {kind: round(1e6 * seconds, 3) for kind, seconds in found["by_kind_s"].items()}
    assert microseconds == {"products": 50, "attention": 7, "moving": 2, "rest": 5}
    assert found["kernels"] == 5 and found["busy_s"] == pytest.approx(64e-6)
    assert next(iter(found["longest"].items())) == ("nvjet_a", [2, pytest.approx(50e-6)])


def test_rows_and_table():
    subject = Subject(make_model(shortv_layers=[3, 1]).config, swept=(), vtw_layer=2)
    rows = script.measure(subject, [2], ["shortv"], [2], torch.device("cpu"), torch.float32, 1)
    assert [row["method"] for row in rows] == ["stock", "ShortV N=2"] and all(row["kernels"] == 0 for row in rows)
    table = script.markdown({"conditions": {"command": "x"}, "models": {"tiny": rows}})
    assert f"| 2 | ShortV N=2 | {1000 * rows[1]['median_s']:.1f} | 0.0 | 0 |" in table


def test_only_on_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["profile_kernels.py", "--output", str(tmp_path / "x.json")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script.main()
    assert "torch finds no GPU" in capsys.readouterr().err
