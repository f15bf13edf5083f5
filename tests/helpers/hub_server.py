"""A Hub on loopback: the calls that huggingface_hub makes to push to repositories and to read from them."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".pt")
LFS_SIZE = 1 << 20
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Repository:
    """Branches, each a list of commits, the first of which is empty; a commit holds all files, by path."""

    kind: str
    private: bool
    branches: dict[str, list[dict]] = field(default_factory=dict)

    def __post_init__(self):
        self.branches["main"] = [{"id": hashlib.sha1(b"first").hexdigest(), "message": "first", "files": {}}]

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> dict:
        commits, before = self.branches[branch], self.branches[branch][-1]["files"]
        # As git sees it: older clients also send small files that are there already
        changed = sorted(path for path in files.keys() | before.keys() if files.get(path) != before.get(path))
        content = repr((commits[-1]["id"], message, sorted(files.items()))).encode()
        commits.append(
            {"id": hashlib.sha1(content).hexdigest(), "message": message, "files": files, "changed": changed}
        )
        return commits[-1]

    def find(self, revision: str) -> dict | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = [commit for branch in self.branches.values() for commit in branch]
        return next((commit for commit in commits if commit["id"] == revision), None)


class HubServer(ThreadingHTTPServer):
    """
    Started by `with HubServer() as hub:`; `hub.url` is what HF_ENDPOINT should be. `hub.faults`, which other processes
    PUT to /faults, says what becomes of the next uploads of large files: "cut" drops the connection half-way, "refuse"
    answers 403.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.log: list[str] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that hangs up is no error here."""

    def add(self, repo_id: str, folder: Path):
        """Add a repository of a model with the files of a folder."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        self.repositories[repo_id] = Repository("model", private=False)
        self.repositories[repo_id].commit("main", "Upload", files)

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repo_id].branches[branch][-1]["files"]

    def commits(self, repo_id: str, branch: str = "main") -> list[dict]:
        return self.repositories[repo_id].branches[branch][1:]


