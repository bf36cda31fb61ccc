"""Where vLLM asks a model about the settings it was started with: before anything is loaded, in the user's own process."""

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from .guards import check_settings, weights_load_format


class ShortVSettings(VerifyAndUpdateConfig):
    """The guards; and the loader of repos that reference their weights."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Raises `ValueError` for settings that ShortV cannot have."""
        check_settings(vllm_config, rocm=current_platform.is_rocm())
        load_config = vllm_config.load_config
        load_config.load_format = weights_load_format(vllm_config.model_config.hf_config, load_config.load_format)
