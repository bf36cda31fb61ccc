"""Two gloo processes with sharded linears give the logits of one."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import make_inputs, make_model


WORKER = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
from shortv_hf import ShortVLlavaForConditionalGeneration
model = ShortVLlavaForConditionalGeneration.from_pretrained(sys.argv[1], tp_plan="auto", dtype=torch.float32)
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    logits = model(**inputs).logits
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=-1, suppress_tokens=[98])
model.set_visual_reduction({"method": "vtw", "k": 1})
with torch.no_grad():
    reduced = model(**inputs).logits
model.set_visual_reduction({"method": "fastv", "k": 1})
try:
    model(**inputs)
    error = None
except ValueError as raised:  # each process would rank by its own heads
    error = str(raised)
layer = model.model.language_model.layers[0]
weight = layer.mlp.up_proj.weight
local = weight.to_local() if hasattr(weight, "to_local") else weight
if int(os.environ["RANK"]) == 0:
    with open(sys.argv[3], "w") as file:
        json.dump([logits.tolist(), generated.tolist(), list(local.shape), reduced.tolist(), error], file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_two_processes(tmp_path):
    model = make_model(shortv_layers=[0, 2])
    model.save_pretrained(tmp_path / "model")
    inputs = make_inputs(model, ["ttItt", "tIt"])
    with torch.no_grad():
        expected = model(**inputs).logits
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=-1, suppress_tokens=[98])
        model.set_visual_reduction({"method": "vtw", "k": 1})
        withdrawn = model(**inputs).logits
    torch.save(inputs, tmp_path / "inputs.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command += [str(tmp_path / name) for name in ("worker.py", "model", "inputs.pt", "result.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, f"transformers {transformers.__version__}: {result.stderr[-3000:]}"
    logits, ids, shard, reduced, error = json.loads((tmp_path / "result.json").read_text())
    assert shard == [24, 32]  # half of the FFN's 48 rows: the layers really are sharded
    torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-4, rtol=1e-4)
    assert ids == generated.tolist()
    torch.testing.assert_close(torch.tensor(reduced), withdrawn, atol=1e-4, rtol=1e-4)
    assert "fastv does not work with tensor parallel" in error
