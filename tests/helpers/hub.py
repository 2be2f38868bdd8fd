"""A stand-in for the hub's HTTP API on this machine: models, branches, commits, large files, tokens, private ones.

It answers what huggingface_hub asks for when it downloads (whole files, or ranges of bytes), makes a repository and
uploads without Xet. `refuse` holds statuses for requests that are to fail, `seen` lists all requests, and `sent` the
files that were downloaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.helpers.hub_state import Hub, Repository, etag, is_large
from tests.helpers.json_server import JsonHandler, ThreadedServer

USER, TOKEN, READER = "me", "hf_write", "hf_read"  # the user, a token that writes, one that reads
OURS = "we"  # an organisation of the user's


class Handler(JsonHandler):
    """Answers one request from `hub`, which a subclass sets."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append((self.command, path))
        self.data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for (method, pattern), status in self.hub.refuse.items():
            if method == self.command and re.search(pattern, path):
                return self.refuse(*status) if isinstance(status, tuple) else self.refuse(status)
        for pattern, answer in ROUTES:
            if found := re.fullmatch(pattern, path):
                return answer(self, *found.groups())
        return self.refuse(404, "EntryNotFound")

    def refuse(self, status: int, code: str = "") -> None:
        self.send(status, json.dumps({"error": "refused"}).encode(), {"X-Error-Code": code} if code else {})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return USER if token in (TOKEN, READER) else None

    def found(self, name: str, revision: str = "main") -> tuple[Repository, str] | None:
        """The repository and the commit; None, after the answer, where there are none for this user."""
        model = self.hub.models.get(name)
        if model is None or (model.private and (self.user() is None or not name.startswith((f"{USER}/", f"{OURS}/")))):
            self.refuse(404 if self.user() else 401, "RepoNotFound")
            return None
        commit = model.resolve(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound")
            return None
        return model, commit


def whoami(request: Handler) -> None:
    if request.user() is None:
        return request.refuse(401)
    role = "read" if READER in request.headers["Authorization"] else "write"
    return request.reply(200, {"name": USER, "orgs": [{"name": OURS}], "auth": {"accessToken": {"role": role}}})


def create(request: Handler) -> None:
    asked = json.loads(request.data)
    name = f"{asked.get('organization') or USER}/{asked['name']}"
    if request.user() is None or not name.startswith((f"{USER}/", f"{OURS}/")):
        return request.refuse(403)
    if name in request.hub.models:
        return request.refuse(409)
    request.hub.created.append(asked)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    request.hub.models[name] = Repository(private and not request.hub.all_public)
    request.hub.models[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
    return request.reply(200, {"url": f"{request.hub.url}/{name}"})


def validate(request: Handler) -> None:
    request.reply(200, {"errors": [], "warnings": []})


def info(request: Handler, name: str, revision: str | None) -> None:
    if found := request.found(name, revision or "main"):
        model, commit = found
        files = [{"rfilename": path} for path in model.files(commit)]
        request.reply(200, {"id": name, "sha": commit, "private": model.private, "siblings": files, "tags": []})


def tree(request: Handler, name: str, revision: str, folder: str | None) -> None:
    if found := request.found(name, revision):
        model, commit = found
        files = {path: data for path, data in model.files(commit).items() if path.startswith(folder or "")}
        if folder and not files:
            return request.refuse(404, "EntryNotFound")
        listed = []
        for path, data in files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": etag(path, data)}
            if is_large(path):
                entry["lfs"] = {"oid": etag(path, data), "size": len(data), "pointerSize": 134}
            listed.append(entry)
        request.reply(200, listed)
    return None


def resolve(request: Handler, name: str, revision: str, path: str) -> None:
    if found := request.found(name, revision):
        model, commit = found
        data = model.files(commit).get(path)
        if data is None:
            return request.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        part, status, headers = data, 200, {"X-Repo-Commit": commit, "ETag": f'"{etag(path, data)}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if asked and not request.hub.whole_files:
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            part, status = data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        if request.command == "GET":
            request.hub.sent.append((path, len(part), len(part) == len(data)))
        request.send(status, part, headers)
    return None


def preupload(request: Handler, name: str, revision: str) -> None:
    if found := request.found(name, revision):
        model, commit = found
        now, files = model.files(commit), []
        for file in json.loads(request.data)["files"]:
            path = file["path"]
            mode = "lfs" if is_large(path) else "regular"
            entry = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            files.append({**entry, "oid": etag(path, now[path]) if path in now else None})
        request.reply(200, {"files": files})


def batch(request: Handler, name: str) -> None:
    if request.found(name):
        objects = []
        for one in json.loads(request.data)["objects"]:
            upload = {"upload": {"href": f"{request.hub.url}/large/{one['oid']}"}}
            objects.append({**one, **({} if one["oid"] in request.hub.large else {"actions": upload})})
        request.reply(200, {"transfer": "basic", "objects": objects})


def upload(request: Handler, oid: str) -> None:
    assert hashlib.sha256(request.data).hexdigest() == oid
    with UPLOADING:
        refused = request.hub.cut is not None and len(request.hub.large) >= request.hub.cut
        if not refused:
            request.hub.large[oid] = request.data
    if not refused:
        return request.send(200, b"", {})
    if request.hub.held is None:
        return request.refuse(400)
    request.hub.held.wait()
    request.close_connection = True
    return None


def commit(request: Handler, name: str, revision: str) -> None:
    if found := request.found(name, revision):
        model, last = found
        files = dict(model.files(last))
        for line in request.data.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = request.hub.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                assert key == "header", key
        oid = model.commit(files, revision)
        request.reply(200, {"commitUrl": f"{request.hub.url}/{name}/commit/{oid}", "commitOid": oid})


UPLOADING = threading.Lock()
NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, Any]] = [
    (r"/api/whoami-v2", whoami),
    (r"/api/repos/create", create),
    (r"/api/validate-yaml", validate),
    (rf"/api/models/{NAME}(?:/revision/(.+))?", info),
    (rf"/api/models/{NAME}/tree/([^/]+)(?:/(.+))?", tree),
    (rf"/api/models/{NAME}/preupload/([^/]+)", preupload),
    (rf"/api/models/{NAME}/commit/([^/]+)", commit),
    (rf"/{NAME}\.git/info/lfs/objects/batch", batch),
    (r"/large/(\w+)", upload),
    (rf"/{NAME}/resolve/([^/]+)/(.+)", resolve),
]


@contextmanager
def serving() -> Iterator[Hub]:
    """An empty hub that answers in a thread."""
    hub = Hub()
    server = ThreadedServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


def environment(hub: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """Variables by which a process of its own asks `hub`."""
    found = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**found, "NO_PROXY": "127.0.0.1", **({"HF_TOKEN": token} if token else {})}


def ask(hub: Hub, home: Path, patch: Any, token: str | None = TOKEN) -> None:
    """Let this process ask `hub`, which `patch`, pytest's monkeypatch, takes back."""
    from huggingface_hub import constants, hf_api

    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(hf_api.api, "endpoint", hub.url)
    patch.setenv("HF_HUB_OFFLINE", "0")
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.delenv("HF_TOKEN", raising=False)
    if token:
        patch.setenv("HF_TOKEN", token)