def is_large(path: str, content_size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or content_size > LFS_SIZE


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        """Tests read `hub.log` instead."""

    def handle_any(self):
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        self.server.log.append(f"{self.command} {path}")
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None and self.command in method.split():
                return answer(self, **match.groupdict())
        return self.send(404, {"error": f"no such call: {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    # --- reading and answering ---

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def json(self) -> dict:
        return json.loads(self.body())

    def send(self, status: int, content: bytes | dict | list = b"", **headers: str):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers.setdefault("Content_Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def is_known(self) -> bool:
        return self.headers.get("Authorization", "").startswith("Bearer ")

    def repository(self, repo_id: str) -> Repository | None:
        found = self.server.repositories.get(repo_id)
        if found is None or (found.private and not self.is_known()):
            self.send(404 if self.is_known() else 401, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def revision(self, repo_id: str, revision: str) -> dict | None:
        found = self.repository(repo_id)
        if found is None:
            return None
        commit = found.find(revision)
        if commit is None:
            self.send(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        return commit

    # --- the calls ---

    def create(self):
        asked = self.json()
        if not self.is_known():
            return self.send(401, {"error": "who are you?"})
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        kind = asked.get("type") or "model"
        answer = {"url": f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"}
        if repo_id in self.server.repositories:
            return self.send(409, answer | {"error": "it is there already"})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repositories[repo_id] = Repository(kind, bool(private))
        return self.send(200, answer)

    def set_faults(self):
        self.server.faults = self.json()
        return self.send(200)

    def who_am_i(self):
        return self.send(200, {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_card(self):
        """What the Hub asks of a card: metadata that is a mapping, and of each result a task, data and a metric."""
        content = self.json()["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
        data = {} if match is None else yaml.safe_load(match[1])
        errors = [] if isinstance(data, dict) else ["the metadata are no mapping"]
        for entry in data.get("model-index", []) if not errors else []:
            for result in entry["results"]:
                if not {"type"} <= set(result["task"]) or not {"type", "name"} <= set(result["dataset"]):
                    errors.append(f"incomplete: {result}")
                errors += [f"no type or value: {m}" for m in result["metrics"] if not {"type", "value"} <= set(m)]
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        return self.send(400 if errors else 200, answer)

    def preupload(self, repo_id: str, revision: str, kind: str):
        asked = self.json()["files"]
        commit = self.revision(repo_id, revision)
        if commit is None:
            return None
        files = []
        for file in asked:
            entry = {"path": file["path"], "shouldIgnore": False}
            entry["uploadMode"] = "lfs" if is_large(file["path"], file["size"]) else "regular"
            content = commit["files"].get(file["path"])
            if content is not None:
                entry["oid"] = sha256(content) if entry["uploadMode"] == "lfs" else git_id(content)
            files.append(entry)
        return self.send(200, {"files": files})

    def large_file_batch(self, repo_id: str):
        objects = []
        for file in self.json()["objects"]:
            entry = {"oid": file["oid"], "size": file["size"]}
            if file["oid"] not in self.server.large_files:
                entry["actions"] = {
                    "upload": {"href": f"{self.server.url}/upload/{file['oid']}"},
                    "verify": {"href": f"{self.server.url}/verify/{file['oid']}"},
                }
            objects.append(entry)
        return self.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str):
        with self.server.lock:
            fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "cut":
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self.close_connection = True
            return self.connection.close()
        content = self.body()
        if fault == "refuse":
            return self.send(403, {"error": "this address has expired"})
        if sha256(content) != oid:
            return self.send(400, {"error": "the content is another"})
        self.server.large_files[oid] = content
        return self.send(200)

    def verify(self, oid: str):
        size = self.json()["size"]
        there = self.server.large_files.get(oid)
        return self.send(200 if there is not None and len(there) == size else 404, {})

    def commit(self, repo_id: str, revision: str, kind: str):
        lines = [json.loads(line) for line in self.body().splitlines() if line]
        with self.server.lock:
            found = self.revision(repo_id, revision)
            if found is None:
                return None
            files = dict(found["files"])
            header = next(line["value"] for line in lines if line["key"] == "header")
            for key, value in ((line["key"], line["value"]) for line in lines if line["key"] != "header"):
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile" and value["oid"] in self.server.large_files:
                    files[value["path"]] = self.server.large_files[value["oid"]]
                elif key == "deletedFile":
                    del files[value["path"]]
                elif key == "deletedFolder":
                    files = {path: files[path] for path in files if not path.startswith(value["path"])}
                else:
                    return self.send(400, {"error": f"{value['path']} was not uploaded"})
            done = self.server.repositories[repo_id].commit(revision, header["summary"], files)
        oid = done["id"]
        return self.send(200, {"commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def branch(self, repo_id: str, revision: str, kind: str):
        self.body()
        found = self.repository(repo_id)
        if found is None:
            return None
        if revision in found.branches:
            return self.send(409, {"error": "it is there already"})
        found.branches[revision] = list(found.branches["main"])
        return self.send(200, {})

    def info(self, repo_id: str, kind: str, revision: str = "main"):
        commit = self.revision(repo_id, revision)
        if commit is None:
            return None
        found = self.server.repositories[repo_id]
        answer = {"id": repo_id, "modelId": repo_id, "private": found.private, "sha": commit["id"], "tags": []}
        answer |= {"lastModified": DATE, "createdAt": DATE, "downloads": 0, "likes": 0, "gated": False}
        card = re.match(rb"---\n(.*?)\n---\n", commit["files"].get("README.md", b""), flags=re.DOTALL)
        if card is not None and kind == "models":
            data = yaml.safe_load(card[1])
            answer |= {name: data[name] for name in ("pipeline_tag", "library_name") if name in data}
        answer["siblings"] = [{"rfilename": path} for path in sorted(commit["files"])]
        return self.send(200, answer)

    def refs(self, repo_id: str, kind: str):
        found = self.repository(repo_id)
        if found is None:
            return None
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1]["id"]}
            for name, commits in found.branches.items()
        ]
        return self.send(200, {"branches": branches, "converts": [], "tags": []})

    def tree(self, repo_id: str, revision: str, kind: str, folder: str | None = None):
        commit = self.revision(repo_id, revision)
        if commit is None:
            return None
        prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        is_recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for path, content in sorted(commit["files"].items()):
            if path.startswith(prefix):
                parts = path[len(prefix) :].split("/")
                folders |= {prefix + "/".join(parts[:depth]) for depth in range(1, len(parts))}
                if is_recursive or len(parts) == 1:
                    entries.append(describe(path, content))
        if not is_recursive:
            folders = {name for name in folders if "/" not in name[len(prefix) :]}
        if prefix and not entries and not folders:
            return self.send(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound")
        entries += [{"type": "directory", "path": name, "oid": git_id(name.encode()), "size": 0} for name in folders]
        return self.send(200, entries)

    def paths_info(self, repo_id: str, revision: str, kind: str):
        body = self.body().decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        commit = self.revision(repo_id, revision)
        if commit is None:
            return None
        found = [describe(path, commit["files"][path]) for path in asked if path in commit["files"]]
        folders = [path for path in asked if any(name.startswith(f"{path}/") for name in commit["files"])]
        found += [{"type": "directory", "path": name, "oid": git_id(name.encode()), "size": 0} for name in folders]
        return self.send(200, found)

    def resolve(self, repo_id: str, revision: str, file: str):
        commit = self.revision(repo_id, revision)
        if commit is None:
            return None
        content = commit["files"].get(file)
        if content is None:
            return self.send(404, {"error": "no such file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit["id"])
        is_lfs = is_large(file, len(content))
        headers = {
            "ETag": f'"{sha256(content) if is_lfs else git_id(content)}"',
            "X_Repo_Commit": commit["id"],
            "Accept_Ranges": "bytes",
        }
        if is_lfs:
            headers |= {"X_Linked_Size": str(len(content)), "X_Linked_ETag": f'"{sha256(content)}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or self.command == "HEAD":
            return self.send(200, content, **headers)
        start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
        return self.send(206, content[start : end + 1], **headers)


def describe(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "oid": git_id(content), "size": len(content)}
    if is_large(path, len(content)):
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
    return entry


_API = r"/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_card),
    ("GET", r"/api/whoami-v2", _Handler.who_am_i),
    ("PUT", r"/faults", _Handler.set_faults),
    ("POST", rf"{_API}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"{_API}/branch/(?P<revision>.+)", _Handler.branch),
    ("POST", rf"{_API}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    ("GET", rf"{_API}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"{_API}/refs", _Handler.refs),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", _Handler.tree),
    ("GET", _API, _Handler.info),
    ("POST", r"/(datasets/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.large_file_batch),
    ("PUT", r"/upload/(?P<oid>\w+)", _Handler.upload),
    ("POST", r"/verify/(?P<oid>\w+)", _Handler.verify),
    (
        "GET HEAD",
        r"/(datasets/)?(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
        _Handler.resolve,
    ),
]
