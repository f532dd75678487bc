"""Settings of the servers: where they listen, who may ask, how much they take."""

import re
from dataclasses import dataclass
from pathlib import Path

from src.common.engine_config import EngineSettings
from src.common.errors import InputError
from src.common.experiment_config import MAX_SEED
from src.common.secrets import SHORTEST, keep_secret
from src.common.settings import require_at_least_one, setting
from src.common.system_prompts import check_style

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY_CHARACTERS = re.compile(r"[!-~]+")
POSITIVE = ("max_request_mb", "request_seconds", "stop_seconds")


@dataclass(kw_only=True)
class ServerSettings:
    """The server"""

    host: str = "127.0.0.1"
    """Address to listen at; any but this machine's own needs --api_key."""
    port: int = 8080
    """Port to listen at; 0 takes a free one, which is printed."""
    api_key: str | None = None
    """Whoever asks must send it (Authorization: Bearer KEY). Better given by the variable TILLER_API_KEY, since other
    users of a machine can read its command lines."""
    max_request_mb: float = 16.0
    """Size of a request at most, in megabytes (10⁶ bytes)."""
    request_seconds: float = 30.0
    """Seconds in which a request must have arrived, and after which (on Linux) a client is let go that reads nothing of
    its answer."""
    stop_seconds: float = 60.0
    """After SIGTERM or Ctrl-C: seconds at most for what was asked before to be answered."""
    log_path: Path | None = None
    """Keep the log in this file too."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port {self.port}: expected 0 to 65535")
        for name in POSITIVE:
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"--{name} {getattr(self, name)}: expected a positive number")
        if self.api_key is not None:
            if len(self.api_key) < SHORTEST or not KEY_CHARACTERS.fullmatch(self.api_key):
                raise InputError(f"--api_key: expected {SHORTEST} or more letters, digits and signs, without blanks")
            keep_secret(self.api_key)
        elif self.host not in LOOPBACK:
            raise InputError(f"--host {self.host}: others can reach this address; add --api_key")


@dataclass(kw_only=True)
class EmbeddingServerSettings(ServerSettings):
    """The embedding server"""

    model_name: str | None = setting(None)
    """Name that requests give as `model`; --model_id unless given."""
    truncate: bool = False
    """Cut longer texts than the model reads off, as src.embed_dataset does, instead of refusing them; a request's
    own `truncate` wins."""
    window_ms: float = 3.0
    """Milliseconds that a text waits for others to share its batch when nothing is being computed."""
    max_texts: int = 2048
    """Texts or images of a request at most."""
    max_waiting: int = 4096
    """Texts that wait at most; requests beyond are answered 429 with Retry-After."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.window_ms < float("inf"):
            raise InputError(f"--window_ms {self.window_ms}: expected 0 or a positive number")
        if not 1 <= self.max_texts <= self.max_waiting:
            raise InputError(f"--max_texts {self.max_texts}: expected 1 to --max_waiting ({self.max_waiting})")


@dataclass(kw_only=True)
class ChatServerSettings(ServerSettings, EngineSettings):
    """The chat server"""

    model_name: str | None = None
    """Name that requests give as `model`; --model_id unless given."""
    directions: list[str] | None = None
    """NAME=FILE: directions that requests may name in `steering`; several may be given."""
    directions_dirs: list[Path] | None = None
    """Folders; directions files in them, and in none else, may be registered while the server runs."""
    allow_model_mismatch: bool = False
    """Take directions of another model of the same shape."""
    max_tokens: int = 512
    """Generated tokens of a chat's answer at most, where the request does not say."""
    top_k_mass_k: int = 5
    """How many of the likeliest tokens the top-k mass adds up."""
    thinking_mode: bool = True
    """Ask templates that know it for thinking before the answer."""
    persona_mode: str = setting("both", choices=("header", "system", "both"))
    """Where a request's persona is named: in every assistant header, in the system prompt, or in both."""
    system_prompt_style: str = "you-are-a"
    """you-are-a, act-as, none, or a text with {article} and {persona}."""
    chat_template: str | None = None
    """Jinja file used instead of the model's own chat template, or `plain` for a base model that has none."""
    batch_size: int | None = None
    """Answers made side by side at most: 8 on transformers and 256 on vLLM unless given."""
    max_requests: int = 256
    """Answers that are made or wait at most; requests beyond are answered 429 with Retry-After."""
    seed: int = 42
    """Where a request has no seed: its draws come from this one and the request's number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_engine()
        require_at_least_one(self, ("max_tokens", "top_k_mass_k", "batch_size", "max_requests"))
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"--seed {self.seed}: expected 0 to {MAX_SEED}")
        check_style(self.system_prompt_style)
        names = set()
        for each in self.directions or []:
            name, equals, path = each.partition("=")
            if not (name and equals and path):
                raise InputError(f"--directions {each}: expected NAME=FILE, for example french=directions.safetensors")
            if name in names:
                raise InputError(f"--directions {each}: the name {name!r} is taken; give each file a name of its own")
            names.add(name)
