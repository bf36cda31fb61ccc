"""Publish the repos of `hub_configs/` to an organisation.

    python scripts/publish_all.py ORG              # say what would be done
    python scripts/publish_all.py ORG --publish    # do it, with the token of `hf auth login` or HF_TOKEN

Each repo is built anew: code files of this checkout, processor files of the base checkpoint at the pinned commit, and
over them the files of its folder. Repeating the command publishes only what has changed.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from transformers import AutoConfig

from shortv_hf.hub.build import build_repo_from_base, code_files
from shortv_hf.hub.publish import plan_publication, publish


def stage(folder: Path, output: Path) -> Path:
    """The repo of one folder of `hub_configs/`, complete, in `output`."""
    config = AutoConfig.from_pretrained(folder)
    output.mkdir(parents=True)
    if config.base_model_name_or_path is not None:
        build_repo_from_base(config, output)
    for file in (*code_files(), *folder.iterdir()):
        if file.is_file():
            shutil.copyfile(file, output / file.name)
    return output


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organisation", help="or user")
    parser.add_argument("--publish", action="store_true", help="without it, nothing is changed (--dry-run)")
    parser.add_argument("--dry-run", action="store_true", help="the default")
    parser.add_argument("--private", action="store_true", help="create private repos")
    parser.add_argument("--configs", type=Path, default=Path(__file__).parent.parent / "hub_configs")
    args = parser.parse_args()
    if args.publish and args.dry_run:
        parser.error("--publish and --dry-run exclude each other")
    folders = sorted(file.parent for file in args.configs.glob("*/config.json"))
    if not folders:
        parser.error(f"{args.configs} holds no repos")
    try:
        with tempfile.TemporaryDirectory() as directory:
            staged = [
                stage(folder, Path(directory) / folder.name) for folder in folders
            ]  # all, before the first goes out
            plans = [plan_publication(repo, f"{args.organisation}/{repo.name}", args.private) for repo in staged]
            for plan in plans:
                print(plan)
                if args.publish:
                    print(f"  is at    commit {publish(plan)}")
    except (OSError, ValueError) as error:
        raise SystemExit(f"publish_all: {str(error).splitlines()[0]}") from None
    if not args.publish:
        print("dry run: nothing was changed; --publish does it")


if __name__ == "__main__":
    main()
