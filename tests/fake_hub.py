"""A Hugging Face hub on this machine: as much of its interface as `datasets` needs to stream a data set."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest


class FakeHub:
    """repos: name -> its commits, the newest last: sha -> path -> content. requests: (method, path)."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("_", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def put(self, name: str, files: dict[str, bytes]) -> str:
        """Another commit; returns its sha."""
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repos.setdefault(name, {})[sha] = files
        return sha

    def fetched(self, suffix: str) -> list[str]:
        """The files of this suffix that were read, in order, each request once."""
        return [path for method, path in self.requests if method == "GET" and path.endswith(suffix)]

    def use(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        """Make the libraries ask this hub and keep what they keep in `folder`."""
        datasets = pytest.importorskip("datasets")
        import huggingface_hub

        patch.setattr(huggingface_hub.constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(datasets.config, "HF_ENDPOINT", self.url)
        patch.setattr(
            datasets.config, "HUB_DATASETS_URL", self.url + "/datasets/{repo_id}/resolve/{revision}/{path}"
        )
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
        patch.setattr(datasets.config, "HF_MODULES_CACHE", str(folder / "modules"))

    def commit(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(sha, files); None if there is no such revision."""
        commits = self.repos[name]
        sha = list(commits)[-1] if revision == "main" else revision
        return (sha, commits[sha]) if sha in commits else None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and content leave together; apart, each answer takes 40 ms
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((self.command, path))
        name = "/".join(path.removeprefix("/api").split("/")[2:4])
        if name not in self.hub.repos:
            self._refuse("RepoNotFound")
            return
        rest = path.partition(name)[2].strip("/")
        kind, _, below = rest.partition("/")
        revision, _, inside = below.partition("/")
        found = self.hub.commit(name, revision or "main")
        if found is None:
            self._refuse("RevisionNotFound")
            return
        sha, files = found
        if kind == "resolve":
            self._file(sha, files, inside)
        elif kind in ("", "revision"):
            siblings = [{"rfilename": file} for file in files]
            self._json({"id": name, "sha": sha, "private": False, "tags": [], "siblings": siblings})
        elif kind == "tree":
            query = parse_qs(url.query)
            self._json(_tree(files, inside, query.get("recursive", ["false"])[0].lower() == "true"))
        else:
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            self._json([entry for entry in _tree(files, "", True) if entry["path"] in wanted])

    def _file(self, sha: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            self._refuse("EntryNotFound")
            return
        data = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hash(data)}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            self._send(200, data, headers)
            return
        part = data[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None]
        headers["Content-Range"] = f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}"
        self._send(206, part, headers)

    def _refuse(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code})

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    prefix = f"{folder}/" if folder else ""
    for path, data in files.items():
        if not path.startswith(prefix):
            continue
        parents = path.removeprefix(prefix).split("/")[:-1]
        for depth in range(1, len(parents) + 1 if recursive else min(2, len(parents) + 1)):
            directory = prefix + "/".join(parents[:depth])
            found[directory] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": directory}
        if recursive or not parents:
            oid = hashlib.sha1(data).hexdigest()
            found[path] = {"type": "file", "oid": oid, "size": len(data), "path": path}
    return [found[path] for path in sorted(found)]
