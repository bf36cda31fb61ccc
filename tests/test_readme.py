"""The READMEs: their Python runs, their commands are ones that exist, their links lead somewhere.

Blocks of a README run in order, in one folder and one namespace, with a tiny model in the place of the real ones; of
commands, what needs a server, a GPU, the Hub or hours is parsed. A block or command of an unknown kind fails.
"""

import json
import re
import shlex
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from helpers import make_model
from PIL import Image
from processor_files import write_processor
from test_base_weights import write_checkpoint
from transformers import LlavaForConditionalGeneration

import shortv_hf
from shortv_hf.layer_contribution import LayerRanking


ROOT = Path(__file__).parent.parent
READMES = (
    "README.md", "shortv_hf/README.md", "shortv_hf/evaluate/README.md", "shortv_hf/serving/README.md", "hub_configs/README.md", "scripts/results/README.md",
    "tests/README.md",
)  # fmt: skip
MOST_LINES = 140  # of the front page
RUN = {"chat", "flops", "build-repo", "check-repo", "lc", "search", "visualize", "vtw-k", "bench"}
PARSED = {"publish", "serve", "demo", "eval", "answer", "score"}  # need the Hub, a server, lmms-eval, benchmarks' data
# Not ours; what they are given is checked as far as it is ours.
TOOLS = {"pip", "ruff", "mypy", "hf", "pytest", "vlmeval", "lmms-eval", "vllm"}
DIRECTORY_OF_THE_CLONE = re.compile(r"\.venv(-test)?/bin/")


