"""Benchmarks: lmms-eval's tasks with what they cost beside every score, and the answers files of LLaVA's own scorers."""


def lmms_eval_models():
    """The models that this package brings to lmms-eval, which calls this at its start: `--model shortv`.

    It imports nothing heavy: to lmms-eval, an error here is a warning, after which there is no such model.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="shortv", chat_class_path="shortv_hf.evaluate.lmms_eval.ShortV")
