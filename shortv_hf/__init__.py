"""ShortV for Hugging Face: LLaVA models that freeze visual tokens in ineffective decoder layers.

Importing the package registers the classes with the Auto classes, so that ShortV repos load without remote code.
"""

import os
import signal
import sys


if os.path.basename(sys.argv[0]) in ("shortv", "shortv.exe"):  # Ctrl-C while the imports below run: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import transformers  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
)

from .configuration_shortv import ShortVLlavaConfig, ShortVLlavaNextConfig
from .modeling_shortv import (
    ShortVLlavaForConditionalGeneration,
    ShortVLlavaModel,
    ShortVLlavaNextForConditionalGeneration,
    ShortVLlavaNextModel,
)


if hasattr(transformers, "AutoModelForVision2Seq"):
    from transformers import AutoModelForVision2Seq
else:

    class AutoModelForVision2Seq(AutoModelForImageTextToText):
        """Transformers 5.x removed this Auto class; with this one, code written for 4.x keeps working."""


def _register():
    generation_classes = [AutoModelForImageTextToText]
    for name in ("AutoModelForVision2Seq", "AutoModelForMultimodalLM"):  # 4.x, newer 5.x
        if hasattr(transformers, name):
            generation_classes.append(getattr(transformers, name))
    for config, model, generation_model, processor in (
        (ShortVLlavaConfig, ShortVLlavaModel, ShortVLlavaForConditionalGeneration, LlavaProcessor),
        (ShortVLlavaNextConfig, ShortVLlavaNextModel, ShortVLlavaNextForConditionalGeneration, LlavaNextProcessor),
    ):
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, model)
        AutoProcessor.register(config, processor)
        for auto_class in generation_classes:
            auto_class.register(config, generation_model)


_register()

__version__ = "0.2.0"
__all__ = [
    "AutoModelForVision2Seq",
    "ShortVLlavaConfig",
    "ShortVLlavaForConditionalGeneration",
    "ShortVLlavaModel",
    "ShortVLlavaNextConfig",
    "ShortVLlavaNextForConditionalGeneration",
    "ShortVLlavaNextModel",
]
