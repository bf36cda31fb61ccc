"""Building the small Hub repos: config, code files, processor files of the base checkpoint, and a model card."""

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Set
from pathlib import Path

from huggingface_hub import ModelCard, snapshot_download
from transformers import PretrainedConfig

from .. import modeling_shortv
from ..data import outputs
from ..layer_contribution.ranking import LayerRanking
from ..pictures import plots
from ..search.result import SearchResult
from . import eval_results
from .card import reference_card
from .names import is_commit
from .paper import paper_model
from .provenance import provenance_of


# Processor and tokenizer files of the original checkpoints. They are copied byte for byte: what Transformers 5.x writes when
# it saves a processor again, 4.x cannot read. One field differs, see `_declare_tokenizer`.
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
    "video_preprocessor_config.json",
    "vocab.json",
)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
MODEL_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")  # what Transformers would load


def code_files() -> list[Path]:
    """The files that go into every repo: those of the package's root but for the command and the package itself."""
    root = Path(modeling_shortv.__file__).parent
    return sorted(file for file in root.glob("*.py") if file.name not in ("__init__.py", "cli.py"))


def find_code(content) -> str | None:
    """What in a JSON file's content makes Transformers run code with `trust_remote_code=True` or fetch kernels."""
    if isinstance(content, dict):
        for name, value in content.items():
            if name == "auto_map" and value:
                return f"auto_map {value}"
            if name in ("_attn_implementation", "attn_implementation") and "/" in str(value):
                return f"{name} {value}"
    for part in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        if found := find_code(part):
            return found
    return None


def check_output_dir(
    output_dir: str | Path, names: Set[str] = frozenset(), kept: Set[str] = frozenset(), overwrite: bool = False
) -> set[str]:
    """Check that a repo may be written to `output_dir`, by the rule of `outputs.py`; writes nothing.

    Args:
        names: of the files to write.
        kept: names of files that are there already and are to be part of the repo.
        overwrite: replace files that were not written by [`build_repo`], or were changed since.

    Returns:
        The names of files there that the repo does not need: unchanged ones of an earlier repo, and its weights.

    Raises:
        ValueError: it cannot be written; it is not empty and holds no earlier repo; or something is in the way that is
            not to be overwritten. Weights beside something else than a ShortV repo are in the way in any case.
    """
    output_dir = Path(output_dir)
    outputs.check_folder(output_dir, overwrite, own=bool(kept or outputs.read_record(output_dir)))
    folders = [name for name in sorted(names) if (output_dir / name).is_dir()]
    if folders:
        raise ValueError(f"{output_dir} holds folders where files are to be written: {', '.join(folders)}")
    own = outputs.unchanged_files(output_dir)
    there = {file.name for file in output_dir.iterdir()} if output_dir.is_dir() else set()
    weights = {name for name in there if MODEL_WEIGHTS.fullmatch(name)} - own - set(kept)
    in_the_way = (there & set(names)) - own | weights
    if in_the_way and not overwrite:
        raise ValueError(
            f"{output_dir} holds {', '.join(sorted(in_the_way))}: not written by build-repo, or changed since; name "
            "another folder, or pass --overwrite to replace what is in the way"
        )
    if weights and not _is_shortv_repo(output_dir):
        raise ValueError(
            f"{output_dir} is not a ShortV repo and holds weights, {', '.join(sorted(weights))}, which are not "
            "overwritten; name another folder"
        )
    return (own | weights) - set(names) - set(kept)


def check_new_repo(
    folder: Path, option: str, model: str, config: PretrainedConfig, has_class: bool, output: Path, overwrite: bool
):
    """Check that a command may write a repo of `model` into `folder`, a new or empty one, before it measures anything.

    Args:
        option: that names the folder, for messages.
        config, has_class: as [`loading.any_config`] has them of the model.
        output: the folder of the command's results.

    Raises:
        ValueError: the family has no class; `folder` is the checkpoint, holds `output` or other files, or cannot be written.
    """
    if not has_class:
        raise ValueError(
            f"there is no ShortV class for {config.model_type!r}, so no repo of it can be written ({option})"
        )
    if _is_same(folder, model):
        raise ValueError(f"{option} {folder} is the checkpoint itself; name another directory")
    if output.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--output {output} is inside {option} {folder}; name two folders")
    outputs.check_folder(folder, overwrite)
    check_output_dir(folder, overwrite=overwrite)


