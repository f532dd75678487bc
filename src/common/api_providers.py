"""Which server a model name means: `provider:model`, or a guess that is said."""

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from src.common.api_types import ApiModel
from src.common.errors import InputError
from src.common.secrets import secret, variable

if TYPE_CHECKING:
    from src.common.experiment_config import ExperimentConfigBase

LOGGER = logging.getLogger(__name__)
RESPONSES = "openai-responses"
"""OpenAI's models by its Responses API."""
NO_KEY = "none"
"""What a server that asks for no key is given."""


@dataclass(frozen=True)
class Provider:
    """A service: where it is, which variables hold its key, which setting bounds the calls at once."""

    base_url: str
    key_variables: tuple[str, ...]
    threads: str
    tag: str | None = None
    """The setting that names a further variable for the key, looked at first."""


PROVIDERS = {
    "openai": Provider("https://api.openai.com/v1", ("OPENAI_API_KEY",), "openai_num_threads", "openai_tag"),
    # What some models are offered by alone.
    RESPONSES: Provider("https://api.openai.com/v1", ("OPENAI_API_KEY",), "openai_num_threads", "openai_tag"),
    "anthropic": Provider(
        "https://api.anthropic.com", ("ANTHROPIC_API_KEY",), "anthropic_num_threads", "anthropic_tag"
    ),
    "openrouter": Provider(
        "https://openrouter.ai/api/v1", ("OPENROUTER_API_KEY",), "openrouter_num_threads", "openrouter_tag"
    ),
    "together": Provider("https://api.together.xyz/v1", ("TOGETHER_API_KEY",), "together_num_threads"),
    "google": Provider(
        "https://generativelanguage.googleapis.com/v1beta/openai",
        ("GOOGLE_API_KEY", "GEMINI_API_KEY"),
        "gemini_num_threads",
    ),
    "vllm": Provider("", ("VLLM_API_KEY",), "vllm_num_threads"),
}
GUESSES = (
    ("anthropic", re.compile(r"claude-")),
    ("openai", re.compile(r"(gpt-|chatgpt-|o[1-9](-|$))")),
    ("google", re.compile(r"gemini-")),
)


def find_model(model_id: str, config: "ExperimentConfigBase") -> ApiModel:
    """
    The model that `provider:name` or a bare name means, with its server and key.
    Raises InputError: a bare name that says nothing of its provider, a key that is not set, a wrong URL.
    """
    prefix, colon, name = model_id.partition(":")
    if not (colon and prefix in PROVIDERS):
        prefix, name = _guess(model_id, config), model_id
    if not name:
        raise InputError(f"--model_id {model_id}: no model after the prefix; expected {prefix}:NAME")
    base_url = _base_url(prefix, config)
    return ApiModel(provider=prefix, base_url=base_url, name=name, key=_key(prefix, base_url, config))


def _guess(model_id: str, config: "ExperimentConfigBase") -> str:
    provider = next((provider for provider, pattern in GUESSES if pattern.match(model_id)), None)
    if config.openai_base_url or variable("OPENAI_BASE_URL"):
        provider = "openai"
    elif provider is None and config.use_vllm_if_model_not_found:
        provider = "vllm"
    if provider is None:
        expected = ", ".join(f"{name}:" for name in PROVIDERS)
        raise InputError(
            f"--model_id {model_id}: no provider named; expected a prefix ({expected}) or --openai_base_url"
        )
    LOGGER.info("%s names no provider; taking it for %s:%s", model_id, provider, model_id)
    return provider


def _base_url(provider: str, config: "ExperimentConfigBase") -> str:
    flags = {"openai": config.openai_base_url, RESPONSES: config.openai_base_url, "vllm": config.vllm_base_url}
    given = variable(f"{provider.removesuffix('-responses').upper()}_BASE_URL")
    if provider == "vllm" and config.vllm_base_url == type(config).vllm_base_url:
        flags["vllm"] = given or config.vllm_base_url
    return check_url(flags.get(provider) or given or PROVIDERS[provider].base_url)


def check_url(url: str) -> str:
    """
    A base URL in the one form that caches know it by: no last slash, no `/chat/completions`.
    Raises InputError for what is no http(s) URL, and for one with a password or a query in it (it would be logged).
    """
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise InputError("the base URL holds a user, a password or a query, which logs would show; put the key in .env")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"base URL {url!r}: expected http://HOST[:PORT]/v1 or https://…")
    return url.rstrip("/").removesuffix("/chat/completions").rstrip("/")


def _key(provider: str, base_url: str, config: "ExperimentConfigBase") -> str:
    about = PROVIDERS[provider]
    tags = [getattr(config, about.tag)] if about.tag else []
    names = list(dict.fromkeys([*tags, *about.key_variables]))
    for name in names:
        value = secret(name)
        if value:
            return value
    if base_url != about.base_url:
        return NO_KEY  # a server of the user's own may well want none
    raise InputError(f"no key for {provider}: set {' or '.join(names)} in the environment or in .env")
