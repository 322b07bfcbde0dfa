"""A Hugging Face hub on loopback: as much of its protocol as `huggingface_hub` and `transformers` use here.

Reading: repository info, file trees, refs, `resolve` with ETags and commit hashes; large files are on another host,
which sends ranges. Writing: creating repositories and branches, small files in the commit, large ones through git-lfs.
Refusing: missing repositories and revisions, private and gated ones, wrong tokens, connections that break in the middle
of a file.

    with FakeHub() as hub:
        commit = hub.add("someone/model", folder)

`hub.url` is what `HF_ENDPOINT` is set to; `hub.requests` lists what was asked, `hub.downloaded` which files were sent.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

READER, WRITER = "hf_reader", "hf_writer"
LFS_FROM = 2000  # bytes; and every safetensors file


class Refusal(Exception):
    """An answer other than success: status, and what huggingface_hub reads from the headers."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message or code)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message or code}


@dataclass
class Repository:
    """Commits by hash, each with all its files, and the names that point at them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], branch: str = "main", message: str = "") -> str:
        """Make `files` all that the branch holds."""
        sha = hashlib.sha1(f"{branch} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or a commit hash means."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound")
        return sha


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size >= LFS_FROM


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class FakeHub:
    """The hub; its state may be looked at and changed while it runs."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # what was uploaded through git-lfs, by sha256
        self.requests: list[str] = []
        self.downloaded: list[str] = []
        self.breaks: dict[str, list[int]] = {}  # file name: after how many bytes each next download of it breaks
        self.down = False
        self.lock = Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self) -> "FakeHub":
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo: str, files: Path | Mapping[str, bytes], branch: str = "main", **kind: Any) -> str:
        """Commit a folder's files, or files by name, to a new or an existing repository; the commit's hash."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        return self.repositories.setdefault(repo, Repository(**kind)).commit(files, branch)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds at a revision."""
        repository = self.repositories[repo]
        return repository.commits[repository.resolve(revision)]


