"""A small stand-in for the Hugging Face hub on 127.0.0.1: what downloads and uploads ask for.

Downloads need no token; uploads need one of `Hub.writers`. Only what the client asks for is there.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT_HEADER = "X-Repo-Commit"


@dataclass
class Repository:
    """Files of one commit; `branches` name it. `truncated` files break off half-way, always."""

    files: dict[str, bytes]
    branches: tuple[str, ...] = ("main",)
    truncated: set[str] = field(default_factory=set)
    lfs: set[str] = field(default_factory=set)
    private: bool = False

    @property
    def commit(self) -> str:
        names = "".join(f"{name}:{blob(content)}" for name, content in sorted(self.files.items()))
        return hashlib.sha1(names.encode()).hexdigest()

    @classmethod
    def of(cls, folder: Path, **options) -> "Repository":
        return cls({path.name: path.read_bytes() for path in folder.iterdir()}, **options)


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """Repositories by (type, name), types being "models" and "datasets"; the requests seen."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], list[Repository]] = {}
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.url = ""
        self.writers: set[str] = set()
        self.large: dict[str, bytes] = {}  # uploads that no commit names yet
        self.lost: set[str] = set()  # files of which a commit stores other content

    def add(self, kind: str, name: str, repository: Repository) -> str:
        """Publish one commit of a repository; returns its hash."""
        self.repositories.setdefault((kind, name), []).append(repository)
        return repository.commit


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        lines = self.body().splitlines()
        read = [json.loads(line) for line in lines] or [{}]
        self.answer(read if self.path.startswith("/api/") and "/commit/" in self.path else read[0])

    def do_PUT(self):
        self.hub.requests.append(f"PUT {self.path}")
        self.hub.large[self.path.rpartition("/")[2]] = self.body()
        self.send(200)

    def body(self) -> bytes:
        """What was sent, also in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while length := int(self.rfile.readline(), 16):
            found += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def answer(self, body: dict | list | None = None):
        # Branches may have slashes in their names.
        names = [unquote(name) for name in self.path.split("?")[0].strip("/").split("/")]
        self.hub.requests.append(f"{self.command} /{'/'.join(names)}")
        self.hub.tokens.add(self.headers.get("Authorization"))
        if self.command == "POST" and (call := self.upload_call(names)):
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token in self.hub.writers:
                call(body)
            else:
                self.send_json({"error": "Invalid username or password."}, 403 if token else 401)
        elif names[0] == "api":
            self.answer_api(names[1], "/".join(names[2:4]), names[4:], body or {})
        elif names[0] == "datasets":
            self.answer_file("datasets", "/".join(names[1:3]), names[3:])
        else:
            self.answer_file("models", "/".join(names[:2]), names[2:])

    def find(self, kind: str, name: str, revision: str) -> Repository | None:
        """The commit asked for; answers 404 as the hub does where there is none."""
        commits = self.hub.repositories.get((kind, name))
        if commits is None:
            self.send(404, headers={"X-Error-Code": "RepoNotFound"})
            return None
        for repository in commits:
            if revision == repository.commit or revision in repository.branches:
                return repository
        self.send(404, headers={"X-Error-Code": "RevisionNotFound"})
        return None

    def answer_api(self, kind: str, name: str, rest: list[str], body: dict):
        action = rest[0] if rest else "revision"
        repository = self.find(kind, name, rest[1] if len(rest) > 1 else "main")
        if repository is None:
            return
        if action == "revision":
            siblings = [{"rfilename": file} for file in sorted(repository.files)]
            said = {"id": name, "sha": repository.commit, "private": repository.private}
            self.send_json(said | {"siblings": siblings})
        elif action == "tree":
            recursive = "recursive=true" in self.path.lower()
            listed = entries(repository, "/".join(rest[2:]), recursive)
            missing = {"X-Error-Code": "EntryNotFound"}
            self.send_json(listed) if listed else self.send(404, headers=missing)
        elif action == "paths-info":
            wanted = body.get("paths", [])
            self.send_json([e for e in entries(repository, "") if e["path"] in wanted])
        else:
            self.send(404, headers={"X-Error-Code": "EntryNotFound"})

    def answer_file(self, kind: str, name: str, rest: list[str]):
        if len(rest) < 3 or rest[0] != "resolve":
            self.send(404)
            return
        repository = self.find(kind, name, rest[1])
        if repository is None:
            return
        file = "/".join(rest[2:])
        headers = {COMMIT_HEADER: repository.commit}
        if file not in repository.files:
            self.send(404, headers=headers | {"X-Error-Code": "EntryNotFound"})
            return
        content = repository.files[file]
        headers |= {"ETag": f'"{blob(content)}"', "Accept-Ranges": "bytes"}
        self.send(200, content, headers, cut=file in repository.truncated)

    # --- uploads ---
    def upload_call(self, names: list[str]):
        """What answers a request of an upload; None if it is none."""
        if names == ["api", "validate-yaml"]:
            return lambda _: self.send_json({"errors": [], "warnings": []})
        if names == ["api", "repos", "create"]:
            return self.create
        if names[-3:] == ["lfs", "objects", "batch"]:
            return self.batch
        action, name = names[4:5], "/".join(names[2:4])
        if action == ["preupload"]:
            return lambda body: self.preupload(name, body)
        return (lambda body: self.commit(name, body)) if action == ["commit"] else None

    def create(self, body: dict):
        name = f"{body['organization']}/{body['name']}"
        if ("models", name) in self.hub.repositories:
            self.send_json({"error": "You already created this model repo"}, 409)
            return
        private = body.get("visibility") == "private" or body.get("private", False)
        self.hub.add("models", name, Repository({".gitattributes": b""}, private=private))
        self.send_json({"url": f"{self.hub.url}/{name}", "name": name})

    def preupload(self, name: str, body: dict):
        kinds = {
            one["path"]: "lfs" if one["path"].endswith(".safetensors") else "regular"
            for one in body["files"]
        }
        said = [{"path": p, "uploadMode": k, "shouldIgnore": False} for p, k in kinds.items()]
        self.send_json({"files": said})

    def batch(self, body: dict):
        href = f"{self.hub.url}/large"
        objects = [
            one | {"actions": {"upload": {"href": f"{href}/{one['oid']}"}}}
            for one in body["objects"]
        ]
        self.send_json({"transfer": "basic", "objects": objects})

    def commit(self, name: str, lines: list[dict]):
        before = self.find("models", name, "main")
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, before.commit):
            self.send_json({"error": "A commit has happened since. Please refresh"}, 412)
            return
        files, lfs = dict(before.files), set(before.lfs)
        for line in lines[1:]:
            value = line["value"]
            path = value["path"]
            if line["key"] == "deletedFile":
                del files[path]
            elif line["key"] == "lfsFile":
                files[path] = self.hub.large[value["oid"]]
                assert hashlib.sha256(files[path]).hexdigest() == value["oid"]
                lfs.add(path)
            else:
                files[path] = base64.b64decode(value["content"])
        files |= dict.fromkeys(self.hub.lost & files.keys(), b"{}")
        before.branches = ()
        made = Repository(files, lfs=lfs, private=before.private)
        oid = self.hub.add("models", name, made)
        self.send_json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def send_json(self, value, status: int = 200):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes = b"", headers=None, cut: bool = False):
        start = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) - int(start)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        # A range is asked for only after a file broke off: then nothing more comes.
        sent = content[: len(content) // 2] if cut and start == "0" else content
        self.wfile.write(b"" if cut and start != "0" else sent)
        if cut:
            self.close_connection = True


def entries(repository: Repository, under: str, recursive: bool = True) -> list[dict]:
    """What the hub lists of a folder: files, and folders too where not `recursive`."""
    prefix = f"{under.rstrip('/')}/" if under else ""
    found = {}
    for path, content in sorted(repository.files.items()):
        inner = path.removeprefix(prefix)
        if not path.startswith(prefix):
            continue
        if recursive or "/" not in inner:
            found[path] = {"type": "file", "size": len(content), "oid": blob(content)}
            if path in repository.lfs:
                found[path]["lfs"] = large(content)
        else:
            found[prefix + inner.split("/")[0]] = {"type": "directory", "size": 0, "oid": "0" * 40}
    return [{"path": path, **fields} for path, fields in found.items()]


def large(content: bytes) -> dict:
    """What the hub lists of a file outside of Git."""
    return {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}


@contextmanager
def running() -> Iterator[Hub]:
    """A hub at `url`, answering until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
