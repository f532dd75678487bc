"""A hub on loopback: the part of the hub's HTTP interface that a download uses, over a folder of repositories."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_server(root: Path) -> Iterator[str]:
    """Serve `root/owner/name`; a repository whose folder holds the file GATED is gated. Yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            parts = unquote(self.path.split("?")[0]).strip("/").split("/")
            if parts[:1] == ["datasets"] or parts[:2] in (["api", "models"], ["api", "datasets"]):
                parts = parts[1 + (parts[0] == "api") :]
            folder = root / "/".join(parts[:2])
            if not folder.is_dir():
                return self.refuse(404, "RepoNotFound")
            if (folder / "GATED").exists():
                return self.refuse(403, "GatedRepo")
            revision = parts[3] if len(parts) > 3 else "main"
            if revision not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            if "resolve" in parts and not (folder / "/".join(parts[4:])).is_file():
                return self.refuse(404, "EntryNotFound")
            if "resolve" in parts:
                data = (folder / "/".join(parts[4:])).read_bytes()
                return self.send(data, with_body, {"ETag": f'"{len(data)}"', "X-Repo-Commit": COMMIT})
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            siblings = [{"rfilename": str(p.relative_to(folder)), "size": p.stat().st_size} for p in files]
            tree = [{"type": "file", "path": s["rfilename"], "size": s["size"], "oid": "0" * 40} for s in siblings]
            about = {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": siblings, "cardData": {"license": "mit"}}
            return self.send(json.dumps(tree if "tree" in parts else about).encode(), with_body, {})

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send(self, data: bytes, with_body: bool, headers: dict[str, str]) -> None:
            self.send_response(200)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
