"""A local HTTP server with the Hub's routes for downloads: revision metadata, files, gating by a token."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REVISIONS = {"main": "a" * 40, "v2": "b" * 40}


@contextmanager
def hub_server(repositories: dict[str, Path], *, token: str | None = None) -> Iterator[str]:
    """Serve directories as repositories "owner/name@revision", and yield the address.

    token: required by every route if set.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            segments = unquote(urlsplit(self.path).path).strip("/").split("/")
            if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                self._refuse(403, "GatedRepo")
            elif segments[:2] == ["api", "models"]:
                route, revision = (*segments[4:6], "revision", "main")[:2]
                self._describe(f"{segments[2]}/{segments[3]}", revision, as_tree=route == "tree")
            elif len(segments) > 4 and segments[2] == "resolve":
                self._send_file(
                    f"{segments[0]}/{segments[1]}", segments[3], "/".join(segments[4:]), with_body=with_body
                )
            else:
                self._refuse(404, "RepoNotFound")

        def _find(self, name: str, revision: str) -> tuple[str, Path] | None:
            for branch, commit in REVISIONS.items():
                if revision in (branch, commit) and f"{name}@{branch}" in repositories:
                    return commit, repositories[f"{name}@{branch}"]
            is_known = any(each.startswith(f"{name}@") for each in repositories)
            self._refuse(404, "RevisionNotFound" if is_known else "RepoNotFound")
            return None

        def _describe(self, name: str, revision: str, *, as_tree: bool) -> None:
            if (found := self._find(name, revision)) is None:
                return
            commit, directory = found
            paths = {
                path.relative_to(directory).as_posix(): path
                for path in sorted(directory.rglob("*"))
                if path.is_file()
            }
            tree = [_describe_file(inside, path) for inside, path in paths.items()]
            info = {"id": name, "sha": commit, "siblings": [{"rfilename": inside} for inside in paths]}
            body = json.dumps(tree if as_tree else info).encode()
            self._send(200, body, {"Content-Type": "application/json"})

        def _send_file(self, name: str, revision: str, file: str, *, with_body: bool) -> None:
            found = self._find(name, revision)
            if found is None:
                return
            commit, directory = found
            headers = {"ETag": f'"{_etag(directory / file)}"', "X-Repo-Commit": commit}
            self._send(200, (directory / file).read_bytes(), headers, with_body=with_body)

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

        def _send(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool = True) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base class
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _describe_file(inside: str, path: Path) -> dict[str, object]:
    """Return the metadata of a file as the Hub does: SHA-256 of a large file, git hash of a small one."""
    content = path.read_bytes()
    described = {"type": "file", "path": inside, "size": len(content), "oid": _git_hash(content)}
    if _is_large(path):
        return described | {
            "lfs": {"oid": sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        }
    return described


def _etag(path: Path) -> str:
    content = path.read_bytes()
    return sha256(content).hexdigest() if _is_large(path) else _git_hash(content)


def _is_large(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin")


def _git_hash(content: bytes) -> str:
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()
