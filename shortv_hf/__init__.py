"""ShortV for Hugging Face: vision-language models that freeze visual tokens in ineffective decoder layers.

Importing the package registers the classes with the Auto classes, so that ShortV repos load without remote code.
"""

import os
import signal
import sys


if os.path.basename(sys.argv[0]) in ("shortv", "shortv.exe"):  # Ctrl-C while the imports below run: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import transformers  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText  # noqa: E402

from . import configuration_shortv, modeling_shortv  # noqa: E402
from .configuration_shortv import *  # noqa: E402, F403
from .modeling_shortv import *  # noqa: E402, F403


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
    for model in modeling_shortv.MODELS:
        config = model.config_class
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, model.base_class)
        for auto_class in generation_classes:
            auto_class.register(config, model)


_register()

__version__ = "0.3.0"
__all__ = ["AutoModelForVision2Seq", *configuration_shortv.__all__, *modeling_shortv.__all__]
