"""
Settings: one dataclass field is a flag, a help line, a TOML key, an environment variable and a key of config.json.

    @dataclass(kw_only=True)
    class ChatConfig(ModelConfigBase):
        temperature: float = setting(0.7)
        \"\"\"Sampling temperature; 0 is greedy.\"\"\"
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import simple_parsing

from src.common.errors import InputError

AFFECTS_ROWS = "affects_rows"
AFFECTS_SHARES = "affects_shares"
POSITIONAL = "positional_words"
AUTO = "auto_value"


def setting(
    default: Any = MISSING,
    *,
    default_factory: Any = MISSING,
    affects_rows: bool = True,
    affects_shares: bool = False,
    aliases: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    positional: bool = False,
    auto: Callable[[], Any] | None = None,
) -> Any:
    """
    A dataclass field that is also a flag. `affects_rows=False` leaves it out of the comparison on resume; `aliases` are
    further flag names; `affects_shares=True` puts it back where several workers share the tasks, since each one's share
    depends on it; `positional` lets a list be given as plain words, without its flag;
    `auto` gives the value that the word `auto` stands for.
    """
    extra = {} if choices is None else {"choices": list(choices)}
    return simple_parsing.field(
        default=default,
        default_factory=default_factory,
        alias=list(aliases) or None,
        metadata={AFFECTS_ROWS: affects_rows, AFFECTS_SHARES: affects_shares, POSITIONAL: positional, AUTO: auto},
        **extra,
    )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the readers of the four sources need to know of one field."""

    name: str
    item_type: Any
    is_list: bool = False
    is_optional: bool = False
    positional: bool = False
    required: bool = False
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None
    auto: Callable[[], Any] | None = None

    @property
    def is_bool(self) -> bool:
        return self.item_type is bool

    @property
    def takes_none(self) -> bool:
        """Whether the word `none` stands for no value."""
        return self.is_optional and "none" not in (self.choices or ())

    @property
    def expected(self) -> str:
        """The phrase that a type error ends in."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", str: "text"}
        return words[self.item_type]


def settings_of(config_class: type) -> list[Setting]:
    """The settings of a config class in the order of declaration, base classes first."""
    hints = typing.get_type_hints(config_class)
    return [_describe(field, hints[field.name]) for field in dataclasses.fields(config_class) if field.init]


def _describe(field: dataclasses.Field, hint: Any) -> Setting:
    item_type, is_optional = _without_none(hint)
    is_list = typing.get_origin(item_type) is list
    choices = field.metadata.get("custom_args", {}).get("choices")
    return Setting(
        name=field.name,
        item_type=typing.get_args(item_type)[0] if is_list else item_type,
        is_list=is_list,
        is_optional=is_optional,
        positional=field.metadata.get(POSITIONAL, False),
        required=field.default is MISSING and field.default_factory is MISSING,
        aliases=tuple(field.metadata.get("alias", ())),
        choices=None if choices is None else tuple(choices),
        auto=field.metadata.get(AUTO),
    )


def _without_none(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint, False
    members = [member for member in typing.get_args(hint) if member is not types.NoneType]
    assert len(members) == 1, f"a setting is of one type, or that type or None; got {hint}"
    return members[0], True


def to_json(config: Any) -> dict[str, Any]:
    """Every field of a config as JSON types, in the order of declaration: a path becomes a string, a tuple a list."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def require_at_least_one(config: Any, names: Iterable[str]) -> None:
    """Raises InputError where one of these settings is below 1; one that is None was not given."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected at least 1")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def row_fields(config: Any) -> dict[str, Any]:
    """
    The fields that change rows, or one of several workers' share of them, each with its default as JSON (None where the
    field is required).
    """
    defaults = {}
    is_shared = getattr(config, "num_workers", 1) > 1
    for field in dataclasses.fields(config):
        if field.metadata.get(AFFECTS_ROWS, True) or (is_shared and field.metadata.get(AFFECTS_SHARES)):
            factory = field.default_factory
            default = field.default if factory is MISSING else factory()
            defaults[field.name] = None if default is MISSING else _plain(default)
    return defaults