def _is_same(one: str | Path, other: str | Path) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _is_shortv_repo(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config["model_type"].startswith("shortv_")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def build_repo(
    config: PretrainedConfig,
    output_dir: str | Path,
    processor_dir: str | Path | None = None,
    weights_dir: str | Path | None = None,
    license: str | None = None,
    overwrite: bool = False,
    ranking: LayerRanking | SearchResult | None = None,
) -> Path:
    """Write a repo that `AutoModelForImageTextToText.from_pretrained(output_dir, trust_remote_code=True)` loads.

    The repo holds `config.json` (with the base reference of `config`), the code files, a model card and, from
    `processor_dir`, the processor, tokenizer and chat template files and `generation_config.json`. It holds no weights
    unless there is a `weights_dir`: they are read from `config.base_model_name_or_path`.

    Args:
        config: a ShortV config, of any family.
        output_dir: the repo's directory: new, empty, an earlier repo of this function, or `processor_dir` itself, whose files
            are then left as they are. What
            it wrote there before is replaced, or removed if the repo no longer needs it; other files stay.
        processor_dir: a local directory with the files of the base checkpoint's processor.
        weights_dir: a local directory with the base checkpoint's safetensors, to be copied as they are; the config then
            references no base.
        license: of the base checkpoint, for the model card.
        overwrite: replace files in `output_dir` that this function did not write, or that were changed since.
        ranking: where the frozen layers come from, a ranking or a search: it becomes the repo's `ranking.json` or
            `search.json`, and the card says how they were chosen, with a plot where `matplotlib` is installed.

    Returns:
        The directory.

    Raises:
        ValueError: `config` is not a ShortV config or has bad fields; `processor_dir` holds no processor or
            `weights_dir` no safetensors; `output_dir` as in [`check_output_dir`]; the frozen layers are not the first ones of
            `ranking`, or not a row of the search.
    """
    if not str(getattr(config, "model_type", "")).startswith("shortv_"):
        raise ValueError(f"build_repo needs a ShortV config, got {type(config).__name__}")
    config.validate_shortv()
    origin = None if ranking is None else provenance_of(ranking)
    if origin is not None:
        origin.check(config)
    files = code_files()
    if processor_dir is not None:
        processor_files = [Path(processor_dir) / name for name in (*PROCESSOR_FILES, "generation_config.json")]
        processor_files = [file for file in processor_files if file.is_file()]
        if not any(file.name in PROCESSOR_FILES for file in processor_files):
            raise ValueError(f"{processor_dir} holds no processor files ({', '.join(PROCESSOR_FILES)})")
        for file in processor_files:
            if file.suffix == ".json" and (named := find_code(json.loads(file.read_text(encoding="utf-8")))):
                raise ValueError(f"{file} names code to run, which a ShortV repo must not: {named}")
        files += processor_files
    base, base_revision = config.base_model_name_or_path, config.base_model_revision
    config = copy.deepcopy(config)
    config.architectures = [type(config).__name__.replace("Config", "ForConditionalGeneration")]
    if weights_dir is not None:
        weights = sorted(file for pattern in WEIGHT_FILES for file in Path(weights_dir).glob(pattern))
        if not weights:
            raise ValueError(f"{weights_dir} holds no safetensors")
        files += weights
        config.base_model_name_or_path = config.base_model_revision = None

    output_dir = Path(output_dir)
    name = output_dir.resolve().name
    picture = origin.picture if origin is not None and plots.can_draw() else None
    card = reference_card(
        config,
        name,
        base=base,
        base_revision=base_revision,
        license=license,
        ranking=ranking,
        ranking_picture=picture,
    )
    kept = {file.name for file in files if _is_same(file.absolute().parent, output_dir)}
    made = {"config.json", "README.md", *({origin.file} if origin else ()), *({picture} if picture else ())}
    names = {*made, *(file.name for file in files)} - kept
    unneeded = check_output_dir(output_dir, names, kept, overwrite)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".shortv-") as temporary:
        staged = Path(temporary)
        for file in files:
            if file.name in names:
                shutil.copyfile(file, staged / file.name)
        config.save_pretrained(staged)  # last: it names code that is there only
        if config.tokenizer_is_the_file and (staged / "tokenizer.json").is_file():
            _declare_tokenizer(staged / "tokenizer_config.json")
        text, scores = str(card), _scores(output_dir, config)
        (staged / "README.md").write_text(eval_results.with_table(text, scores) if scores else text, encoding="utf-8")
        if origin is not None:
            origin.save(staged / origin.file)
            if picture is not None:
                origin.draw(staged / picture)
        outputs.install(staged, output_dir, kept, unneeded)
    return output_dir


