"""A chat model over HTTP: the model, the directions that requests may name, and the paths that they ask."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from src.common.directions_file import read_directions
from src.common.errors import InputError
from src.common.system_prompts import PLAIN, read_chat_template
from src.models.async_pieces import AsyncEngine, async_form
from src.models.engine import Engine, choose_backend, load_engine
from src.models.hub import check_reference
from src.serving.chat_app import ChatHandlers
from src.serving.chat_directions import DirectionsRegister
from src.serving.chat_metrics import ChatMetrics
from src.serving.chat_openapi import description
from src.serving.guard import App
from src.serving.http_app import ALWAYS_OPEN, known_paths, make_app
from src.serving.metrics import HttpMetrics
from src.serving.server import listen, run_server
from src.serving.settings import ChatServerSettings

BATCH_SIZES = {"hf": 8, "vllm": 256}


def serve_chat(config: ChatServerSettings) -> None:
    """
    Serves until a signal. Raises InputError for a port that is taken, a model that cannot be loaded or steered, and
    directions that do not fit it.
    """
    # 1. Everything that can be wrong without a model.
    check_reference(config.model_id, config.adapter_path)
    if config.chat_template not in (None, PLAIN):
        read_chat_template(config.chat_template)
    named = named_directions(config)
    for path in named.values():
        read_directions(path)
    for folder in config.directions_dirs or []:
        if not folder.is_dir():
            raise InputError(f"--directions_dirs {folder}: no such folder")
    backend, _ = choose_backend(config, keeps=True)
    listener = listen(config)

    # 2. The model, and what may be named in requests.
    batch_size = config.batch_size or BATCH_SIZES[backend]
    with listener, load_engine(config, batch_size, keeps=True) as engine:
        register = DirectionsRegister(engine, config.directions_dirs or [], config.allow_model_mismatch)
        for name, path in named.items():
            register.add(name, path)

        # 3. The paths, until a signal comes.
        run_server(
            chat_app(config, config.model_name or config.model_id, engine, register, batch_size), listener, config
        )


def named_directions(config: ChatServerSettings) -> dict[str, Path]:
    """Name → file of --directions."""
    parts = [each.partition("=") for each in config.directions or []]
    return {name: Path(path) for name, _, path in parts}


def chat_app(
    config: ChatServerSettings, name: str, engine: Engine, register: DirectionsRegister, batch_size: int
) -> App:
    """The application; it steps the engine from its start to its end."""
    asynchronous = async_form(engine, batch_size)
    own = ChatMetrics()
    handlers = ChatHandlers(config, name, engine, asynchronous, register, own)
    routes = handlers.routes()
    metrics = HttpMetrics(known_paths(routes))
    own.show_in(metrics.registry)
    told = description(name, config.api_key is not None)
    return make_app(
        routes, config, metrics, told, handlers.health, ALWAYS_OPEN | {"/"}, lifespan=_stepping(asynchronous)
    )


def _stepping(asynchronous: AsyncEngine) -> Any:
    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async with asynchronous:
            yield

    return lifespan
