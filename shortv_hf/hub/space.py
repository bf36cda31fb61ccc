"""A Space: the demonstration in the browser, on the Hub. Its folder says how; the package and the demonstration model, which
are on no registry, go along."""

from pathlib import Path

from .loading import demo_model


NEEDED = ("README.md", "app.py", "requirements.txt")
DEMO = "shortv_hf/demo"  # where an installed package has the demonstration model


def check_space(folder: Path) -> None:
    """Raises `ValueError` unless the folder holds what a Gradio Space needs."""
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no Space: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    end = lines.index("---", 1) if lines[:1] == ["---"] and "---" in lines[1:] else 0
    if "sdk: gradio" not in lines[:end]:
        raise ValueError(f"{folder} is no Space: its README.md does not begin with metadata that say `sdk: gradio`")


def package_files() -> dict[str, Path]:
    """What a Space needs beside its own folder: path in the Space → file."""
    package = Path(__file__).parent.parent
    files = {f"{package.name}/{file.relative_to(package).as_posix()}": file for file in _files(package)}
    return files | {f"{DEMO}/{file.name}": file for file in _files(Path(demo_model()))}


def _files(folder: Path) -> list[Path]:
    """Its files, but for caches, hidden ones and texts for readers of the repository."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and file.suffix != ".md"
        and not any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(folder).parts)
    )
