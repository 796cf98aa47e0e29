"""A Hugging Face Hub on loopback, for tests and to try publishing without an account: python -m tests.hub_server DIR

It speaks as much of the Hub's HTTP interface as the real ``huggingface_hub`` client needs to create repositories, to
commit files to them (by LFS, not Xet) and to download them. What was published stays in DIR.
"""

import argparse
import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# Files that end so go into large-file storage, as the Hub's own .gitattributes says.
LARGE = (".safetensors", ".bin", ".pth")


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next requests.

    Attributes:
        method, path: a request fits if it has this method and this regular expression is found in its path.
        act: answers in the server's stead, given the handler; if it returns True, the server answers after all.
        times: how many requests it befalls.
        skip: how many fitting requests it lets pass before.
    """

    method: str
    path: str
    act: Callable[["Handler"], bool | None]
    times: float = float("inf")
    skip: int = 0


class Hub:
    """Repositories in a folder: blobs by their sha256, commits as JSON, and the newest commit of each branch.

    Attributes:
        faults: what goes wrong; a test appends to them.
        refused: tokens that are known no more, and what is said of them.
        requests: method and path of every request so far.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: list[Fault] = []
        self.refused: dict[str, str] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def create(self, name: str, private: bool) -> bool:
        """Make an empty repository; return False if it exists."""
        with self.lock:
            if self.exists(name):
                return False
            (self.root / name).mkdir(parents=True)
            self._write(name, "private", json.dumps(private))
            self.commit(name, "main", {}, "initial commit")
            return True

    def exists(self, name: str) -> bool:
        return (self.root / name / "refs").is_dir()

    def commit(self, name: str, branch: str, changes: dict[str, dict[str, Any] | None], message: str) -> str:
        """Put files (None to delete one) on top of a branch, and return the new commit."""
        parent = self.find(name, branch)
        files = dict(self.files(name, parent)) if parent else {}
        files.update({path: file for path, file in changes.items() if file})
        for path in (path for path, file in changes.items() if file is None):
            files.pop(path, None)
        text = json.dumps({"parent": parent, "message": message, "files": files}, indent=1)
        commit = hashlib.sha1(text.encode()).hexdigest()
        self._write(name, f"commits/{commit}", text)
        self._write(name, f"refs/{branch}", commit)
        return commit

    def find(self, name: str, revision: str) -> str | None:
        """Return the commit of a branch or of its own hash."""
        if (self.root / name / "commits" / revision).is_file():
            return revision
        path = self.root / name / "refs" / revision
        return path.read_text() if path.is_file() else None

    def files(self, name: str, commit: str) -> dict[str, dict[str, Any]]:
        return json.loads((self.root / name / "commits" / commit).read_text())["files"]

    def store(self, data: bytes) -> dict[str, Any]:
        """Keep a blob and return how a commit names it."""
        sha256 = hashlib.sha256(data).hexdigest()
        self._write("", f"blobs/{sha256}", data)
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return {"sha256": sha256, "git": git, "size": len(data)}

    def blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256

    def _write(self, name: str, path: str, content: str | bytes) -> None:
        target = self.root / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f"{target.name}.{threading.get_ident()}.part")
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(draft, target)


