"""Nothing of the user's is lost or replaced unasked: what commands write to, refuse and try before they work."""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import make_config, make_model
from PIL import Image
from processor_files import write_processor
from test_base_weights import write_checkpoint
from transformers import AutoConfig

from shortv_hf.benchmark import run as benchmark
from shortv_hf.benchmark import subjects as benchmark_models
from shortv_hf.data import outputs
from shortv_hf.hub import build as hub
from shortv_hf.hub import build_repo, loading
from shortv_hf.hub.check import check_files
from shortv_hf.layer_contribution import calibration
from shortv_hf.layer_contribution import ranking as lcs
from shortv_hf.pictures import plots


typer_testing = pytest.importorskip("typer.testing")
from shortv_hf import cli  # noqa: E402


pytestmark = pytest.mark.once

SCRIPTS = Path(__file__).parents[2] / "scripts"


def content(folder):
    """Every file under a folder, with its bytes; `None` for folders."""
    return {str(file.relative_to(folder)): file.read_bytes() if file.is_file() else None for file in folder.rglob("*")}


def invoke(*arguments):
    return typer_testing.CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refusal(*arguments):
    """The one line of the `ValueError` with which a command ends."""
    result = invoke(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, ValueError), (result.output, result.exception)
    assert len(str(result.exception).splitlines()) == 1
    return str(result.exception)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An original checkpoint with a processor and a license."""
    base = write_processor(write_checkpoint(tmp_path_factory.mktemp("base") / "base", make_model()))
    (base / "README.md").write_text("---\nlicense: mit\n---\nA base.\n")
    return base


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory: a file, a folder with the user's notes, and a picture."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("notes").mkdir()
    Path("notes/notes.txt").write_text("mine")
    Image.new("RGB", (20, 14), "red").save("picture.png")
    return tmp_path


def build(base, *options, output="repo"):
    return "build-repo", base, "--output", output, "--layers", "3,1", *options


def rank(base, *options):
    return "lc", base, "--data", "shapes", "--samples", 1, "--metric", "random", *options


def draw(base, *options):
    return "visualize", "--model", base, "--image", "picture.png", "--method", "vtw:k=2", *options


def bench(base, *options):
    return "bench", "--models", "cpu-small", *options


# ----------------------------------------------------------------------------------------------- before the work starts


NO_FOLDER = ("file", "is a file; name a folder"), ("file/deep/er", "file/deep/er cannot be written: Not a directory")
NO_FILE = (
    ("notes.json", "notes.json is a folder; name a file"),
    ("file/x.json", "file/x.json cannot be written: there is no folder file"),
    ("nodir/x.json", "nodir/x.json cannot be written: there is no folder nodir"),
)


@pytest.mark.parametrize(
    ("command", "option", "path", "message"),
    [
        *((build, "--output", *case) for case in NO_FOLDER),
        *((rank, "--output", *case) for case in NO_FOLDER),
        *((rank, "--save-model", *case) for case in NO_FOLDER),
        *((draw, "--output", *case) for case in NO_FILE),
        *((bench, "--output", *case) for case in NO_FILE),
        (build, "--output", "notes", "notes is not empty; name another folder, or pass --overwrite"),
        (rank, "--output", "notes", "notes is not empty; name another folder, or pass --overwrite"),
        (rank, "--save-model", "notes", "notes is not empty; name another folder, or pass --overwrite"),
        (draw, "--output", "picture.png", "already there: picture.png; name another file, or pass --overwrite"),
        (
            bench,
            "--output",
            "there.json",
            "already there: there.json, there.md; name another file, or pass --overwrite",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_outputs_are_tried_before_the_work(base, folder, monkeypatch, command, option, path, message):
    """No weights are loaded, nothing is measured or copied, and nothing is there that was not there before."""

    def work(*_, **__):
        raise AssertionError("the work has started")

    for module, name in ((loading, "load"), (benchmark, "device_peak"), (shutil, "copyfile"), (outputs, "install")):
        monkeypatch.setattr(module, name, work)
    Path("notes.json").mkdir()
    for name in ("there.json", "there.md"):
        Path(name).write_text("mine")
    before = content(folder)
    more = ("--num-layers", 2) if command is rank else ()
    assert message in refusal(*command(base, *more, option, path))
    assert content(folder) == before


def test_a_default_output_is_tried_too(base, folder):
    Path("lc-base-random").write_text("mine")
    assert "lc-base-random is a file" in refusal(*rank(base))
    Path("patches.png").write_text("mine")
    assert "already there: patches.png" in refusal(*draw(base))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    for check, name in ((outputs.check_folder, "a/b"), (outputs.check_files, "a.json")):
        with pytest.raises(ValueError, match=f"{name} cannot be written: Permission denied"):
            check(tmp_path / name)


def test_checking_leaves_nothing_behind(folder):
    before = content(folder)
    outputs.check_folder("new/folder")
    outputs.check_files("new.json")
    assert content(folder) == before


def test_a_repo_is_checked_before_anything_is_downloaded(folder, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", fail)
    config = make_config(base_model_name_or_path="org/base", base_model_revision="0123456789" * 4)
    with pytest.raises(ValueError, match="notes is not empty"):
        hub.build_repo_from_base(config, "notes", include_weights=True)
    with pytest.raises(RuntimeError, match="it failed"):
        hub.build_repo_from_base(config, "new", include_weights=True)


def load_script(name):
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("compare_reductions", ["/no/model", "--output", "there.json"], "already there: there.json, there.md; name"),
        ("compare_reductions", ["/no/model", "--output", "nodir/x.json"], "there is no folder nodir"),
        ("compare_reductions", ["/no/model", "--output", "x.md"], "which is where the table goes"),
        ("reproduce_ablations", ["/no/model", "--output", "there"], "already there: there.json, there.md; name"),
        ("reproduce_ablations", ["/no/model", "--output", "nodir/x"], "there is no folder nodir"),
        ("reproduce_ablations", ["/no/v1.6"], "already there: ablations-v1.6-layers.png; name"),
        ("test_matrix", ["--output", "there.json"], "already there: there.json, there.md; name"),
        ("test_matrix", ["--output", "file/x.json"], "there is no folder file"),
        ("make_hub_configs", ["--output", "configs"], "shortv-llava-v1.6-vicuna-13b-hf is not empty; name another"),
        ("make_hub_configs", ["--output", "file"], "cannot be written: Not a directory"),
        ("train_shapes_vlm", ["--run-dir", "notes"], "notes is not empty; name another folder, or pass --overwrite"),
        (
            "train_shapes_vlm",
            ["--run-dir", "run", "--export", "--output", "notes"],
            "notes is not empty; name another",
        ),
        ("train_shapes_vlm", ["--run-dir", "run", "--export"], "shortv-shapes-demo is not empty; name another"),
    ],
    ids=str,
)
def test_scripts_try_their_outputs(folder, monkeypatch, capsys, name, arguments, message):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = load_script(name)
    if name == "test_matrix":
        monkeypatch.setattr(script, "run_core", None)
    for file in ("there.json", "there.md", "ablations-v1.6-layers.png"):
        Path(file).write_text("[]")
    mine = Path("configs/shortv-llava-v1.6-vicuna-13b-hf/config.json")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    before = content(folder)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert content(folder) == before


def test_matrix_keeps_its_own_rows(folder, monkeypatch):
    script = load_script("test_matrix")
    row = {"torch": "2", "python": "3", "passed": 1, "failed": 0, "skipped": 0, "seconds": 1}
    for number, options in enumerate(([], [], ["--overwrite"])):
        monkeypatch.setattr(script, "run_core", lambda *_, number=number: {"transformers": str(number), **row})
        monkeypatch.setattr(sys, "argv", ["test_matrix", "--installed", "--output", "m.json", *options])
        assert script.main() == 0
        rows = [each["transformers"] for each in json.loads(Path("m.json").read_text())["rows"]]
        assert rows == [["0"], ["0", "1"], ["2"]][number]


# --------------------------------------------------------------------------------------------------------------- repos


@pytest.mark.parametrize(
    "mine",
    [
        {"README.md": "My project.", "config.json": "{}"},
        {"README.md": "My project."},
        {"notes.txt": "mine"},
        {"model.safetensors": "mine"},
        {"config.json": '{"model_type": "shortv_llava"}'},
        {outputs.RECORD: "[]", "README.md": "My project."},
        {outputs.RECORD: '{"files": {"README.md": "another hash"}}', "README.md": "My project."},
    ],
    ids=lambda files: "+".join(files),
)
def test_a_folder_of_the_users_is_refused(base, folder, mine):
    Path("proj").mkdir()
    for name, text in mine.items():
        Path("proj", name).write_text(text)
    before = content(folder)
    message = refusal(*build(base, output="proj"))
    assert message.startswith("proj ") and "--overwrite" in message
    assert content(folder) == before


def test_overwrite_replaces_files_of_the_same_names_only(base, folder):
    Path("notes/README.md").write_text("mine")
    result = invoke(*build(base, "--overwrite", output="notes"))
    assert result.exit_code == 0, result.output
    assert Path("notes/notes.txt").read_text() == "mine" and "license: mit" in Path("notes/README.md").read_text()
    assert invoke(*build(base, output="notes")).exit_code == 0  # what was asked for once is its own now


def test_hidden_files_do_not_count(base, folder):
    Path("repo/.git").mkdir(parents=True)
    assert invoke(*build(base)).exit_code == 0


def test_a_repo_is_built_again_around_the_users_files(base, folder):
    assert invoke(*build(base)).exit_code == 0
    first = content(folder / "repo")
    Path("repo/notes.txt").write_text("mine")
    Path("repo/adapter_model.safetensors").write_text("mine")
    result = invoke("build-repo", base, "--layers", 0, "--output", "repo")
    assert result.exit_code == 0, result.output
    assert AutoConfig.from_pretrained("repo").shortv_layers == [0]
    assert Path("repo/notes.txt").read_text() == Path("repo/adapter_model.safetensors").read_text() == "mine"
    assert content(folder / "repo").keys() == first.keys() | {"notes.txt", "adapter_model.safetensors"}


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "decoder_layer.py", "model.safetensors"])
def test_what_the_user_changed_in_a_repo_is_refused(base, folder, name):
    """Weights too: a model that was trained and saved into the folder."""
    assert invoke(*build(base, "--include-weights")).exit_code == 0
    with open(Path("repo", name), "a") as file:
        file.write("\n")
    before = content(folder)
    for options in ([], ["--include-weights"]):
        message = refusal(*build(base, *options))
        assert message.startswith(f"repo holds {name}: not written by build-repo, or changed since")
        assert "--overwrite" in message and content(folder) == before
    assert invoke(*build(base, "--overwrite")).exit_code == 0
    assert not Path("repo/model.safetensors").exists() and not problems("repo")


def problems(repo):
    """What is wrong with a repo, but for its base, which is in a directory here."""
    return [check for check in check_files(repo) if check.problem and "nobody else can load" not in check.problem]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_rebuild_removes_the_weights_it_copied(tmp_path, shards):
    base = write_processor(write_checkpoint(tmp_path / "base", make_model(), shards=shards))
    repo = tmp_path / "repo"
    assert invoke(*build(base, "--include-weights", output=repo)).exit_code == 0
    copied = [file.name for file in repo.glob("*.safetensors*")]
    assert len(copied) == (1 if shards == 1 else 4)
    result = invoke(*build(base, output=repo))
    assert result.exit_code == 0, result.output
    assert not list(repo.glob("*.safetensors*")) and not problems(repo)


def test_a_rebuild_removes_other_shards(tmp_path):
    """Transformers would read the single file that lies beside an index."""
    for name, shards in (("one", 1), ("two", 2)):
        write_processor(write_checkpoint(tmp_path / name, make_model(), shards=shards))
        assert invoke(*build(tmp_path / name, "--include-weights", output=tmp_path / "repo")).exit_code == 0
    names = {file.name for file in (tmp_path / "repo").glob("*.safetensors*")}
    assert names == {file.name for file in (tmp_path / "two").glob("*.safetensors*")}


def test_a_rebuild_removes_code_of_an_older_layout(tmp_path, monkeypatch):
    old = tmp_path / "older.py"
    old.write_text("import torch\n")
    files = hub.code_files()
    monkeypatch.setattr(hub, "code_files", lambda: [*files, old])
    repo = build_repo(make_config(), tmp_path / "repo")
    (repo / "mine.py").write_text("import torch\n")
    assert (repo / "older.py").is_file()
    monkeypatch.setattr(hub, "code_files", lambda: list(files))
    build_repo(make_config(), repo)
    assert not (repo / "older.py").exists() and (repo / "mine.py").is_file()


def test_in_place_over_the_processor_directory(tmp_path):
    """Twice: the processor files stay, whoever copied them there, and what the user changed in them."""
    processor = write_processor(tmp_path / "processor")
    names = {file.name for file in processor.iterdir()}
    repo = build_repo(make_config(), tmp_path / "repo", processor_dir=processor)
    (repo / "tokenizer_config.json").write_text("{}")
    for folder in (processor, repo, processor, repo):
        build_repo(make_config(), folder, processor_dir=folder)
        assert names < {file.name for file in folder.iterdir()}
    build_repo(make_config(), repo)  # without a processor: the copies go, what was changed stays
    assert names & {file.name for file in repo.iterdir()} == {"tokenizer_config.json"}
    assert (repo / "tokenizer_config.json").read_text() == "{}"
    (processor / "config.json").write_text("mine")
    with pytest.raises(ValueError, match="processor holds config.json: not written by build-repo"):
        build_repo(make_config(), processor, processor_dir=processor)


def test_in_place_over_a_models_own_weights(tmp_path):
    own = write_processor(tmp_path / "own")
    make_model().save_pretrained(own)
    before = content(own)
    arguments = {"output_dir": own, "processor_dir": own, "weights_dir": own}
    with pytest.raises(ValueError, match="own holds .*config.json.*--overwrite"):
        build_repo(make_config(shortv_layers=[1]), **arguments)
    build_repo(make_config(shortv_layers=[1]), **arguments, overwrite=True)
    build_repo(make_config(shortv_layers=[0]), **arguments)  # again
    assert content(own)["model.safetensors"] == before["model.safetensors"] and not problems(own)


def test_weights_that_are_not_of_a_shortv_repo_are_never_overwritten(base, tmp_path):
    other = write_checkpoint(tmp_path / "other", make_model(seed=1))
    before = content(other)
    for options in ([], ["--include-weights"]):
        assert "is not a ShortV repo and holds weights" in refusal(*build(base, "--overwrite", *options, output=other))
    assert content(other) == before


def test_a_build_that_fails_changes_nothing(base, folder, monkeypatch):
    assert invoke(*build(base)).exit_code == 0
    before, copy = content(folder), shutil.copyfile

    def copyfile(source, target):
        if source.name == "tokenizer_config.json":
            raise OSError(28, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    result = invoke("build-repo", base, "--layers", 0, "--output", "repo")
    assert "No space left" in str(result.exception) and content(folder) == before


def test_files_of_a_repo_have_the_usual_permissions(tmp_path):
    repo = build_repo(make_config(), tmp_path / "repo")
    (tmp_path / "usual").write_text("")
    assert {file.stat().st_mode for file in repo.iterdir()} == {(tmp_path / "usual").stat().st_mode}


# ------------------------------------------------------------------------------------------------------------- results


def test_rankings_are_not_replaced_unasked(base, folder):
    assert invoke(*rank(base)).exit_code == 0
    assert {file.name for file in Path("lc-base-random").iterdir()} == {"ranking.json", "layer_scores.png"}
    before = content(folder)
    assert "lc-base-random is not empty" in refusal(*rank(base, "--seed", 1))
    assert content(folder) == before
    assert invoke(*rank(base, "--seed", 1, "--overwrite")).exit_code == 0
    assert json.loads(Path("lc-base-random/ranking.json").read_text())["seed"] == 1


def test_default_folder_of_a_ranking_names_model_and_metric(base, folder):
    assert invoke(*rank(base, "--metric", "cosine", "--no-text")).exit_code == 0
    shutil.copytree(base, "other")
    assert invoke(*rank("other")).exit_code == 0
    assert Path("lc-base-cosine/ranking.json").is_file() and Path("lc-other-random/ranking.json").is_file()
    assert "lc-MODEL-METRIC" in re.sub(r"[\s│]+", " ", invoke("lc", "--help").output)


def test_saved_models_are_not_replaced_unasked(base, folder):
    """Not even those of an earlier ranking."""
    assert invoke(*rank(base, "--output", "a", "--save-model", "repo", "--num-layers", 3)).exit_code == 0
    again = rank(base, "--output", "b", "--save-model", "repo", "--num-layers", 1)
    before = content(folder)
    assert "repo is not empty" in refusal(*again) and content(folder) == before
    assert invoke(*again, "--overwrite").exit_code == 0
    assert len(AutoConfig.from_pretrained("repo").shortv_layers) == 1


def test_overwrite_replaces_a_saved_shortv_model(base, folder):
    """One with weights of its own: they do not stay beside the reference."""
    make_model().save_pretrained("own")
    save = rank(base, "--save-model", "own", "--num-layers", 1)
    assert "own is not empty" in refusal(*save)
    result = invoke(*save, "--overwrite")
    assert result.exit_code == 0, result.output
    assert not Path("own/model.safetensors").exists() and not problems("own")


def test_a_checkpoint_is_no_place_for_a_saved_model(base, folder):
    write_checkpoint(Path("other"), make_model())
    before = content(folder)
    save = rank(base, "--save-model", "other", "--num-layers", 1, "--overwrite")
    assert "other is not a ShortV repo and holds weights" in refusal(*save) and content(folder) == before
    assert "name two folders" in refusal(*rank(base, "--save-model", "x", "--num-layers", 1, "--output", "x/ranking"))


def test_pictures_are_not_replaced_unasked(base, folder):
    make_model().save_pretrained("model")
    write_processor(Path("model"))
    assert invoke(*draw("model", "--output", "new.png")).exit_code == 0
    before = content(folder)
    assert "already there: new.png" in refusal(*draw("model", "--output", "new.png"))
    assert content(folder) == before
    Path("new.png").write_text("mine")
    assert invoke(*draw("model", "--output", "new.png", "--overwrite")).exit_code == 0
    Image.open("new.png").verify()


@pytest.fixture
def tiny_bench(folder, monkeypatch):
    subject = benchmark_models.Subject(make_config(shortv_layers=[3, 1]), swept=(1, 3), vtw_layer=2)
    monkeypatch.setitem(benchmark_models.SUBJECTS, "cpu-small", lambda: subject)
    return ["bench", "--methods", "shortv", "--repeats", 1, "--images", 1, "--peak-tflops", 1, "--bandwidth-gbs", 1]


def test_reports_are_not_replaced_unasked(tiny_bench, folder):
    Path("r.md").write_text("mine")
    assert "already there: r.md" in refusal(*tiny_bench, "--output", "r.json")
    result = invoke(*tiny_bench, "--output", "r.json", "--overwrite")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("r.json").read_text())["results"] and "cpu-small" in Path("r.md").read_text()
    Image.open("r.png").verify()


# ------------------------------------------------------------------------------------- what is kept when something fails


def fail(*_, **__):
    raise RuntimeError("it failed")


def test_a_report_is_kept_when_the_chart_fails(tiny_bench, folder, monkeypatch):
    monkeypatch.setattr(plots, "plot_curves", fail)
    result = invoke(*tiny_bench, "--images", "1,2", "--output", "r.json")
    assert "it failed" in str(result.exception)
    assert {row["images"] for row in json.loads(Path("r.json").read_text())["results"]} == {1, 2}  # all prompts
    assert Path("r.md").read_text().strip() in result.output and not Path("r.png").exists()


@pytest.mark.parametrize(
    ("module", "name", "kept"),
    [
        (plots, "plot_layer_scores", {"ranking.json"}),
        (calibration, "measure_costs", {"ranking.json", "layer_scores.png"}),
        (hub, "build_repo", {"ranking.json", "layer_scores.png"}),
    ],
    ids=["plot", "curve", "repo"],
)
def test_a_ranking_is_kept_when_a_later_step_fails(base, folder, monkeypatch, module, name, kept):
    monkeypatch.setattr(module, name, fail)
    result = invoke(*rank(base, "--max-kl", 1, "--output", "out", "--save-model", "repo"))
    assert "it failed" in str(result.exception)
    assert {file.name for file in Path("out").iterdir()} == kept and not Path("repo").exists()
    assert len(lcs.LayerRanking.load("out/ranking.json").order) == 4


def test_files_appear_whole_or_not_at_all(folder):
    for name in ("picture.png", "new.png"):
        before = content(folder)
        with pytest.raises(RuntimeError), outputs.whole_file(name) as file:
            assert file.suffix == ".png"
            file.write_text("half")
            assert content(folder).keys() == before.keys() | {file.name}
            fail()
        assert content(folder) == before


def test_a_folder_where_a_file_is_to_be_written(tmp_path):
    (tmp_path / "repo" / "config.json").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds folders where files are to be written: config.json"):
        hub.build_repo(make_model().config, tmp_path / "repo", overwrite=True)
    assert [file.name for file in (tmp_path / "repo").iterdir()] == ["config.json"]


def test_links_and_devices_stay_what_they_are(folder):
    Path("link").symlink_to("notes/notes.txt")
    outputs.write_text("link", "new")
    assert Path("link").is_symlink() and Path("notes/notes.txt").read_text() == "new"
    read, write = os.pipe()
    outputs.write_text(f"/dev/fd/{write}", "new")
    assert os.read(read, 9) == b"new"