def _scores(folder: Path, config: PretrainedConfig) -> list[dict]:
    """What `shortv eval` has measured on the repo that is built again, unless it was another one."""
    try:
        return eval_results.check(folder, config)
    except ValueError:  # `check_repo` and `publish` say so
        return []


def _declare_tokenizer(file: Path):
    """Name the class that upstream takes for the base. What the base itself names is believed of a model type that
    upstream does not know, by programs that load the tokenizer alone, and cuts prompts into other tokens."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if content.get("tokenizer_class") != "PreTrainedTokenizerFast":  # both lines know this name
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        content.setdefault("model_input_names", ["input_ids", "attention_mask"])  # else 4.x adds `token_type_ids`
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def build_repo_from_base(
    config: PretrainedConfig,
    output_dir: str | Path,
    processor_dir: str | Path | None = None,
    include_weights: bool = False,
    overwrite: bool = False,
    ranking: LayerRanking | SearchResult | None = None,
) -> Path:
    """[`build_repo`] with what it needs of the base checkpoint, local or on the Hub, at the commit that `config` pins.

    `output_dir`, `overwrite` and `ranking` as there.

    Raises:
        ValueError: as `build_repo`; `config` references no base; a base on the Hub is not pinned to a commit;
            `output_dir` is the base itself.
        OSError: the base cannot be found.
    """
    origin = None if ranking is None else provenance_of(ranking)
    if origin is not None:
        origin.check(config)
    base, revision = config.base_model_name_or_path, config.base_model_revision
    if base is None:
        raise ValueError("the config references no base checkpoint: it is of a model that holds its own weights")
    if Path(base).is_dir():
        base_dir = Path(base)
        if _is_same(output_dir, base_dir):
            raise ValueError(f"{output_dir} is the checkpoint itself; name another directory")
    elif not is_commit(revision):
        raise ValueError(f"the reference to {base} is not pinned to a commit: base_model_revision is {revision!r}")
    else:
        in_place = processor_dir is not None and _is_same(processor_dir, output_dir)
        kept = set(PROCESSOR_FILES) if in_place else set()
        names = {"config.json", "README.md", *(file.name for file in code_files())}
        names |= {origin.file, origin.picture} if origin is not None else set()
        check_output_dir(output_dir, names, kept, overwrite)  # before the download
        patterns = [*PROCESSOR_FILES, "generation_config.json", "README.md"]
        patterns += WEIGHT_FILES if include_weights else ()
        base_dir = Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
    if processor_dir is None and any((base_dir / name).is_file() for name in PROCESSOR_FILES):
        processor_dir = base_dir
    paper = paper_model(base)
    license = None if paper is None else paper.license
    if (base_dir / "README.md").is_file():
        license = ModelCard.load(base_dir / "README.md", ignore_metadata_errors=True).data.license or license
    weights_dir = base_dir if include_weights else None
    return build_repo(config, output_dir, processor_dir, weights_dir, license, overwrite, ranking)


def build_repo_like(
    model: str,
    config: PretrainedConfig,
    output_dir: str | Path,
    overwrite: bool = False,
    ranking: LayerRanking | SearchResult | None = None,
) -> Path:
    """A repo with this config for a checkpoint or ShortV repo (directory or Hub id): it references the checkpoint or, of a
    repo with weights of its own, copies them. Other arguments and errors as in [`build_repo`]."""
    if config.base_model_name_or_path is not None:
        return build_repo_from_base(config, output_dir, overwrite=overwrite, ranking=ranking)
    folder = model if Path(model).is_dir() else snapshot_download(model)
    return build_repo(config, output_dir, folder, weights_dir=folder, overwrite=overwrite, ranking=ranking)
