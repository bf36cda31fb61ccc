"""The plug-in as vLLM finds it; what it registers, with a vLLM of names alone."""

import logging
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest

from shortv_hf.serving.vllm import TESTED, register
from shortv_hf.serving.vllm.architectures import MODELS


pytestmark = pytest.mark.once
ROOT = Path(__file__).parents[2]


def settings() -> dict:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is new in Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_entry_point_is_the_plug_in():
    (value,) = settings()["entry-points"]["vllm.general_plugins"].values()
    assert EntryPoint("shortv", value, "vllm.general_plugins").load() is register


def test_the_extra_asks_for_what_the_plug_in_knows():
    (requirement,) = settings()["optional-dependencies"]["vllm"]
    assert requirement == f"vllm{TESTED}"


def test_importing_the_plug_in_is_light():
    code = "import shortv_hf.serving.vllm, sys\nassert not {'torch', 'transformers', 'vllm'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "0.1.dev1+gabc", "from-source"])
def test_other_versions_are_left_alone(version, monkeypatch, caplog):
    """They serve other models as if the plug-in were not there; the fake has nothing else that it could touch."""
    vllm = ModuleType("vllm")
    vllm.__version__ = version
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    with caplog.at_level(logging.WARNING, "vllm.shortv"):
        register()
    assert f"ShortV knows vLLM {TESTED}, and this is {version}" in caplog.text


class TestWithVLLM:
    """Where vLLM is installed."""

    @pytest.fixture(autouse=True)
    def vllm(self):
        pytest.importorskip("vllm")

    def test_models_loader_and_guards_are_registered(self):
        from vllm import ModelRegistry
        from vllm.model_executor.model_loader import get_model_loader
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        register()
        assert set(MODELS) <= set(ModelRegistry.get_supported_archs()) & set(MODELS_CONFIG_MAP)
        from vllm.config import LoadConfig

        loader = get_model_loader(LoadConfig(load_format="shortv"))
        assert type(loader).__name__ == "BaseWeightsLoader" and loader.load_config.load_format == "safetensors"

    def test_weights_are_looked_for_in_the_base(self):
        from types import SimpleNamespace

        from shortv_hf.serving.vllm.loader import at_base

        config = SimpleNamespace(base_model_name_or_path="org/base", base_model_revision="abc")
        given = SimpleNamespace(hf_config=config, model="org/shortv", revision="main")
        found = at_base(given)
        assert (found.model, found.revision) == ("org/base", "abc")
        assert (given.model, given.revision) == ("org/shortv", "main")

    def test_backends_that_write_what_they_query_are_refused(self):
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        from shortv_hf.serving.vllm.backend import shortv_backend

        assert shortv_backend(CPUAttentionBackend) is shortv_backend(CPUAttentionBackend)
        together = type("Together", (CPUAttentionBackend,), {"forward_includes_kv_cache_update": True})
        with pytest.raises(ValueError, match="cannot use the attention backend CPU_ATTN"):
            shortv_backend(together)

    def test_a_step_that_never_came_is_told(self, monkeypatch):
        """A CUDA graph of the whole model leaves out our forward, and with it what says that a token is visual."""
        import torch
        from torch import nn

        from shortv_hf.serving.vllm import models

        class Stock(nn.Module):
            packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

            def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
                return input_ids

        class Frozen(models.ShortVMixin, Stock):
            pass

        said = []
        monkeypatch.setattr(models.logger, "warning_once", said.append)
        model = Frozen.__new__(Frozen)
        nn.Module.__init__(model)
        model.is_visual = None
        text, image = torch.tensor([False]), torch.tensor([True])
        model.embed_input_ids(torch.tensor([5]), [], is_multimodal=text)
        model.embed_input_ids(torch.tensor([3]), [torch.zeros(1, 4)], is_multimodal=image)
        assert model.is_visual.tolist() == [True] and not said
        model.embed_input_ids(torch.tensor([5]), [], is_multimodal=text)
        assert model.is_visual is None and "computed as if it were text" in said[0]
        assert Frozen.packed_modules_mapping["kv_proj"] == ["k_proj", "v_proj"]