def blocks(readme: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block, in order."""
    found, language, lines = [], None, []
    for line in (ROOT / readme).read_text(encoding="utf-8").splitlines():
        if line.startswith("```") and language is None:
            language, lines = line[3:].strip(), []
        elif line.startswith("```"):
            found.append((language, "\n".join(lines)))
            language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{readme}: a block is not closed"
    return found


def commands(block: str) -> list[list[str]]:
    """The commands of a bash block as words, those between `&&` apart, without comments and assignments before them."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        command = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                if command or not re.fullmatch(r"[A-Za-z_]+=.*", word):
                    command.append(word)
            elif command:
                found.append(command)
                command = []
    return found


def kind(command: list[str]) -> str:
    """What is done with a command: "run", "parse", "script" or "tool". Raises `LookupError` for an unknown one."""
    program, *arguments = [DIRECTORY_OF_THE_CLONE.sub("", word) for word in command]
    if launched(command) is not None:
        return "launched"
    if program == "shortv":
        (name,) = arguments[:1] or [""]
        if name in RUN | PARSED:
            return "run" if name in RUN and not needs_more(arguments) else "parse"
    elif program in ("python", "python3"):
        if arguments[0] == "-m" and arguments[1] in TOOLS | {"venv"}:
            return "tool"
        if re.fullmatch(r"scripts/\w+\.py", arguments[0]):
            return "script"
    elif program in TOOLS:
        return "tool"
    raise LookupError(f"no category for: {shlex.join(command)}")


def launched(command: list[str]) -> list[str] | None:
    """The arguments of `shortv` on several processes, if it is that."""
    if command[:2] != ["accelerate", "launch"] and command[1:3] != ["-m", "torch.distributed.run"]:
        return None
    return command[command.index("shortv_hf.cli") + 1 :] if "shortv_hf.cli" in command else None


def needs_more(arguments: list[str]) -> bool:
    """A GPU, the Hub, or a model that takes videos."""
    return bool({"cuda", "--video"} & set(arguments)) or any(argument.startswith("ME/") for argument in arguments)


def check_tool(command: list[str]):
    """Extras are those of the package, and paths are there."""
    extras = re.search(r"\[project.optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    known = set(re.findall(r"^(\w+) = \[", extras, re.M))
    for word in command[1:]:
        if named := re.fullmatch(r"\.\[([\w,]+)\]", word):
            assert set(named[1].split(",")) <= known, command
        elif re.match(r"(tests|scripts|hub_configs)/", word):
            assert (ROOT / word).exists(), command


def check_script(command: list[str]):
    """The script is there, and takes every option that it is given."""
    source = (ROOT / next(word for word in command if word.startswith("scripts/"))).read_text()
    for word in command:
        if word.startswith("-"):
            assert re.search(rf"""add\w*\(\s*(".*?", )?"{word}\"""", source), f"{command}: no option {word}"


def check_command(arguments: list[str]):
    """The parser of the command takes the line."""
    typer = pytest.importorskip("typer")
    from shortv_hf import cli

    app = typer.main.get_command(cli.app)
    app.commands[arguments[0]].make_context(arguments[0], list(arguments[1:]))


class World:
    """A folder with all that the blocks name: a tiny model of 32 layers in the place of the real ones, a photo, pictures
    with prompts, an adapter, a ranking. A context manager: inside, the folder is the current one."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.namespace, self.monkeypatch = folder, {}, monkeypatch
        model = make_model(text="deep")
        self.base = write_processor(write_checkpoint(folder / "base", model), tokenizer="prepend")
        monkeypatch.chdir(folder)
        Image.linear_gradient("L").resize((40, 30)).convert("RGB").save("photo.jpg")
        Path("my-pictures").mkdir()
        Image.new("RGB", (20, 20), "red").save("my-pictures/0.png")
        Path("my-pictures/prompts.jsonl").write_text('{"image": "0.png", "prompt": "what is this"}\n')
        scores = [float(layer) for layer in range(32)]
        LayerRanking(scores, list(range(32)), "lc", "visual", "forward", 0).save("ranking.json")
        openai = types.ModuleType("openai")
        openai.OpenAI = MagicMock()
        monkeypatch.setitem(sys.modules, "openai", openai)

    def make_adapter(self):
        peft = pytest.importorskip("peft")
        model = LlavaForConditionalGeneration.from_pretrained(self.base, dtype=torch.float32)
        target = r".*language_model.*\.(q_proj|v_proj)"
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=target)).save_pretrained("my-adapter")

    def python(self, block: str):
        if "my-adapter" in block:
            self.make_adapter()
        for real, tiny in (
            ("llava-hf/llava-1.5-7b-hf", str(self.base)),
            ("OWNER/ANOTHER-MODEL", str(self.base)),
            ("shortv_layers=[...]", "shortv_layers=[3, 1]"),
            ('("gqa,flickr30k", processor)', '("shapes", processor, 2)'),
            ("max_new_tokens=100", "max_new_tokens=2"),
            ('device_map="auto"', 'device_map="cpu"'),
        ):
            block = block.replace(real, tiny)
        exec(compile(block, "README", "exec"), self.namespace)

    def run(self, arguments: list[str]):
        """A `shortv` command, on small data."""
        testing = pytest.importorskip("typer.testing")
        from shortv_hf import cli

        name, *words = arguments
        words = [str(self.base) if word == "llava-hf/llava-1.5-7b-hf" else word for word in words]
        words = [str(ROOT / word) if word.startswith("hub_configs/") else word for word in words]
        words = [{"gqa,flickr30k": "shapes", "0.55": "0.9"}.get(word, word) for word in words]  # 16 visual tokens
        if "--base-revision" in words:  # a directory has none
            at = words.index("--base-revision")
            del words[at : at + 2]
        words += SMALL.get(name, ())
        if name == "bench":
            words += ["--models", self.tiny_repo()]
        folder = Path(words[words.index("--output") + 1]) if "--output" in words else None
        result = testing.CliRunner().invoke(cli.app, [name, *words])
        if name == "check-repo":
            found = result.output.splitlines()[-1]  # a base that is a local directory is no use to others
            assert found.endswith(("in order", "not to be trusted as it is: base")), result.output
        else:
            assert result.exit_code == 0, (arguments, result.output, result.exception)
            assert folder is None or folder.exists(), arguments
        return result.output

    def tiny_repo(self) -> str:
        make_model(shortv_layers=[3, 1]).save_pretrained("tiny")
        return "tiny"


SMALL = {
    "chat": ("--max-new-tokens", "12"),
    "lc": ("--samples", "1"),
    "search": ("--samples", "2", "--finalists", "4"),
    "bench": ("--repeats", "1", "--images", "1", "--text-tokens", "8", "--peak-tflops", "1", "--bandwidth-gbs", "1"),
}


@pytest.mark.once
@pytest.mark.parametrize("readme", READMES)
def test_every_block_has_a_category(readme):
    for language, content in blocks(readme):
        assert language in ("python", "bash"), f"{readme}: a block of {language or 'no language'}"
        for command in commands(content) if language == "bash" else ():
            kind(command)


@pytest.mark.once
def test_an_unknown_command_has_none():
    for command in ("shortv fly", "python scripts/../x.py", "python -m antigravity", "curl x", "shortv"):
        with pytest.raises(LookupError):
            kind(shlex.split(command))
    assert commands("A=1 pip install x && \\\n shortv chat --image y  # z") == [
        ["pip", "install", "x"], ["shortv", "chat", "--image", "y"],
    ]  # fmt: skip


@pytest.fixture
def one_thread():
    """Tiny models gain nothing from more, and lose much where others work on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("readme", READMES)
def test_blocks(readme, tmp_path, monkeypatch):
    """In order: Python is executed, commands are run or parsed."""
    world = World(tmp_path, monkeypatch)
    outputs = []
    for language, content in blocks(readme):
        if language == "python":
            world.python(content)
            continue
        for command in commands(content):
            command = [DIRECTORY_OF_THE_CLONE.sub("", word) for word in command]
            what = kind(command)
            if what == "tool":
                check_tool(command)
            elif what == "script":
                check_script(command)
            elif what == "launched":
                check_command(launched(command) or [])
            else:
                check_command(command[1:])
                if what == "run":
                    outputs.append(world.run(command[1:]))
    if readme == "README.md":
        assert "the answers agree" in outputs[0] and "ShortV: 52." in outputs[0]  # what it says of the first command


def anchors(file: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.once
@pytest.mark.parametrize("readme", READMES)
def test_links(readme):
    folder = (ROOT / readme).parent
    text = re.sub(r"^```.*?^```", "", (ROOT / readme).read_text(encoding="utf-8"), flags=re.S | re.M)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        file = (folder / path if path else ROOT / readme).resolve()
        assert file.exists() and file.is_relative_to(ROOT), f"{readme}: {link}"
        assert not anchor or anchor in anchors(file), f"{readme}: {link}"


@pytest.mark.once
@pytest.mark.parametrize("readme", READMES)
def test_files_that_are_named_are_there(readme):
    """`scripts/….py` and `test_….py` in the text."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    gone = {"scripts/benchmark.py", "scripts/prefill_memory.py"}  # which READMEs say are `shortv bench` now
    for name in set(re.findall(r"\bscripts/\w+\.py", text)) - gone:
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"(?<!/)\btest_\w+\.py", text):
        assert (ROOT / "tests" / name).is_file(), name


def measured_on_a_gpu(readme: str) -> list[list[str]]:
    """Cells of the rows whose first one links a report of the H200."""
    lines = (ROOT / readme).read_text(encoding="utf-8").splitlines()
    return [line.strip("| ").split(" | ") for line in lines if re.match(r"\| \[[^]]+\]\([\w/]*h200-", line)]


@pytest.mark.once
@pytest.mark.parametrize("readme", ["README.md", "scripts/results/README.md"])
def test_figures_of_the_gpu_are_those_of_the_reports(readme):
    rows = [cells for cells in measured_on_a_gpu(readme) if len(cells) == 9]
    assert len(rows) >= 4
    for cells in rows:
        link, frozen, batch, v, *figures = cells
        report = json.loads((ROOT / readme).parent.joinpath(re.search(r"\((.*)\.md\)", link)[1] + ".json").read_text())
        mode = "compiled" if link.endswith(", compiled") else "eager"
        layers = re.fullmatch(r"(\d+) of \d+", frozen)
        found = {row["method"]: row for row in report["results"] if (row["batch"], row["mode"]) == (int(batch), mode)}
        row, stock = found[f"ShortV N={layers[1]}" if layers else frozen], found["stock"]
        before, after = (1000 * each["prefill"]["median_s"] for each in (stock, row))
        expected = [
            f"{row['prefill']['speed_up']:.2f}× ({in_ms(before)} → {in_ms(after)} ms)",
            f"{row['language_model']['bound']:.2f}×",
            f"{row['time_to_first_token']['speed_up']:.2f}×",
            f"{row['output_token']['speed_up']:.2f}×" if "output_token" in row else "–",
            f"{100 * row['peak_memory_bytes'] / stock['peak_memory_bytes']:.0f} %",
        ]
        assert (int(v), figures) == (row["visual_tokens"], expected), link


def in_ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


@pytest.mark.once
def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.once
def test_every_file_of_the_package_is_described():
    """In the tables of its README; methods are one line together."""
    text = (ROOT / "shortv_hf" / "README.md").read_text(encoding="utf-8")
    package = Path(shortv_hf.__file__).parent
    names = [file.name for file in package.glob("*.py") if not file.name.startswith("reduction_")]
    names += [file.parent.name + "/" for file in package.glob("*/__init__.py")]
    assert [name for name in names if f"| [`{name}`](" not in text] == []


@pytest.mark.once
def test_citation():
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["cff-version"] == "1.2.0" and found["version"] == shortv_hf.__version__ and found["message"]
    assert found["type"] == "software" and found["license"] == "Apache-2.0" and found["authors"]
    paper, card = found["preferred-citation"], (ROOT / "hub_configs" / "shortv-shapes-demo" / "README.md").read_text()
    assert f"title={{{paper['title']}}}" in card and f"pages={{{paper['start']}--{paper['end']}}}" in card
    authors = [f"{each['family-names']}, {each['given-names']}" for each in paper["authors"]]
    assert f"author={{{' and '.join(authors)}}}" in card
