"""Weights by reference: a ShortV repo's are read from the checkpoint that it names, at the commit that it names."""

import copy
from typing import Any

from torch import nn
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader


class BaseWeightsLoader(DefaultModelLoader):
    """Modifications: reads the base checkpoint, of which only safetensors, as this package does everywhere."""

    def __init__(self, load_config: Any) -> None:
        load_config = copy.copy(load_config)
        load_config.load_format = "safetensors"
        super().__init__(load_config)

    def download_model(self, model_config: Any) -> None:
        """Fetch the base's weights."""
        super().download_model(at_base(model_config))

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Fill `model` with the base's weights."""
        super().load_weights(model, at_base(model_config))


def at_base(model_config: Any) -> Any:
    """A copy of vLLM's `ModelConfig` that finds weights in the base; tokenizer and processor stay the repo's."""
    config = model_config.hf_config
    model_config = copy.copy(model_config)
    model_config.model, model_config.revision = config.base_model_name_or_path, config.base_model_revision
    return model_config
