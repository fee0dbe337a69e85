"""A folder becomes one commit on the Hugging Face hub: run as a process of its own, which its parent can end.

The hub's client waits for some answers without a limit, so that nothing here runs in the process of a command.
`run_upload` is the parent's half; `python -m potstill.common.hub_upload` the other, with JSON on both sides. Where the
hub is and who writes there (HF_ENDPOINT, HF_TOKEN or the saved login) is the client's business, and read from the
environment by the child alone.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.common.model_place import hub_trouble, one_line

_KEPT = (".gitattributes",)  # the hub's own, written with the repository
_BLOCK = 1 << 20
_SHOWN = 3


def run_upload(task: str, asked: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
    """Run `look` or `upload` in a child for so many seconds at most. Raises UserError with what is in the way."""
    command = [sys.executable, "-m", "potstill.common.hub_upload", task]
    try:
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"push {asked['repo']}: the hub gave no answer to `{task}` within {seconds:,.0f} seconds; nothing is "
            "committed unless the repository shows it: look there, and try again"
        ) from None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise UserError(f"push {asked['repo']}: {task} ended with code {done.returncode}: {done.stderr[-1000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    if "error" in found:
        raise UserError(f"push {asked['repo']}: {found['error']}")
    return found


def look(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Whether `asked` may be pushed; returns `exists`, `branch` (there already) and `head`, the commit that was seen.

    Raises UserError without network or token, where files stand that may not be replaced, and where a repository is
    not private that was to be.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    trouble = hub_trouble()
    if trouble is not None:
        raise UserError(f"{trouble}; nothing was exported or pushed")
    if get_token() is None:
        raise UserError("no token: set HF_TOKEN to one that may write there, or run `hf auth login`")
    api = HfApi()
    try:
        api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise UserError("the hub does not know the token (HF_TOKEN, or the saved login)") from error
        raise
    repo, revision = asked["repo"], asked["revision"]
    info: Any
    try:
        info = api.repo_info(repo)
    except RepositoryNotFoundError:
        return {"exists": False, "branch": revision is None, "head": None}
    if asked["private"] and not info.private:
        raise UserError("the repository is public already, and --private only makes new ones private; change it there")
    branch = True
    if revision is not None:
        try:
            info = api.repo_info(repo, revision=revision)
        except RevisionNotFoundError:
            branch = False
    files = [file.rfilename for file in info.siblings or () if file.rfilename not in _KEPT]
    if branch and files and not asked["force"]:
        raise UserError(
            f"{revision or 'main'} of the repository holds {len(files)} files already ({', '.join(files[:_SHOWN])}, "
            f"commit {info.sha}); nothing is overwritten: push to a new branch (--push-revision NAME), or have one new "
            "commit replace them with --force"
        )
    return {"exists": True, "branch": branch, "head": info.sha}


def upload(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Commit `folder` to what `look` saw (`seen`), as all that the branch holds; returns `commit`, `url`, `files`.

    One commit on top of the one that was seen: the hub refuses it when somebody else has committed since. Afterwards
    names, sizes and digests of that commit are compared with the folder. Raises UserError.
    """
    from huggingface_hub import HfApi

    api, repo, seen, folder = HfApi(), asked["repo"], asked["seen"], Path(asked["folder"])
    if not seen["exists"]:
        api.create_repo(repo, private=True if asked["private"] else None)
    if not seen["branch"]:
        api.create_branch(repo, branch=asked["revision"])
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        revision=asked["revision"],
        commit_message=asked["message"],
        delete_patterns="*",
        parent_commit=seen["head"],
    )
    _compare(api, repo, commit.oid, folder)
    files = sum(path.is_file() for path in folder.rglob("*"))
    return {"commit": commit.oid, "url": f"{api.endpoint}/{repo}/tree/{commit.oid}", "files": files}


def _compare(api: Any, repo: str, commit: str, folder: Path) -> None:
    """Raise UserError unless the commit holds exactly the files of the folder, byte for byte by their digests."""
    remote = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True, revision=commit)}
    remote = {path: entry for path, entry in remote.items() if hasattr(entry, "blob_id") and path not in _KEPT}
    local = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    wrong = sorted(local.keys() ^ remote.keys())
    wrong += [name for name in sorted(local.keys() & remote.keys()) if not _same(local[name], remote[name])]
    if wrong:
        raise UserError(
            f"commit {commit} does not hold what the folder {folder} does: {', '.join(wrong[:_SHOWN])} "
            f"({len(wrong)} files in all); delete that commit and push again"
        )


def _same(path: Path, entry: Any) -> bool:
    size = path.stat().st_size
    if entry.size != size:
        return False
    # A large file is known by its sha256, a small one as git names it.
    digest = hashlib.sha256() if entry.lfs else hashlib.sha1(f"blob {size}\0".encode())
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest() == (entry.lfs.sha256 if entry.lfs else entry.blob_id)


def main(task: str) -> int:
    """Read what is asked from standard input, and print one line of JSON last."""
    asked = json.loads(sys.stdin.read())
    try:
        found = {"look": look, "upload": upload}[task](asked)
    except UserError as error:
        found = {"error": str(error)}
    except Exception as error:  # the hub's client has a dozen classes of its own, without one base
        found = {"error": f"the hub or the way there failed: {type(error).__name__}: {one_line(error)}"}
    sys.stdout.write(f"\n{json.dumps(found)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
