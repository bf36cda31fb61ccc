"""A small Hub on 127.0.0.1, as far as `huggingface_hub` and Transformers ask for one: repos, commits, branches, LFS,
private repos, renames. Contents live in memory; each commit is a dict of path → bytes."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".png", ".model")


class LocalHub:
    """Serves the repos it is given or that clients create. Use as a context manager; `endpoint` goes into `HF_ENDPOINT`.

    Attributes:
        repos: id, of a Space with "spaces/" before it → {"commits": {sha: {path: bytes}}, "branches": {name: sha}, "token": str or None}. A token makes the
            repo private: only requests that carry it see the repo.
        write_token: what a request must carry to create or change anything.
        requests: (method, path, token or None) of all calls.
        fault: asked with (method, path) before each call; the HTTP status it returns, if any, is the answer; 0 drops
            the connection.
    """

    def __init__(self, write_token: str = "secret"):
        self.repos, self.renamed, self.lfs = {}, {}, {}
        self.write_token = write_token
        self.requests = []
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                hub._answer(self)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    # ------------------------------------------------------------------------------------- what tests do to the hub

    def commit(self, repo_id: str, folder: Path, token: str | None = None) -> str:
        """Make the files of `folder` the newest commit of `repo_id`; returns the commit's hash."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        if repo_id not in self.repos:
            return self.create(repo_id, files, token)
        return self.add_commit(repo_id, "main", files)

    def head(self, repo_id: str, branch: str = "main") -> str:
        """The newest commit of a branch."""
        return self.repos[repo_id]["branches"][branch]

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """The contents of a branch; tests may change them in place."""
        return self.repos[repo_id]["commits"][self.head(repo_id, branch)]

    def rename(self, old: str, new: str):
        """Move a repo; its old id leads to the new one, as on the Hub."""
        self.repos[new] = self.repos.pop(old)
        self.renamed[old] = new

    def create(self, repo_id: str, files: dict[str, bytes], token: str | None = None) -> str:
        """A new repo with one commit; returns the commit's hash."""
        self.repos[repo_id] = {"commits": {}, "branches": {}, "token": token}
        return self.add_commit(repo_id, "main", files)

    def add_commit(self, repo_id: str, branch: str, files: dict[str, bytes]) -> str:
        """Make `files` the newest commit of a branch; returns the commit's hash."""
        repo = self.repos[repo_id]
        sha = hashlib.sha1(f"{repo_id} {len(repo['commits'])}".encode()).hexdigest()
        repo["commits"][sha] = files
        repo["branches"][branch] = sha
        return sha

    # ------------------------------------------------------------------------------------------------------ protocol

    def _answer(self, request):
        path = unquote(urlsplit(request.path).path).strip("/")
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.requests.append((request.command, path, token))
        status = self.fault(request.command, path)
        if status == 0:
            request.close_connection = True
            return None
        if status is not None:
            return self._send(request, status, b"broken on purpose")
        if request.command in ("POST", "PUT"):
            return self._write(request, path, token, body)
        return self._read(request, path, token)

    def _write(self, request, path, token, body):
        if request.command == "PUT" and path.startswith("lfs/"):  # signed links carry no token
            self.lfs[path.removeprefix("lfs/")] = body
            return self._send(request, 200)
        if path == "api/validate-yaml":
            return self._send_json(request, {"errors": [], "warnings": []})
        if token != self.write_token:
            return self._send(request, 401, b"Invalid user token.")
        if path == "api/repos/create":
            return self._create(request, json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = []
            for item in json.loads(body)["objects"]:
                if item["oid"] not in self.lfs:
                    item["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{item['oid']}"}}
                objects.append(item)
            return self._send_json(request, {"transfer": "basic", "objects": objects})
        parts = path.split("/")
        repo_id, action, branch = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
        if parts[1] == "spaces":
            repo_id = f"spaces/{repo_id}"
        if repo_id not in self.repos:
            return self._send(request, 404, headers={"X-Error-Code": "RepoNotFound"})
        repo = self.repos[repo_id]
        if action == "branch":
            if branch in repo["branches"]:
                return self._send(request, 409, b"Reference already exists")
            repo["branches"][branch] = repo["branches"]["main"]
            return self._send_json(request, {})
        if branch not in repo["branches"]:
            return self._send(request, 404, headers={"X-Error-Code": "RevisionNotFound"})
        if action == "preupload":
            files = [
                {"path": file["path"], "shouldIgnore": False}
                | {"uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"}
                for file in json.loads(body)["files"]
            ]
            return self._send_json(request, {"files": files})
        return self._commit(request, repo_id, branch, [json.loads(line) for line in body.splitlines()])

    def _create(self, request, fields):
        repo_id = f"{fields['organization']}/{fields['name']}"
        if fields.get("type") == "space":
            if fields.get("sdk") != "gradio":
                return self._send(request, 400, b"a Space needs an SDK")
            repo_id = f"spaces/{repo_id}"
        if repo_id in self.repos:
            return self._send(request, 409, b"You already created this model repo")
        private = fields.get("private") or fields.get("visibility") == "private"
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.create(repo_id, {".gitattributes": attributes}, self.write_token if private else None)
        return self._send_json(request, {"url": f"{self.endpoint}/{repo_id}", "id": repo_id})

    def _commit(self, request, repo_id, branch, lines):
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, self.head(repo_id, branch)):
            return self._send(request, 412, b"A commit has happened since. Please refresh and try again.")
        files = dict(self.files(repo_id, branch))
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.lfs:
                    return self._send(request, 400, b"LFS object is missing")
                files[value["path"]] = self.lfs[value["oid"]]
            else:
                return self._send(request, 400, f"unsupported: {kind}".encode())
        sha = self.add_commit(repo_id, branch, files)
        url = f"{self.endpoint}/{repo_id}/commit/{sha}"
        return self._send_json(request, {"success": True, "commitOid": sha, "commitUrl": url})

    def _read(self, request, path, token):
        parts = path.split("/")
        api = parts[:2] in (["api", "models"], ["api", "spaces"])
        of_spaces = parts[int(api)] == "spaces"
        if api:
            parts = parts[2:]
        repo_id = f"{'spaces/' if of_spaces else ''}{'/'.join(parts[:2])}"
        if repo_id in self.renamed:
            return self._send(request, 307, headers={"Location": f"/{path}".replace(repo_id, self.renamed[repo_id])})
        repo = self.repos.get(repo_id)
        if repo is None or (repo["token"] and token != repo["token"]):
            return self._send(request, 401 if token is None else 404, headers={"X-Error-Code": "RepoNotFound"})
        revision = parts[3] if len(parts) > 3 else "main"
        sha = repo["branches"].get(revision, revision)
        if sha not in repo["commits"]:
            return self._send(request, 404, headers={"X-Error-Code": "RevisionNotFound"})
        files = repo["commits"][sha]
        if api and len(parts) > 2 and parts[2] == "tree":
            inside = "/".join(parts[4:])
            names = [name for name in sorted(files) if not inside or name.startswith(f"{inside}/")]
            if inside and not names:
                return self._send(request, 404, headers={"X-Error-Code": "EntryNotFound"})
            return self._send_json(request, [self._tree_entry(name, files[name]) for name in names])
        if api:
            body = {"id": repo_id, "modelId": repo_id, "sha": sha, "siblings": [{"rfilename": n} for n in files]}
            body |= {"private": repo["token"] is not None, "tags": [], "downloads": 0, "likes": 0}
            return self._send_json(request, body)
        name = "/".join(parts[4:])
        if name not in files:
            return self._send(request, 404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        etag = hashlib.sha256(files[name]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "none"}
        if name.endswith(LFS_SUFFIXES):
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(files[name]))}
        return self._send(request, 200, files[name], headers)

    def _tree_entry(self, name, content):
        entry = {"type": "file", "path": name, "size": len(content)}
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if name.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def _send_json(self, request, body):
        self._send(request, 200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(self, request, status, body=b"", headers=()):
        request.send_response(status)
        for name, value in {**dict(headers), "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)
