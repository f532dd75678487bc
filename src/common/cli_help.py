"""What `--help` and `--show_config` print, from the declarations alone."""

import dataclasses
import inspect
import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simple_parsing.docstring import get_attribute_docstring

from src.common.provenance import without_secrets
from src.common.settings import Setting, settings_of, to_json
from src.common.sources import PREFIX, Given

INDENT = 26
CLOSING = f"""\
In every command:
  --config_path FILE      A TOML file with `name = value` lines; a flag or a variable wins over it.
  --show_config           Print every value with where it came from, and exit.
  --help                  Print this, and exit.

Each flag is also a variable ({PREFIX}<NAME>) and a key of the TOML file; - may stand for _.
`none` stands for no value where the default is none; a yes-or-no flag is also --no_<name>."""


def format_help(config_class: type) -> str:
    """The text of `--help`: the module's docstring, the required flags, then the others, the command's own first."""
    settings = {setting.name: setting for setting in settings_of(config_class)}
    required = [setting for setting in settings.values() if setting.required]
    module = sys.modules[config_class.__module__]
    blocks = [(inspect.getdoc(module) or "").strip()]
    if required:
        blocks.append("\n".join(["Required:", *(_help_lines(config_class, setting) for setting in required)]))
    for owner in config_class.__mro__:
        own = [settings[name] for name in inspect.get_annotations(owner) if name in settings]
        lines = [_help_lines(config_class, setting) for setting in own if not setting.required]
        if lines:
            blocks.append("\n".join([f"{_heading(owner)}:", *lines]))
    return "\n\n".join(block for block in [*blocks, CLOSING] if block)


def format_sub_commands(config_class: type, known: Mapping[str, type]) -> str:
    """The text of `--help` before a sub-command is chosen."""
    module = sys.modules[config_class.__module__]
    lines = [f"  {name.ljust(INDENT - 2)}{_heading(known[name])}" for name in known]
    closing = f"{' and '.join(f'{name} --help' for name in known)} list the settings of each."
    return "\n\n".join([(inspect.getdoc(module) or "").strip(), "\n".join(lines), closing])


def _heading(owner: type) -> str:
    # dataclass writes a signature into an absent docstring.
    first_line = (owner.__doc__ or "").strip().split("\n")[0]
    return owner.__name__ if first_line.startswith(f"{owner.__name__}(") else first_line.rstrip(".:")


def _help_lines(config_class: type, setting: Setting) -> str:
    flags = ", ".join(f"--{name}" for name in (setting.name, *setting.aliases))
    words = {int: "INT", float: "FLOAT", bool: "[true|false]", Path: "PATH", str: "TEXT"}
    value = "{" + ",".join(setting.choices) + "}" if setting.choices else words[setting.item_type]
    left = f"  {flags} {value}{' …' if setting.is_list else ''}"
    text = " ".join(get_attribute_docstring(config_class, setting.name).help_string.split())
    if not setting.required:
        text = f"{text} (default: {_shown(_default(config_class, setting.name))})"
    width = min(shutil.get_terminal_size().columns, 120)
    body = textwrap.wrap(text, width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT)
    if len(left) < INDENT - 1:
        body[0] = left.ljust(INDENT) + body[0].lstrip()
        return "\n".join(body)
    return "\n".join([left, *body])


def _default(config_class: type, name: str) -> Any:
    field = next(field for field in dataclasses.fields(config_class) if field.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def format_sources(config: Any, given: Mapping[str, Given]) -> str:
    """One line a setting: its value and where it came from (command line, environment, file or default)."""
    values = without_secrets(to_json(config))
    names = [setting.name for setting in settings_of(type(config))]
    width = max(map(len, names))
    lines = []
    for name in names:
        source = f"{given[name].source}: {given[name].place}" if name in given else "default"
        lines.append(f"{name.ljust(width)} = {_shown(values[name])}    ({source})")
    return "\n".join(lines)
