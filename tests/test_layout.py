"""Who knows what: families are known in two files, methods in their own (`test_reduction.py`)."""

import ast
from pathlib import Path

import pytest
import transformers

import shortv_hf
from shortv_hf.modeling_shortv import MODELS


PACKAGE = Path(shortv_hf.__file__).parent
KNOW_FAMILIES = {"configuration_shortv.py", "modeling_shortv.py"}
# These are about particular models: the paper's, the demonstration model, a model to measure.
ABOUT_MODELS = {"paper_models.py", "model_card.py", "shapes.py", "benchmark_models.py"}


def family_names() -> set[str]:
    """Model types, and the names of classes and modules of the families."""
    names = set()
    for model in MODELS:
        model_type = model.config_class.base_model_type
        names |= {model_type, f"shortv_{model_type}", f"modeling_{model_type}"}
        for cls in (model, model.base_class, model.config_class):
            stock = next(each for each in cls.__mro__ if each.__module__.startswith("transformers."))
            names |= {cls.__name__, stock.__name__}
    return names


def words(file: Path) -> set[str]:
    """Names, attributes, parts of module names and short strings in a file; not what is said in comments or docstrings."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


@pytest.mark.once
def test_families_are_known_in_two_files():
    names = family_names()
    assert {"LlavaModel", "shortv_qwen2_5_vl", "ShortVGemma3Config", "modeling_llava_next"} <= names
    for file in PACKAGE.glob("*.py"):
        known = words(file) & names
        if file.name not in KNOW_FAMILIES | ABOUT_MODELS:
            assert not known, file.name
    assert words(PACKAGE / "modeling_shortv.py") & names


@pytest.mark.once
def test_a_family_is_seven_lines():
    """Three classes that say what they are, and nothing about how."""
    for model in MODELS:
        for cls in (model, model.base_class, model.config_class):
            own = {name for name in vars(cls) if not name.startswith("_")}  # upstream caches answers on classes
            assert own <= {
                "config_class", "base_class", "model_type", "base_model_type", "tokenizer_is_the_file",
                "get_image_features", "get_video_features", "attribute_map", "sub_configs", "keys_to_ignore_at_inference",
            } or cls is model.config_class, (cls, own)  # fmt: skip
            assert issubclass(cls, getattr(transformers, cls.__name__.removeprefix("ShortV")))