class Handler(BaseHTTPRequestHandler):
    """One request. Every route is a method that returns a JSON value, or `None` where it has answered by itself."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def handle_any(self) -> None:
        self.body = self.read_body()
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {url.path}")
        try:
            if self.hub.down:
                raise Refusal(503, message="down for maintenance")
            answer = self.route(parts)
            if answer is not None:
                self.send(200, json.dumps(answer).encode())
        except Refusal as refusal:
            self.send(refusal.status, json.dumps({"error": str(refusal)}).encode(), refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- who asks -----------------------------------------------------------------------------------------------------

    @property
    def token(self) -> str | None:
        header = self.headers.get("Authorization")
        return None if header is None else header.removeprefix("Bearer ")

    def writer(self) -> None:
        """Refuse who may not write."""
        if self.token != WRITER:
            raise Refusal(401 if self.token is None else 403, message="no permission to write")

    def repository(self, repo: str) -> Repository:
        """The repository, where whoever asks may know of it."""
        if self.token not in (None, READER, WRITER):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and self.token is None):
            raise Refusal(401 if self.token is None else 404, "RepoNotFound", "Repository not found")
        return found

    # --- routes -------------------------------------------------------------------------------------------------------

    def route(self, parts: list[str]) -> Any:
        match self.command, parts:
            case "GET", ["api", "models", owner, name]:
                return self.info(f"{owner}/{name}", "main")
            case "GET", ["api", "models", owner, name, "revision", revision]:
                return self.info(f"{owner}/{name}", revision)
            case "GET", ["api", "models", owner, name, "tree", revision, *path]:
                return self.tree(f"{owner}/{name}", revision, "/".join(path))
            case "GET", ["api", "models", owner, name, "refs"]:
                return self.refs(f"{owner}/{name}")
            case "GET" | "HEAD", [owner, name, "resolve", revision, *path]:
                return self.resolve_file(f"{owner}/{name}", revision, "/".join(path))
            case "GET" | "HEAD", ["cdn", _, file]:
                return self.send_file(file)
            case "POST", ["api", "validate-yaml"]:
                return {"errors": [], "warnings": []}
            case "POST", ["api", "repos", "create"]:
                return self.create()
            case "POST", ["api", "models", owner, name, "branch", branch]:
                return self.branch(f"{owner}/{name}", branch)
            case "POST", ["api", "models", owner, name, "preupload", revision]:
                return self.preupload(f"{owner}/{name}", revision)
            case "POST", [_, _, "info", "lfs", "objects", "batch"]:
                return self.lfs_batch()
            case "PUT", ["lfs", oid]:
                return self.lfs_upload(oid)
            case "POST", ["api", "models", owner, name, "commit", revision]:
                return self.commit(f"{owner}/{name}", revision)
        raise Refusal(404, message=f"no route {self.command} {self.path}")

    def info(self, repo: str, revision: str) -> Any:
        repository = self.repository(repo)
        sha = repository.resolve(revision)
        names = [{"rfilename": path} for path in repository.commits[sha]]
        return {"id": repo, "sha": sha, "private": repository.private, "tags": [], "downloads": 0, "siblings": names}

    def tree(self, repo: str, revision: str, folder: str) -> Any:
        repository = self.repository(repo)
        files = repository.commits[repository.resolve(revision)]
        listed = []
        for path, data in files.items():
            if folder and not path.startswith(f"{folder}/"):
                continue
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            if is_lfs(path, len(data)):
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
            listed.append(entry)
        if folder and not listed:
            raise Refusal(404, "EntryNotFound")
        return listed

    def refs(self, repo: str) -> Any:
        repository = self.repository(repo)
        branches, tags = (
            [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in named.items()]
            for kind, named in (("heads", repository.branches), ("tags", repository.tags))
        )
        return {"branches": branches, "tags": tags, "converts": []}

    def resolve_file(self, repo: str, revision: str, path: str) -> None:
        repository = self.repository(repo)
        if repository.gated and self.token != READER:
            raise Refusal(401 if self.token is None else 403, "GatedRepo", "Access to this model is restricted")
        sha = repository.resolve(revision)
        headers = {"X-Repo-Commit": sha}
        if path not in repository.commits[sha]:
            refusal = Refusal(404, "EntryNotFound")
            refusal.headers |= headers
            raise refusal
        data = repository.commits[sha][path]
        if is_lfs(path, len(data)):
            headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
            self.hub.objects[sha256(data)] = data
            location = f"{self.hub.cdn}/cdn/{sha256(data)}/{path.replace('/', '%2F')}"
            self.send(302, b"", headers | {"Location": location})
        else:
            if self.command == "GET":
                self.hub.downloaded.append(path)
            self.send(200, data, headers | {"ETag": f'"{git_oid(data)}"'})

    def send_file(self, path: str) -> None:
        """A large file from the other host, which is to see no token; from a byte on, and broken where it is to be."""
        assert self.token is None, "the token went to the host of the files"
        data = self.hub.objects[self.path.split("/")[2]]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.hub.downloaded.append(path)
        cut = self.hub.breaks.get(path, [])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if cut:
            self.wfile.write(data[start : start + cut.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(data[start:])

    # --- writing ------------------------------------------------------------------------------------------------------

    def create(self) -> Any:
        self.writer()
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.repositories:
            self.send(409, json.dumps(answer).encode())
            return None
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repositories[repo] = Repository(private=private)
        self.hub.repositories[repo].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return answer

    def branch(self, repo: str, branch: str) -> Any:
        self.writer()
        repository = self.repository(repo)
        if branch in repository.branches:
            raise Refusal(409, message="this branch exists")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def preupload(self, repo: str, revision: str) -> Any:
        self.writer()
        repository = self.repository(repo)
        there = repository.commits[repository.resolve(revision)]
        files = []
        for asked in json.loads(self.body)["files"]:
            path, lfs = asked["path"], is_lfs(asked["path"], asked["size"])
            oid = None if path not in there else sha256(there[path]) if lfs else git_oid(there[path])
            mode = "lfs" if lfs else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def lfs_batch(self) -> Any:
        self.writer()
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.cdn}/lfs/{asked['oid']}"}}
            objects.append(asked | ({} if asked["oid"] in self.hub.objects else {"actions": upload}))
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> Any:
        assert self.token is None, "the token went to the host of the files"
        if sha256(self.body) != oid:
            raise Refusal(400, message="these bytes have another sha256")
        self.hub.objects[oid] = self.body
        return {}

    def commit(self, repo: str, revision: str) -> Any:
        self.writer()
        repository = self.repository(repo)
        files = dict(repository.commits[repository.resolve(revision)])
        summary = ""
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                summary = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, message=f"no operation {key}")
        sha = repository.commit(files, revision, summary)
        return {"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "hookOutput": "", "success": True}
