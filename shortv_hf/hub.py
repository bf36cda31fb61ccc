"""Building the small Hub repos: a config, the code files, and the processor files of the base checkpoint."""

import ast
import copy
import shutil
from pathlib import Path

from transformers import PretrainedConfig

from . import modeling_shortv


# Processor and tokenizer files of LLaVA checkpoints. They are copied byte for byte: what Transformers 5.x writes when
# it saves a processor again, 4.x cannot read.
PROCESSOR_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def code_files() -> list[Path]:
    """The files of the remote-code closure: the modeling file and all that it imports from its own package."""
    found, queue = [], [Path(modeling_shortv.__file__)]
    while queue:
        file = queue.pop()
        if file in found:
            continue
        found.append(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                queue.append(file.with_name(f"{node.module}.py"))
    return sorted(found)


def build_repo(config: PretrainedConfig, output_dir: str | Path, processor_dir: str | Path | None = None) -> Path:
    """Write a repo that `AutoModelForImageTextToText.from_pretrained(output_dir, trust_remote_code=True)` loads.

    The repo holds `config.json` (with the base reference of `config`), the code files and, from `processor_dir`, the
    processor, tokenizer and chat template files and `generation_config.json`. It holds no weights: they are read from
    `config.base_model_name_or_path`. `model.save_pretrained` writes a repo that holds them.

    Args:
        config: a `ShortVLlavaConfig` or `ShortVLlavaNextConfig`.
        output_dir: the repo's directory; made if needed. Files of the same names are overwritten, others stay.
        processor_dir: a local directory with the files of the base checkpoint's processor.

    Returns:
        The directory.

    Raises:
        ValueError: `config` is not a ShortV config or has bad fields; `processor_dir` holds no processor.
    """
    if not str(getattr(config, "model_type", "")).startswith("shortv_"):
        raise ValueError(f"build_repo needs a ShortV config, got {type(config).__name__}")
    config.validate_shortv()
    processor_files = []
    if processor_dir is not None:
        processor_files = [Path(processor_dir) / name for name in PROCESSOR_FILES]
        processor_files = [file for file in processor_files if file.is_file()]
        if not processor_files:
            raise ValueError(f"{processor_dir} holds no processor files ({', '.join(PROCESSOR_FILES)})")
        generation_config = Path(processor_dir) / "generation_config.json"
        if generation_config.is_file():
            processor_files.append(generation_config)

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    config.architectures = [type(config).__name__.replace("Config", "ForConditionalGeneration")]
    config.save_pretrained(output_dir)
    for file in code_files() + processor_files:
        if file.resolve().parent != output_dir.resolve():
            shutil.copyfile(file, output_dir / file.name)
    return output_dir
