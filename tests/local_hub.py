"""A small read-only Hub on 127.0.0.1, as far as loading a model asks for one: commits, branches, private repos."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class LocalHub:
    """Serves the directories it is given. Use as a context manager; `endpoint` goes into `HF_ENDPOINT`.

    `requests` records (method, path, token or None) of all calls.
    """

    def __init__(self):
        self.repos = {}  # id → {"commits": {sha: folder}, "main": sha, "token": str or None}
        self.requests = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repo_id: str, folder: Path, token: str | None = None) -> str:
        """Make `folder` the newest commit of `repo_id`; returns the commit's hash."""
        repo = self.repos.setdefault(repo_id, {"commits": {}, "token": token})
        sha = hashlib.sha1(f"{repo_id} {len(repo['commits'])}".encode()).hexdigest()
        repo["commits"][sha] = folder
        repo["main"] = sha
        return sha

    def _answer(self, request):
        path = unquote(urlsplit(request.path).path).strip("/")
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.requests.append((request.command, path, token))
        parts = path.split("/")
        api = parts[:2] == ["api", "models"]
        if api:
            parts = parts[2:]
        repo = self.repos.get("/".join(parts[:2]))
        if repo is None or (repo["token"] and token != repo["token"]):
            return self._send(request, 401 if token is None else 404, b"", {"X-Error-Code": "RepoNotFound"})
        revision = parts[3] if len(parts) > 3 else "main"
        sha = repo["main"] if revision == "main" else revision
        if sha not in repo["commits"]:
            return self._send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        folder = repo["commits"][sha]
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        if api:
            if len(parts) > 2 and parts[2] == "tree":
                inside = "/".join(parts[4:])
                names = [name for name in names if not inside or name.startswith(f"{inside}/")]
                if inside and not names:
                    return self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
                body = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": sha} for n in names]
            else:
                repo_id = "/".join(parts[:2])
                body = {"id": repo_id, "modelId": repo_id, "sha": sha, "siblings": [{"rfilename": n} for n in names]}
                body |= {"private": repo["token"] is not None, "tags": [], "downloads": 0, "likes": 0}
            return self._send(request, 200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        name = "/".join(parts[4:])
        if name not in names:
            return self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        content = (folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "none"}
        return self._send(request, 200, content, headers)

    def _send(self, request, status, body, headers):
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)
