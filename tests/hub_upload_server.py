"""A hub on loopback that takes uploads: the part of the hub's HTTP interface that a push of small files uses."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_may_write"


class Repositories(dict):
    """Name → {"private": bool, "files": {path: bytes}}."""

    address: str


@contextmanager
def hub_upload_server() -> Iterator[Repositories]:
    """Yields what it holds, with its address."""
    held = Repositories()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            repo = held.get("/".join(parts[2:4])) if parts[:2] == ["api", "models"] else None
            if repo is None:
                return self.send(404, {}, {"X-Error-Code": "RepoNotFound"})
            if "tree" in parts:
                files = [{"type": "file", "path": p, "size": len(d), "oid": "0" * 40} for p, d in repo["files"].items()]
                return self.send(200, files)
            siblings = [{"rfilename": path} for path in repo["files"]]
            name = "/".join(parts[2:4])
            return self.send(200, {"id": name, "sha": COMMIT, "private": repo["private"], "siblings": siblings})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.send(403, {"error": "no permission"})
            if self.path == "/api/repos/create":
                return self.create(json.loads(body))
            if "/preupload/" in self.path:
                files = [f["path"] for f in json.loads(body)["files"]]
                modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
                return self.send(200, {"files": modes})
            if "/commit/" in self.path:
                return self.commit([json.loads(line) for line in body.splitlines()])
            return self.send(200, {})

        def create(self, wanted: dict) -> None:
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in held:
                return self.send(409, {"error": "there already", "url": f"{held.address}/{name}"})
            held[name] = {"private": wanted["visibility"] == "private", "files": {}}
            return self.send(200, {"url": f"{held.address}/{name}"})

        def commit(self, lines: list[dict]) -> None:
            name = "/".join(self.path.split("/")[3:5])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    held[name]["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del held[name]["files"][value["path"]]
            self.send(200, {"commitUrl": f"{held.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

        def send(self, status: int, answer: object, headers: dict[str, str] | None = None) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    held.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
