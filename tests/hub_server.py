"""A stand-in of the hub: the part of its API that huggingface_hub 2.4 uses to publish and load."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

ROOT = Path(__file__).parents[1]
TOKEN = "hf_of_the_tests"
# Whatever else is stored as LFS on the hub: these are.
LFS = (".safetensors", ".png", ".tar", ".bin")
Files = dict[str, bytes]


def git_oid(data: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """A repository, with all its commits.

    Attributes:
        private: only who logs in sees it.
        gated: only who has accepted its terms sees its files.
        branches: the commit of each.
        commits: the files of each.
        messages: of the commits, the newest last.
    """

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Files, branch: str = "main", message: str = "") -> str:
        """Put the given files, and no others, on a branch; returns the commit."""
        text = f"{len(self.commits)}{sorted((n, git_oid(d)) for n, d in files.items())}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        self.messages.append(message)
        return sha


@dataclass
class Hub:
    """A running server.

    Attributes:
        url: for HF_ENDPOINT.
        repositories: by ``models/user/name`` and ``datasets/user/name``.
        blobs: contents that were uploaded, by their sha256.
        requests: ``METHOD path`` in order.
        fault: what to do with a request instead: a status, or "cut" for half of a body.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fault: Callable[[str], int | str | None] = lambda request: None

    def add(self, name: str, files: Files, **options: Any) -> str:
        """A repository with one commit, which is returned; again, another commit."""
        key = name if name.startswith("datasets/") else f"models/{name}"
        repository = self.repositories.setdefault(key, Repository(**options))
        return repository.commit({".gitattributes": b""} | files)

    def environment(self, home: Path) -> dict[str, str]:
        """For a command that uses it, logged in, with a cache of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def dinogen(self, *words: object, home: Path, cwd: Path, **more: str) -> Any:
        """Run the command line against this hub."""
        return self.python("-m", "launch.cli", *words, home=home, cwd=cwd, **more)

    def python(self, *words: object, home: Path, cwd: Path, **more: str) -> Any:
        """Run Python against this hub."""
        return subprocess.run(
            [sys.executable, *map(str, words)],
            env=self.environment(home) | more,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(iter(self._chunk, b""))
        else:
            self.body = self.rfile.read(size)
        path = unquote(self.path.partition("?")[0])
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = self.hub.fault(request)
        if isinstance(fault, int):
            return self._send(fault, b"a fault of the test")
        self.cut = fault == "cut"
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            return self._api(parts[1:])
        if parts[0] == "lfs":
            self.hub.blobs[parts[1]] = self.body
            return self._send(200)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch()
        parts = parts if parts[0] == "datasets" else ["models", *parts]
        if len(parts) > 5 and parts[3] == "resolve":
            return self._resolve("/".join(parts[:3]), parts[4], "/".join(parts[5:]))
        return self._send(404)

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _api(self, parts: list[str]) -> None:
        if parts == ["validate-yaml"]:
            content = json.loads(self.body)["content"]
            yaml.safe_load(content.split("---")[1])
            return self._json({"errors": [], "warnings": []})
        if parts == ["repos", "create"]:
            return self._create()
        key, rest = "/".join(parts[:3]), parts[3:]
        repository = self._visible(key)
        if repository is None:
            return None
        action = rest[0] if rest else ""
        if action in ("preupload", "commit", "branch") and not self._logged_in():
            return self._send(401, error="RepoNotFound")
        if action == "branch":
            repository.branches[rest[1]] = repository.branches["main"]
            return self._json({})
        sha = self._revision(repository, rest[1] if len(rest) > 1 else "main")
        if sha is None:
            return self._send(404, error="RevisionNotFound")
        files = repository.commits[sha]
        if action == "preupload":
            asked = json.loads(self.body)["files"]
            return self._json({"files": [self._mode(one["path"], files) for one in asked]})
        if action == "commit":
            return self._commit(key, repository, rest[1], dict(files))
        if action == "tree":
            below = "/".join(rest[2:])
            return self._json([_entry(n, d) for n, d in files.items() if n.startswith(below)])
        if action == "paths-info":
            asked = json.loads(self.body)["paths"]
            return self._json([_entry(name, files[name]) for name in asked if name in files])
        siblings = [{"rfilename": name} for name in files]
        name = "/".join(parts[1:3])
        about = {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": []}
        return self._json(about | {"private": repository.private, "downloads": 0, "likes": 0})

    def _create(self) -> None:
        if not self._logged_in():
            return self._send(401, b"Invalid username or password.")
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        key = f"{asked.get('type') or 'model'}s/{name}"
        if asked["organization"] == "somebody-else":
            return self._send(403, b"no rights")
        if key in self.hub.repositories:
            return self._json({"url": f"{self.hub.url}/{name}"}, status=409)
        made = Repository(private=asked.get("visibility") == "private")
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repositories[key] = made
        return self._json({"url": f"{self.hub.url}/{name}"})

    def _mode(self, path: str, files: Files) -> dict[str, Any]:
        mode = "lfs" if path.endswith(LFS) else "regular"
        entry = _entry(path, files[path]) if path in files else {}
        oid = entry.get("lfs", entry).get("oid")
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _batch(self) -> None:
        if not self._logged_in():
            return self._send(401)
        found = []
        for one in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}}}
            missing = one["oid"] not in self.hub.blobs
            found.append(one | ({"actions": upload} if missing else {}))
        return self._json({"objects": found, "transfer": "basic"})

    def _commit(self, key: str, repository: Repository, branch: str, files: Files) -> None:
        message = ""
        for line in self.body.splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "header":
                message = value["summary"]
            elif one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif one["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files, branch, message)
        name = key.partition("/")[2]
        return self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def _resolve(self, key: str, revision: str, name: str) -> None:
        repository = self._visible(key)
        if repository is None:
            return None
        if repository.gated:
            return self._send(403, error="GatedRepo")
        sha = self._revision(repository, revision)
        if sha is None:
            return self._send(404, error="RevisionNotFound")
        if name not in repository.commits[sha]:
            return self._send(404, error="EntryNotFound", headers={"X-Repo-Commit": sha})
        data = repository.commits[sha][name]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{git_oid(data)}"', "Accept-Ranges": "bytes"}
        if name.endswith(LFS):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(data))
        begin = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
        if int(begin):
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            return self._send(206, data[int(begin) :], headers=headers)
        return self._send(200, data, headers=headers)

    def _visible(self, key: str) -> Repository | None:
        """The repository; None, answered already, if the client may not see it."""
        repository = self.hub.repositories.get(key)
        if repository is None or (repository.private and not self._logged_in()):
            self._send(404 if self._logged_in() else 401, error="RepoNotFound")
            return None
        return repository

    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _revision(self, repository: Repository, name: str) -> str | None:
        sha = repository.branches.get(name, name)
        return sha if sha in repository.commits else None

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def _send(
        self,
        status: int,
        body: bytes = b"",
        error: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if error is not None:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with suppress(ConnectionError):
            self.wfile.write(body[: len(body) // 2] if getattr(self, "cut", False) else body)
        if getattr(self, "cut", False):
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
    if path.endswith(LFS):
        oid = hashlib.sha256(data).hexdigest()
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n"
        )
        entry["oid"] = git_oid(pointer.encode())
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": len(pointer)}
    return entry


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub without repositories, in this process."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)


def use_hub(monkeypatch: Any, hub: Hub, home: Path, token: str | None = TOKEN) -> None:
    """Point huggingface_hub in this process to a hub, with an empty cache, and log in."""
    from huggingface_hub import constants

    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