class Handler(BaseHTTPRequestHandler):
    """One request to the Hub of the server."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def handle_one(self) -> None:
        hub, self.path = self.server.hub, unquote(self.path)
        self.body = self._read_body()
        url = urlsplit(self.path)
        self.route, self.query = url.path, parse_qs(url.query)
        hub.requests.append(f"{self.command} {self.route}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in hub.refused:
            self.fail(401, "", hub.refused[token])
            return
        if self.command == "POST" and not token:
            self.fail(401, "", "Invalid username or password.")
            return
        if self._act_out_fault():
            return
        for method, pattern, answer in ROUTES:
            if method in (self.command, "GET" if self.command == "HEAD" else "") and (
                found := re.fullmatch(pattern, self.route)
            ):
                answer(self, *found.groups())
                return
        self.fail(404, "", f"no such page: {self.command} {self.route}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def _act_out_fault(self) -> bool:
        with self.server.hub.lock:
            for fault in self.server.hub.faults:
                if fault.method == self.command and fault.times > 0 and re.search(fault.path, self.route):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    break
            else:
                return False
        return not fault.act(self)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self, status: int, content: bytes | dict | list = b"", **headers: object) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content_Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status: int, code: str, message: str, **headers: object) -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message, **headers)

    def commit_of(self, name: str, revision: str) -> str | None:
        """Return the commit, or answer that there is none."""
        if not self.server.hub.exists(name):
            self.fail(401, "RepoNotFound", "Repository not found")
        elif commit := self.server.hub.find(name, revision):
            return commit
        else:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def create_repository(handler: Handler) -> None:
    asked = json.loads(handler.body)
    name = f"{asked['organization'] or 'me'}/{asked['name']}"
    url = {"url": f"{handler.server.url}/{name}", "name": name, "id": name}
    private = asked.get("visibility") == "private" or asked.get("private") is True
    if handler.server.hub.create(name, private):
        handler.answer(200, url)
    else:
        handler.answer(409, {"error": "You already created this model repo", **url})


def create_branch(handler: Handler, name: str, branch: str) -> None:
    hub = handler.server.hub
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", branch) or ".." in branch:
        handler.fail(400, "", f"no name of a branch: {branch}")
    elif hub.find(name, branch):
        handler.fail(409, "", f"Reference already exists: {branch}")
    elif commit := handler.commit_of(name, "main"):
        hub._write(name, f"refs/{branch}", commit)
        handler.answer(200, {})


def describe(handler: Handler, name: str, revision: str = "main") -> None:
    hub = handler.server.hub
    if commit := handler.commit_of(name, revision):
        siblings = [{"rfilename": path, "size": file["size"]} for path, file in hub.files(name, commit).items()]
        private = json.loads((hub.root / name / "private").read_text())
        handler.answer(200, {"id": name, "sha": commit, "private": private, "siblings": siblings})


def choose_upload(handler: Handler, name: str, revision: str) -> None:
    """Say of each file whether it is large, and what it is now."""
    if commit := handler.commit_of(name, revision):
        held = handler.server.hub.files(name, commit)
        answers = []
        for file in json.loads(handler.body)["files"]:
            large = file["path"].endswith(LARGE)
            now = held.get(file["path"])
            oid = now and now["sha256" if large else "git"]
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        handler.answer(200, {"files": answers})


def offer_uploads(handler: Handler, name: str) -> None:
    """Say where each large file is to be put, if it is not there."""
    objects = []
    for file in json.loads(handler.body)["objects"]:
        actions = {"upload": {"href": f"{handler.server.url}/lfs/{file['oid']}"}}
        there = handler.server.hub.blob(file["oid"]).is_file()
        objects.append({**file, **({} if there else {"actions": actions})})
    handler.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")


def upload(handler: Handler, sha256: str) -> None:
    if hashlib.sha256(handler.body).hexdigest() != sha256:
        handler.fail(400, "", "the content is not that of the name")
    else:
        handler.server.hub.store(handler.body)
        handler.answer(200)


def take_commit(handler: Handler, name: str, branch: str) -> None:
    hub = handler.server.hub
    if not handler.commit_of(name, branch):
        return
    header, changes = {}, {}
    for line in handler.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            header = value
        elif item["key"] == "file":
            changes[value["path"]] = hub.store(base64.b64decode(value["content"]))
        elif item["key"] == "lfsFile":
            if not hub.blob(value["oid"]).is_file():
                handler.fail(400, "", f"no upload of {value['path']}")
                return
            changes[value["path"]] = {"sha256": value["oid"], "git": None, "size": value["size"]}
        else:
            changes[value["path"]] = None
    with hub.lock:
        if header.get("parentCommit") not in (None, hub.find(name, branch)):
            handler.fail(412, "", "the branch has moved on")
            return
        commit = hub.commit(name, branch, changes, header["summary"])
    url = f"{handler.server.url}/{name}/commit/{commit}"
    handler.answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


def resolve(handler: Handler, name: str, revision: str, path: str) -> None:
    hub = handler.server.hub
    if not (commit := handler.commit_of(name, revision)):
        return
    file = hub.files(name, commit).get(path)
    if file is None:
        handler.fail(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
    elif file["git"]:
        send_file(handler, hub.blob(file["sha256"]).read_bytes(), file["git"], X_Repo_Commit=commit)
    else:
        # Large files come from another host, which knows nothing of repositories.
        linked = {"X_Linked_ETag": f'"{file["sha256"]}"', "X_Linked_Size": file["size"]}
        place = f"http://localhost:{handler.server.server_port}/cdn/{file['sha256']}/{path}"
        handler.answer(302, b"", Location=place, X_Repo_Commit=commit, **linked)


def send_large(handler: Handler, sha256: str, path: str) -> None:
    send_file(handler, handler.server.hub.blob(sha256).read_bytes(), "of-the-storage")


def send_file(handler: Handler, data: bytes, etag: str, **more: str) -> None:
    headers = {"ETag": f'"{etag}"', "Accept_Ranges": "bytes", **more}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
    if not asked:
        handler.answer(200, data, **headers)
        return
    first, last = int(asked[1]), int(asked[2] or len(data) - 1)
    handler.answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **headers)


def who_am_i(handler: Handler) -> None:
    if handler.headers.get("Authorization"):
        handler.answer(200, {"type": "user", "name": "me"})
    else:
        handler.fail(401, "", "Invalid username or password.")


REPOSITORY, REVISION = r"([\w.-]+/[\w.-]+)", r"([^?]+?)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", who_am_i),
    ("POST", "/api/repos/create", create_repository),
    ("POST", f"/api/models/{REPOSITORY}/branch/{REVISION}", create_branch),
    ("POST", "/api/validate-yaml", lambda handler: handler.answer(200, {})),
    ("POST", f"/api/models/{REPOSITORY}/preupload/{REVISION}", choose_upload),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", offer_uploads),
    ("PUT", "/lfs/([0-9a-f]{64})", upload),
    ("POST", f"/api/models/{REPOSITORY}/commit/{REVISION}", take_commit),
    ("GET", f"/api/models/{REPOSITORY}/revision/{REVISION}", describe),
    ("GET", f"/api/models/{REPOSITORY}", describe),
    ("GET", f"/{REPOSITORY}/resolve/([^/]+)/(.+)", resolve),
    ("GET", "/cdn/([0-9a-f]{64})/(.+)", send_large),
]


def status(code: int, **headers: object) -> Callable[[Handler], None]:
    """Return a fault: the answer has this status."""
    return lambda handler: handler.fail(code, "", "out of order", **headers)


def silence(seconds: float) -> Callable[[Handler], None]:
    """Return a fault: no answer for so long."""
    return lambda _: time.sleep(seconds)


def drip(seconds: float) -> Callable[[Handler], None]:
    """Return a fault: for so long, ten bytes a second."""

    def act(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        for _ in range(round(10 * seconds)):
            handler.wfile.write(b" ")
            time.sleep(0.1)

    return act


class Server(ThreadingHTTPServer):
    """A :class:`Hub` that listens on loopback."""

    daemon_threads = True

    def __init__(self, root: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.hub = Hub(root)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        # A client that hangs up in mid-answer is what faults are about.
        pass


@contextlib.contextmanager
def serving(root: Path, port: int = 0) -> Iterator[Server]:
    """Serve the repositories in ``root``, in a thread, as long as the context lasts."""
    server = Server(root, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the repositories are kept")
    parser.add_argument("--port", type=int, default=8021, help="of 127.0.0.1 (default: %(default)s)")
    parsed = parser.parse_args()
    try:
        probe = Server(parsed.folder, parsed.port)
        probe.server_close()
    except OSError as error:
        parser.exit(1, f"port {parsed.port} cannot be listened on ({error}); choose another one (--port)\n")
    with serving(parsed.folder, parsed.port) as server:
        print(f"serving {shlex.quote(str(parsed.folder))}; Ctrl-C stops it. In another terminal, first:")
        print(f"export HF_ENDPOINT={server.url} HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_anything")
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(1)


if __name__ == "__main__":
    main()
