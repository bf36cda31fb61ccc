"""The ShortV classes in Transformers' Auto classes. Importing this module registers them."""

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from ..modeling_shortv import MODELS


if hasattr(transformers, "AutoModelForVision2Seq"):
    from transformers import AutoModelForVision2Seq  # type: ignore[attr-defined]  # of 4.x
else:

    class AutoModelForVision2Seq(AutoModelForImageTextToText):  # type: ignore[no-redef]  # of 5.x
        """Transformers 5.x removed this Auto class; with this one, code written for 4.x keeps working."""


def _register():
    generation_classes = [AutoModelForImageTextToText]
    for name in ("AutoModelForVision2Seq", "AutoModelForMultimodalLM"):  # 4.x, newer 5.x
        if hasattr(transformers, name):
            generation_classes.append(getattr(transformers, name))
    for model in MODELS:
        config = model.config_class
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, model.base_class)
        for auto_class in generation_classes:
            auto_class.register(config, model)


_register()
