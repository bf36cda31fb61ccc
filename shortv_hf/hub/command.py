"""`shortv build-repo`, `shortv check-repo`, `shortv publish`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..command_line.options import Device, Reduction, load_config, parse_layers, parse_reduction


def build_repo(
    model: Annotated[str, typer.Argument(help="Hub id or directory of the original checkpoint.")],
    output: Annotated[
        Path, typer.Option(help="Folder to write: new, empty, or what build-repo wrote earlier, which is built again.")
    ],
    layers: Annotated[
        str | None, typer.Option(help="Layers to freeze, most ineffective first, e.g. 31,29,30.")
    ] = None,
    ranking: Annotated[Path | None, typer.Option(help="ranking.json to take the layers from, instead.")] = None,
    num_layers: Annotated[int | None, typer.Option(help="How many layers of the ranking to freeze.")] = None,
    base_revision: Annotated[
        str | None,
        typer.Option("--base-revision", "--revision", help="Commit or branch of the original checkpoint."),
    ] = None,
    reduction: Reduction = None,
    processor_dir: Annotated[Path | None, typer.Option(help="Local directory with the processor files.")] = None,
    include_weights: Annotated[
        bool, typer.Option("--include-weights", help="Copy the weights too, instead of referencing them.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace files that build-repo did not write, or that were changed since; weights beside a reference go.",
        ),
    ] = False,
):
    """Write a repo (config, code, processor files, model card) that references an original checkpoint's weights."""
    from . import build
    from .provenance import provenance_of

    if (layers is None) == (ranking is None) or (ranking is None) != (num_layers is None):
        raise ValueError("pass either --layers, or --ranking together with --num-layers")
    if base_revision is not None and Path(model).is_dir():
        raise ValueError(
            f"{model} is a directory, which has no revisions; --base-revision is for checkpoints on the Hub"
        )
    config = load_config(model, base_revision)
    if config.base_model_name_or_path is None:
        raise ValueError(
            f"{model} holds its own weights, so there is no original checkpoint to reference: `shortv lc {model} "
            "--num-layers N --save-model REPO` writes a repo that holds them too"
        )
    loaded = None
    if layers is not None:
        config.shortv_layers = parse_layers(layers)
    elif ranking is not None and num_layers is not None:
        from ..layer_contribution.ranking import LayerRanking

        loaded = LayerRanking.load(ranking)
        config.shortv_layers = loaded.layers_for(config, num_layers)
    if reduction is not None:
        config.visual_reduction = parse_reduction(reduction, config)["visual_reduction"]
    config.validate_shortv()
    build.build_repo_from_base(config, output, processor_dir, include_weights, overwrite, loaded)
    base, commit = config.base_model_name_or_path, config.base_model_revision
    weights = f"a copy of the weights of {base}" if include_weights else f"weights from {base}"
    print(f"{output}: freezes layers {config.shortv_layers}, {weights}{f' at commit {commit}' if commit else ''}")
    if loaded is not None:
        origin = provenance_of(loaded)
        picture = "" if (output / origin.picture).is_file() else "; no plot of it: pip install '.[calibrate]'"
        print(f"{origin.file} says how the layers were chosen{picture}")
    if not any((output / name).is_file() for name in build.PROCESSOR_FILES):
        print(f"no processor files in {model}: pass --processor-dir to make a repo for pipelines", file=sys.stderr)


def check_repo(
    repo: Annotated[str, typer.Argument(help="Directory or Hub id of a ShortV repo.")],
    revision: Annotated[str | None, typer.Option(help="Commit or branch of the repo.")] = None,
    device: Device = "auto",
):
    """Check files, pinned commit and code of a ShortV repo, and try it in a process without this package."""
    from .check import check_repo as check
    from .loading import place

    checks = check(repo, revision, place(device))
    print("\n".join(map(str, checks)))
    failed = [each.name for each in checks if each.problem]
    print(f"{repo}: {'not to be trusted as it is: ' + ', '.join(failed) if failed else 'in order'}")
    if failed:
        raise typer.Exit(1)


def publish(
    folder: Annotated[Path, typer.Argument(help="Directory that build-repo wrote, or of a Space.")],
    repo_id: Annotated[str, typer.Option(help="Where to: owner/name. Created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private repo.")] = False,
    revision: Annotated[str, typer.Option(help="Branch to publish to.")] = "main",
    space: Annotated[
        bool, typer.Option("--space", help="It is a Space: publish it with the package and the demonstration model.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
):
    """Publish a ShortV repo, or a Space, in one commit, with the token of `hf auth login` or HF_TOKEN. Safe to repeat."""
    from . import publish as publishing

    plan = publishing.plan_publication(folder, repo_id, private, revision, may_be_offline=dry_run, space=space)
    print(plan, flush=True)
    if dry_run:
        print("dry run: nothing was changed")
        return
    commit = publishing.publish(plan)
    print(f"{'nothing to do' if plan.is_done else 'published'}: {repo_id} is at commit {commit}")
