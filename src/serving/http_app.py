"""An application: its routes, those that every server has, and errors as JSON."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from src.serving.errors import ApiError, error_response
from src.serving.guard import App, Guard
from src.serving.metrics import CONTENT_TYPE, HttpMetrics
from src.serving.settings import ServerSettings

LOGGER = logging.getLogger(__name__)
HEALTH, METRICS, OPENAPI = "/health", "/metrics", "/openapi.json"
ALWAYS_OPEN = frozenset({HEALTH})
SHOWN_PATH = 200


def make_app(
    routes: Sequence[Route],
    settings: ServerSettings,
    metrics: HttpMetrics,
    openapi: dict[str, Any],
    health: Callable[[], dict[str, Any]],
    open_paths: frozenset[str] = ALWAYS_OPEN,
    **options: Any,
) -> App:
    """
    The routes behind a guard, with /health (what `health` returns), /metrics and /openapi.json. options: of Starlette,
    as `lifespan`.
    """

    # Not plain functions, for which Starlette takes a thread.
    async def show_health(request: Request) -> Response:
        return JSONResponse(health())

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def show_openapi(request: Request) -> Response:
        return JSONResponse(openapi)

    own = [Route(HEALTH, show_health), Route(METRICS, show_metrics), Route(OPENAPI, show_openapi)]
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _unexpected}
    app = Starlette(routes=[*routes, *own], exception_handlers=handlers, **options)
    # A redirect would answer /health/ with the Host that the client claims.
    app.router.redirect_slashes = False
    return Guard(app, settings, metrics, open_paths)


def known_paths(routes: Sequence[Route]) -> frozenset[str]:
    """The paths that are counted by name."""
    return frozenset({route.path for route in routes} | {HEALTH, METRICS, OPENAPI})


async def _api_error(request: Request, error: ApiError) -> Response:
    if error.status >= 500:
        LOGGER.error("%s: %d %s", told(request), error.status, error.message)
    return error_response(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    paths = sorted({route.path for route in request.app.routes if isinstance(route, Route)})
    message = {
        404: f"{request.url.path[:SHOWN_PATH]}: no such path; there are {', '.join(paths)}",
        405: f"{request.method} is not for {request.url.path[:SHOWN_PATH]}",
    }.get(error.status_code, error.detail)
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def _unexpected(request: Request, error: Exception) -> Response:
    # The traceback follows from uvicorn, to which Starlette raises the error again.
    LOGGER.error("%s: %s", told(request), type(error).__name__)
    message = f"the server failed; its log says why under {request.scope['state']['request_id']}"
    return error_response(ApiError(500, message))


def told(request: Request) -> str:
    """A request in a line of the log: its id, what it asked for and who asked, and nothing of what it said."""
    client = f"{request.client.host}:{request.client.port}" if request.client else "somebody"
    size = request.headers.get("content-length", "?")
    return (
        f"request {request.scope['state']['request_id']} {request.method} {request.url.path} ({size} bytes, {client})"
    )
