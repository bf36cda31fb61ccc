"""A small repo and its base on a Hub: the tests' own, on this machine."""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load, save

from .environment import ROOT


sys.path.insert(0, str(ROOT / "tests"))

from local_hub import LocalHub  # noqa: E402


@contextmanager
def on_a_hub(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The model in `folder` as ME/shortv, which references ME/base at a commit; whose weights are zeros in the next.

    Yields:
        Its id, and the variables of a process that is to find it.
    """
    with LocalHub() as hub, tempfile.TemporaryDirectory() as cache:
        commit = hub.commit("ME/base", folder / "stock")
        files = dict(hub.files("ME/base"))
        weights = {name: tensor * 0 for name, tensor in load(files["model.safetensors"]).items()}
        hub.add_commit("ME/base", "main", {**files, "model.safetensors": save(weights, {"format": "pt"})})
        hub.commit("ME/shortv", folder / "reference")
        config = json.loads(hub.files("ME/shortv")["config.json"])
        config |= {"base_model_name_or_path": "ME/base", "base_model_revision": commit}
        hub.files("ME/shortv")["config.json"] = json.dumps(config).encode()
        yield "ME/shortv", {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": cache}
