"""Who knows what: families are known in two files, methods in their own (`test_reduction.py`). What goes where: a file in the
package's root goes into every Hub repo, a folder never does."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import shortv_hf
import shortv_hf.hub
from shortv_hf.hub import code_files
from shortv_hf.modeling_shortv import MODELS


PACKAGE = Path(shortv_hf.__file__).parent
KNOW_FAMILIES = {"configuration_shortv.py", "modeling_shortv.py"}
# These are about particular models: the paper's, the demonstration model, a model to measure, those of another engine.
ABOUT_MODELS = {
    "hub/paper.py", "hub/card.py", "data/shapes.py", "benchmark/subjects.py",
    "serving/vllm/architectures.py", "serving/vllm/models.py",
}  # fmt: skip


FOLDERS = sorted(".".join(file.parent.relative_to(PACKAGE).parts) for file in PACKAGE.glob("*/**/__init__.py"))
AT_HOME = {"__init__.py", "cli.py"}  # root files that go nowhere


def relative_imports(file: Path) -> set[tuple[int, str]]:
    nodes = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom) and node.level)
    return {(node.level, node.module or "") for node in nodes}


@pytest.mark.once
def test_root_files_are_what_repos_get():
    root = {file.name for file in PACKAGE.glob("*.py")} - AT_HOME
    assert {file.name for file in code_files()} == root
    for name in root:  # and of this package they import each other only
        imported = relative_imports(PACKAGE / name)
        assert {f"{module}.py" for _, module in imported} <= root and {level for level, _ in imported} <= {1}, name


@pytest.mark.once
def test_every_folder_is_installed_and_type_checked():
    settings = (PACKAGE.parent / "pyproject.toml").read_text()
    assert len(FOLDERS) >= 8
    for folder in FOLDERS:
        assert f'"shortv_hf.{folder}"' in settings and f'"shortv_hf.{folder}.*"' in settings, folder


@pytest.mark.once
def test_every_command_is_mounted():
    """A tool is a folder with a `command.py`, and a line in `cli.py`."""
    mounted = relative_imports(PACKAGE / "cli.py")
    commands = {file.parent.name for file in PACKAGE.glob("*/command.py")}
    assert {module for _, module in mounted if module.endswith(".command")} == {f"{name}.command" for name in commands}


@pytest.mark.once
def test_lazy_names_exist():
    for folder in FOLDERS:
        module = importlib.import_module(f"shortv_hf.{folder}")
        for name in getattr(module, "__all__", ()):
            assert getattr(module, name).__name__ == name and name in dir(module)
    with pytest.raises(AttributeError, match="'shortv_hf.hub' has no attribute 'nothing'"):
        shortv_hf.hub.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="'shortv_hf' has no attribute 'ShortVNothing'"):
        shortv_hf.ShortVNothing  # noqa: B018
    assert {"AutoModelForVision2Seq", "ShortVLlavaConfig", "apply_shortv"} <= set(dir(shortv_hf)) & set(
        shortv_hf.__all__
    )


IMPORTS = [
    "import shortv_hf",
    "import shortv_hf\nfrom transformers import LlavaForConditionalGeneration",  # which asks for the Auto classes itself
    "import shortv_hf\nfrom transformers import AutoConfig",
    "from transformers import AutoModelForImageTextToText\nimport shortv_hf",
    "import shortv_hf.plan",
    "import shortv_hf, importlib.util\nassert importlib.util.find_spec('transformers')",  # as libraries do that may use it
    "import shortv_hf, accelerate\nassert accelerate.utils.is_transformers_available()",
    "from shortv_hf import *",
    "from shortv_hf.hub import load",
]


@pytest.mark.parametrize("code", IMPORTS)
def test_importing_anything_registers_the_classes(code):
    """In whichever order the package and Transformers are imported."""
    code += f"""
from transformers import AutoConfig, AutoModelForImageTextToText
config = AutoConfig.from_pretrained({str(PACKAGE.parent / "hub_configs" / "shortv-llava-1.5-7b-hf")!r})
assert type(config).__module__ == "shortv_hf.configuration_shortv", type(config)
assert AutoModelForImageTextToText._model_mapping[type(config)].__module__ == "shortv_hf.modeling_shortv"
import shortv_hf, transformers
assert issubclass(shortv_hf.AutoModelForVision2Seq, object)
assert shortv_hf.ShortVLlavaConfig is type(config)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr


@pytest.mark.once
def test_importing_the_package_is_light():
    code = "import shortv_hf, sys\nassert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


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
    for file in PACKAGE.rglob("*.py"):
        known = words(file) & names
        if str(file.relative_to(PACKAGE)) not in KNOW_FAMILIES | ABOUT_MODELS:
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
