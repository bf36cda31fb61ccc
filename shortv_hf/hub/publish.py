"""Publishing a repo directory to the Hub: first a plan, then one commit of what differs.

    plan = plan_publication("my-shortv-llava", "me/my-shortv-llava")
    print(plan)
    publish(plan)

The token is the one that `huggingface_hub` knows (`HF_TOKEN`, or `hf auth login`); it is not an argument here, so it
stays out of shell histories, and nothing here prints or stores it.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from . import eval_results
from .card import with_repo_id
from .check import check_files
from .names import is_hub_id
from .space import check_space, package_files


@dataclass
class Plan:
    """What publishing would do.

    Attributes:
        repo_id, branch: where to.
        create: the repo has to be created, `private` or not.
        contents: path in the repo → local file, or bytes for the model card, which names the repo in its examples.
        add, update, same: the paths that are new, differ, and are there already.
        leave: paths in the repo that are not in the directory; publishing deletes nothing.
        parent: the commit that the comparison is with; `None` for a repo to create.
        unknown: why the Hub could not be looked at; all paths are then in `add`, and nothing is known of the repo.
        create_branch: the branch has to be created, from main.
        kind: "model", or "space" for a page on the Hub.
    """

    repo_id: str
    branch: str
    private: bool
    create: bool = True
    create_branch: bool = False
    contents: dict[str, Path | bytes] = field(default_factory=dict)
    add: list[str] = field(default_factory=list)
    update: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    leave: list[str] = field(default_factory=list)
    parent: str | None = None
    unknown: str | None = None
    kind: Literal["model", "space"] = "model"

    @property
    def is_done(self) -> bool:
        """There is nothing to do."""
        return not (self.create or self.create_branch or self.add or self.update)

    def __str__(self):
        where = "" if self.kind == "model" else f"{self.kind}s/"
        lines = [f"{constants.ENDPOINT}/{where}{self.repo_id}, branch {self.branch}"]
        if self.unknown:
            lines.append(f"  unknown  what is there already: {self.unknown}")
        elif self.create:
            lines.append(f"  create   the repo, {'private' if self.private else 'public'}")
        if self.create_branch:
            lines.append("  create   the branch")
        for verb in ("add", "update"):
            lines += [f"  {verb:8} {path} ({_size(self.contents[path]):,} bytes)" for path in getattr(self, verb)]
        lines += [f"  {verb:8} {', '.join(getattr(self, verb))}" for verb in ("same", "leave") if getattr(self, verb)]
        return "\n".join(lines)


def plan_publication(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    branch: str = "main",
    may_be_offline: bool = False,
    space: bool = False,
) -> Plan:
    """Compare a repo directory with what is on the Hub. Changes nothing anywhere. Of a `space`, the package and the
    demonstration model go along ([`space.package_files`]).

    Hidden files, but for the scores of `shortv eval`, and `__pycache__` are not published. With `may_be_offline`, a Hub that cannot be reached is no error:
    the plan says so and lists what it knows.

    Raises:
        ValueError: the directory is not a ShortV repo that strangers can load (see `check.check_files`), or no Space,
            `repo_id` is not `owner/name`, or the repo exists and is public while `private` is asked for.
        OSError: the Hub does not answer, or refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no such directory: {folder}")
    if not is_hub_id(repo_id):
        raise ValueError(f"--repo-id takes owner/name, got {repo_id!r}")
    if space:
        check_space(folder)
    problems = [] if space else _problems(folder)
    if problems:
        raise ValueError(f"{folder} is not fit to be published: {'; '.join(problems)}")
    plan = Plan(repo_id, branch, private, kind="space" if space else "model")
    if space:
        plan.contents |= package_files()
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in relative.parts):
            plan.contents[relative.as_posix()] = file
    if (folder / eval_results.FILE).is_file():
        plan.contents[eval_results.FILE] = folder / eval_results.FILE
    if "README.md" in plan.contents and not space:
        card = (folder / "README.md").read_text(encoding="utf-8")
        plan.contents["README.md"] = with_repo_id(card, repo_id).encode()

    try:
        remote = _look(plan)
    except OSError as error:
        if not may_be_offline:
            raise
        remote, plan.unknown = {}, str(error)
    if private and not plan.private:
        raise ValueError(f"{repo_id} exists and is public; --private would not change that")
    for path, content in plan.contents.items():
        kind = plan.add if path not in remote else plan.same if _is_same(content, remote[path]) else plan.update
        kind.append(path)
    plan.leave = sorted(set(remote) - set(plan.contents) - {".gitattributes"})
    return plan


