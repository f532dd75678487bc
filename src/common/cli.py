"""
From argv to a config, and from a command's `main` to an exit code.
Order: command line > environment (TILLER_<FIELD>) > --config_path file.toml > default.
"""

import atexit
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from src.common.cache_dirs import use_cache_root
from src.common.cli_help import format_help, format_sources, format_sub_commands
from src.common.errors import CheckFailed, InputError, StopRequested
from src.common.settings import Setting, settings_of
from src.common.sources import Given, convert, nearest, read_command_line, read_environment, read_toml

Config = TypeVar("Config")

DONE, CHECK_FAILED, BAD_INPUT, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SECONDS_OF_REPEATS = 10.0
_ends_at_once = False

# Flags of every command that are no part of its config.
CONFIG_PATH = Setting(name="config_path", item_type=Path)
SHOW_CONFIG = Setting(name="show_config", item_type=bool)


def parse_config(config_class: type[Config], argv: Sequence[str] | None = None) -> Config:
    """
    Builds the config from all four sources. `--help` and `--show_config` print and exit 0. Where config_class has
    SUB_COMMANDS (word -> config class), the first word says which of them is built.
    Raises InputError (one line, naming flag, value and what is expected) for anything wrong in any of them.
    """
    config_class, words = _chosen(config_class, sys.argv[1:] if argv is None else argv)
    settings = settings_of(config_class)
    if "--help" in words or "-h" in words:
        print(format_help(config_class))
        sys.exit(DONE)
    flags = read_command_line(words, [*settings, CONFIG_PATH, SHOW_CONFIG])
    path, show = _take(flags, CONFIG_PATH), _take(flags, SHOW_CONFIG)
    given = (read_toml(path, settings) if path else {}) | read_environment(os.environ, settings) | flags
    _require(settings, given)
    values = {setting.name: convert(given[setting.name], setting) for setting in settings if setting.name in given}
    config = config_class(**values)
    if show:
        print(format_sources(config, given))
        sys.exit(DONE)
    return config


def _chosen(config_class: type[Config], words: Sequence[str]) -> tuple[type[Config], Sequence[str]]:
    """The config class that the first word names among the sub-commands, if there are any, and the words after it."""
    known = getattr(config_class, "SUB_COMMANDS", None)
    if known is None:
        return config_class, words
    if words and words[0] in known:
        return known[words[0]], words[1:]
    if "--help" in words or "-h" in words:
        print(format_sub_commands(config_class, known))
        sys.exit(DONE)
    if not words or words[0].startswith("-"):
        before = f" before {words[0]}" if words else ""
        raise InputError(f"nothing says what to do; expected {' or '.join(known)}{before}")
    raise InputError(f"{words[0]!r}: expected {' or '.join(known)}; the nearest is {nearest(words[0], known)!r}")


def _take(flags: dict[str, Given], setting: Setting) -> Any:
    given = flags.pop(setting.name, None)
    return None if given is None else convert(given, setting)


def _require(settings: Sequence[Setting], given: dict[str, Given]) -> None:
    missing = [f"--{setting.name}" for setting in settings if setting.required and setting.name not in given]
    if missing:
        raise InputError(f"missing {' and '.join(missing)}; --help says what each is")


def run_command(
    main: Callable[[Config], None], config_class: type[Config], argv: Sequence[str] | None = None
) -> NoReturn:
    """
    Parses, runs `main` and exits: 0 done, 1 a check failed, 2 bad input, 75 stopped by SIGTERM or SIGUSR1, 130 Ctrl-C.
    Any other exception keeps its traceback (and Python's exit code 1).
    """
    stop_handler = _stop_handler()
    for number in STOP_SIGNALS:
        signal.signal(number, stop_handler)
    try:
        config = parse_config(config_class, argv)
        use_cache_root()
        main(config)
    except InputError as error:
        _leave(BAD_INPUT, f"error: {error}")
    except CheckFailed as error:
        _leave(CHECK_FAILED, f"check failed: {error}")
    except StopRequested as stop:
        _leave(STOPPED, f"stopped by {stop}; the same command goes on from here")
    except KeyboardInterrupt:
        _leave(INTERRUPTED, "stopped by Ctrl-C; the same command goes on from here")
    _exit(DONE)


def end_at_once() -> None:
    """
    From now on `run_command` ends the process behind its exit functions: Python's own clearing away of everything is
    left out, for threads of C++ (gloo's among them) that let go of a Python object meanwhile abort the process.
    """
    global _ends_at_once
    _ends_at_once = True


def _exit(code: int) -> NoReturn:
    if _ends_at_once:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _stop_handler() -> Callable[[int, Any], None]:
    """
    A signal handler that raises StopRequested. A scheduler may signal several times: repeats leave the way out that the
    first began undisturbed, but count again after a while, should the first have been swallowed by a library.
    """
    last = -math.inf

    def request_stop(number: int, frame: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_OF_REPEATS:
            last = now
            raise StopRequested(signal.Signals(number).name)

    return request_stop


def _leave(code: int, message: str) -> NoReturn:
    # A second Ctrl-C must not turn the last words into a traceback.
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    print(message, file=sys.stderr)
    _exit(code)
