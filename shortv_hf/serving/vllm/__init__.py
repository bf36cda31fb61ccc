"""ShortV as a plug-in of vLLM: with both installed, each of vLLM's processes knows ShortV models and repos."""

import logging


TESTED = ">=0.32,<0.34"  # of vLLM: what the plug-in builds on is no stable interface

logger = logging.getLogger("vllm.shortv")  # vLLM shows what is logged under its own name


def register() -> None:
    """What `vllm.general_plugins` names. vLLM calls it in each process, for any model; the models come later, when asked for.

    Outside of the tested versions it registers nothing and says so: vLLM then refuses ShortV models, and serves all others.
    """
    import vllm
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        tested = SpecifierSet(TESTED).contains(vllm.__version__, prereleases=True)
    except InvalidVersion:  # a build from source
        tested = False
    if not tested:
        logger.warning("ShortV knows vLLM %s, and this is %s: its models are not registered", TESTED, vllm.__version__)
        return

    from vllm import ModelRegistry
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .architectures import MODELS
    from .guards import SHORTV_LOAD_FORMAT
    from .loader import BaseWeightsLoader
    from .settings import ShortVSettings

    register_model_loader(SHORTV_LOAD_FORMAT)(BaseWeightsLoader)
    for name in MODELS:
        ModelRegistry.register_model(name, f"{__name__}.models:{name}")
        MODELS_CONFIG_MAP[name] = ShortVSettings