def _problems(folder: Path) -> list[str]:
    return [f"{check.name}: {check.problem}" for check in check_files(folder) if check.problem]


def _look(plan: Plan) -> dict[str, RepoFile]:
    """The files on the Hub, by path; fills in what the plan has to say about the repo and the branch."""
    api = HfApi()
    try:
        info = api.repo_info(plan.repo_id, repo_type=plan.kind)
        plan.create, plan.private, plan.parent = False, bool(info.private), info.sha
        try:
            plan.parent = api.repo_info(plan.repo_id, repo_type=plan.kind, revision=plan.branch).sha
        except RevisionNotFoundError:
            plan.create_branch = True
        entries = list(api.list_repo_tree(plan.repo_id, repo_type=plan.kind, recursive=True, revision=plan.parent))
    except RepositoryNotFoundError:  # also what the Hub says about a private repo of somebody else
        return {}
    except Exception as error:  # the HTTP libraries under huggingface_hub have kinds of their own
        raise OSError(f"cannot look at {plan.repo_id}: {_reason(error)}") from None
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def publish(plan: Plan) -> str:
    """Carry out a plan in one commit. Returns the hash of the commit; the present one if there is nothing to do.

    If it breaks off, nothing is visible on the Hub: planning and publishing again sends only the large files that have
    not arrived yet.

    Raises:
        OSError: there is no token, the Hub refuses, somebody else has committed since the plan was made, or the
            connection breaks.
    """
    if plan.unknown:
        raise OSError(plan.unknown)
    if plan.is_done:
        return plan.parent  # type: ignore[return-value]  # a repo that is there has one
    if get_token() is None:
        raise OSError("there is no token: log in with `hf auth login`, or set HF_TOKEN, to one that may write")
    api = HfApi()
    try:
        if plan.create:
            sdk = "gradio" if plan.kind == "space" else None
            api.create_repo(plan.repo_id, private=plan.private, exist_ok=True, repo_type=plan.kind, space_sdk=sdk)
            plan.parent = api.repo_info(plan.repo_id, repo_type=plan.kind).sha
            plan.create_branch = plan.branch != "main"
        if plan.create_branch:
            api.create_branch(plan.repo_id, repo_type=plan.kind, branch=plan.branch, exist_ok=True)
        paths = plan.add + plan.update
        if not paths:
            return plan.parent  # type: ignore[return-value]  # as above
        info = api.create_commit(
            plan.repo_id,
            [CommitOperationAdd(path, _for_upload(plan.contents[path])) for path in paths],
            repo_type=plan.kind,
            commit_message=f"Publish a ShortV {'repo' if plan.kind == 'model' else plan.kind}",
            revision=plan.branch,
            parent_commit=plan.parent,
        )
    except Exception as error:  # of many kinds, as in `_look`
        raise OSError(
            f"publishing to {plan.repo_id} broke off: {_reason(error)}. The same command goes on where it stopped"
        ) from None
    return info.oid


def _for_upload(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _is_same(content: Path | bytes, entry: RepoFile) -> bool:
    """Compares by the hash that the Hub has: of the content for large files, of the git blob for the others."""
    if _size(content) != entry.size:
        return False
    digest = hashlib.sha256() if entry.lfs else hashlib.sha1(b"blob %d\0" % entry.size)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with open(content, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest() == (entry.lfs.sha256 if entry.lfs else entry.blob_id)


def _reason(error: Exception) -> str:
    """The part of an error of the Hub's that says something; its first line is often a request id alone."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    response = getattr(cause, "response", None)
    if response is None:
        said, prefix = str(cause), ""
    else:
        said, prefix = getattr(cause, "server_message", None) or response.text, f"HTTP {response.status_code}, "
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [type(cause).__name__]
    return prefix + lines[0].rstrip(".")
