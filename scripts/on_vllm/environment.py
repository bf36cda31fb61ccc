"""The environment of vLLM's processes: what it needs on a CPU, and a torchvision that can be imported."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[2]
MARK = "SHORTV_ON_VLLM"  # set where it is that environment already
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads that are bound to cores spin where others work
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# A torchvision built for CUDA cannot load its operators beside a torch for CPUs, and then says that they do not exist. vLLM
# imports it for image processors alone, which use none of them: to declare them is enough.
DECLARE_OPERATORS = '''"""Written by scripts/on_vllm/environment.py."""

import sys
from importlib.abc import MetaPathFinder


class DeclareOperators(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            from torch import library

            self.declared = library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.declared.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.torchvision_operators = self  # kept alive
        return None


sys.meta_path.insert(0, DeclareOperators())
'''


def enter() -> None:
    """Begin the running script anew in the environment that vLLM and Transformers need; the caller's variables win."""
    if MARK in os.environ:
        return
    environment = {**SETTINGS, **os.environ, MARK: "1"}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    probe = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    if "torchvision::nms does not exist" in probe.stderr:
        folder = Path(tempfile.mkdtemp(prefix="torchvision-"))
        (folder / "sitecustomize.py").write_text(DECLARE_OPERATORS)
        paths.insert(0, str(folder))
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)
