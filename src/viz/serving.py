"""Reports over HTTP, for this machine only: the pages that were named, and nothing else."""

import urllib.parse
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from src.common.errors import InputError
from src.common.html_report import escape, page

HOST = "127.0.0.1"
OWN_NAMES = ("localhost", "127.0.0.1")
SUFFIX = ".html"
Pages = Mapping[str, Callable[[], str]]
"""Name without `.html` → what makes the page."""


def names_of(folders: list[Path]) -> dict[str, Path]:
    """A name in addresses for each folder: its own, with those above it where two are alike."""
    names: dict[str, Path] = {}
    for folder in dict.fromkeys(path.resolve() for path in folders):
        parts = folder.parts
        length = 1
        while (name := "-".join(parts[-length:])) in names and length < len(parts):
            length += 1
        names[name] = folder
    return names


def server(pages: Pages, port: int) -> ThreadingHTTPServer:
    """A server of `/NAME.html` and of a list at `/`. Raises InputError where the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        server_version = "Tiller"

        def do_GET(self) -> None:
            # A page elsewhere can give this machine's address another name; its scripts must not read runs.
            host = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname
            if host not in OWN_NAMES:
                return self._send(HTTPStatus.FORBIDDEN, page("Only for this machine", []))
            name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).removeprefix("/")
            if name == "":
                return self._send(HTTPStatus.OK, _index(pages))
            if name == "favicon.ico":  # every browser asks for it
                return self._send(HTTPStatus.NO_CONTENT, "")
            make = pages.get(name.removesuffix(SUFFIX)) if name.endswith(SUFFIX) else None
            if make is None:
                return self._send(HTTPStatus.NOT_FOUND, page("No such report", []))
            try:
                return self._send(HTTPStatus.OK, make())
            except InputError as error:
                return self._send(HTTPStatus.INTERNAL_SERVER_ERROR, page(str(error), []))

        def _send(self, status: HTTPStatus, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the terminal shows the addresses."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise InputError(f"--port {port}: {error.strerror}; choose another") from error


def _index(pages: Pages) -> str:
    links = "".join(f'<li><a href="/{urllib.parse.quote(n)}{SUFFIX}">{escape(n)}</a></li>' for n in sorted(pages))
    return page("Reports", [("Runs", f"<ul>{links}</ul>")])
