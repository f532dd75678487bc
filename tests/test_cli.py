"""Precedence of the four sources, both spellings, errors of one line, exit codes of real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.common.cli import parse_config
from src.common.errors import InputError
from src.common.experiment_config import ExperimentConfigBase
from src.common.model_config import ModelConfigBase
from src.common.settings import require_at_least_one, row_fields, setting, to_json
from tests.conftest import ROOT, heeds_ctrl_c


@dataclass(kw_only=True)
class Config:
    """Things to set"""

    prompts_json: Path
    """Prompts, 100% of them."""
    count: int = setting(3, aliases=("n_repeats",))
    """How many."""
    temperature: float = 0.5
    """How hot."""
    thinking_mode: bool = True
    """Whether to think."""
    kind: str = setting("hf", choices=("auto", "hf", "vllm"))
    """Which one."""
    limit: int | None = None
    """At most."""
    adapter_path: Path | None = None
    """Where from."""
    names: list[str] = setting(default_factory=list, affects_rows=False)
    """Who."""
    numbers: list[int] | None = None
    """Which."""


@dataclass(kw_only=True)
class Words:
    """Words without a flag"""

    runs: list[Path] = setting(positional=True)
    """Folders."""
    deep: bool = False
    """Deeply."""


@dataclass(kw_only=True)
class WithKey:
    """Secrets"""

    api_key: str | None = None
    """What opens."""


def parse(*argv: str) -> Config:
    return parse_config(Config, ["--prompts_json", "p.json", *argv])


def test_defaults_and_types() -> None:
    config = parse()
    assert config == Config(prompts_json=Path("p.json"))
    words = "--count 4 --temperature 1e-3 --kind vllm --limit -2 --adapter_path a/b --names x y"
    config = parse(*words.split())
    assert (config.count, config.temperature, config.kind, config.limit) == (4, 0.001, "vllm", -2)
    assert (config.adapter_path, config.names) == (Path("a/b"), ["x", "y"])


@pytest.mark.parametrize("flag", ["--adapter_path", "--adapter-path"])
@pytest.mark.parametrize("joined", [True, False])
def test_both_spellings(flag: str, joined: bool) -> None:
    words = [f"{flag}=x"] if joined else [flag, "x"]
    assert parse(*words).adapter_path == Path("x")


@pytest.mark.parametrize("flag", ["--count", "--n_repeats", "--n-repeats"])
def test_aliases(flag: str) -> None:
    assert parse(flag, "7").count == 7


TRUE = ["--thinking_mode", "--thinking-mode", "--thinking_mode true", "--thinking_mode=true", "--thinking-mode True"]
FALSE = [
    *("--nothinking_mode", "--nothinking-mode", "--no_thinking_mode", "--no-thinking-mode", "--no-thinking_mode"),
    *("--thinking_mode false", "--thinking_mode=false", "--thinking_mode --no_thinking_mode"),
]


@pytest.mark.parametrize(("words", "expected"), [(w, True) for w in TRUE] + [(w, False) for w in FALSE])
def test_yes_or_no_flags(words: str, expected: bool) -> None:
    for rest in ([], ["--count", "1"]):
        assert parse(*words.split(), *rest).thinking_mode is expected


def test_a_list_grows_and_a_value_is_replaced() -> None:
    config = parse("--names", "a", "b", "--count", "1", "--names", "c", "--count", "2")
    assert (config.names, config.count) == (["a", "b", "c"], 2)


def test_none_stands_for_no_value_where_the_default_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILLER_LIMIT", "5")
    assert parse().limit == 5
    assert parse("--limit", "none", "--numbers", "none").limit is None
    with pytest.raises(InputError, match="count"):
        parse("--count", "none")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_an_equals_sign(text: str) -> None:
    assert parse(f"--names={text}").names == [text]


class OneOf:
    SUB_COMMANDS: ClassVar[dict[str, type]] = {"run": Config, "view": Words}


def test_the_first_word_chooses_a_sub_command_with_settings_of_its_own(capsys: pytest.CaptureFixture) -> None:
    assert parse_config(OneOf, ["run", "--prompts_json", "p", "--count", "4"]) == Config(
        prompts_json=Path("p"), count=4
    )
    assert parse_config(OneOf, ["view", "a", "b"]).runs == [Path("a"), Path("b")]
    for words in (["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit) as left:
            parse_config(OneOf, words)
        shown = capsys.readouterr().out
        assert left.value.code == 0 and ("Words without a flag" in shown) == (len(words) == 1), shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected run or view"),
        (["--count", "3"], "before --count"),
        (["veiw", "a"], "'veiw'.*nearest is 'view'"),
        (["view", "--count", "3"], "unknown flag --count"),
    ],
)
def test_a_missing_or_unknown_sub_command_is_named(words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_config(OneOf, words)


def test_a_key_is_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("TILLER_API_KEY", "planted-0123456789")
    with pytest.raises(SystemExit):
        parse_config(WithKey, ["--show_config"])
    shown = capsys.readouterr().out
    assert "api_key = <withheld>" in shown and "planted" not in shown


def test_words_without_a_flag() -> None:
    assert parse_config(Words, ["a", "--deep", "b"]) == Words(runs=[Path("a"), Path("b")], deep=True)
    assert parse_config(Words, ["--runs", "a", "b"]).runs == [Path("a"), Path("b")]
    with pytest.raises(InputError, match="'stray'"):
        parse("stray")


def test_order_of_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 2³ combinations of file, variable and flag, each with the default's own value among the others."""
    toml = tmp_path / "c.toml"
    for mask in range(8):
        for values in ((10, 20, 30), (10, 20, 3), (10, 3, 30), (3, 20, 30)):
            from_file, from_variable, from_flag = values
            toml.write_text(f"count = {from_file}\n" if mask & 1 else "")
            monkeypatch.setenv("TILLER_COUNT", str(from_variable) if mask & 2 else "")
            flags = ["--count", str(from_flag)] if mask & 4 else []
            expected = from_flag if mask & 4 else from_variable if mask & 2 else from_file if mask & 1 else 3
            assert parse("--config_path", str(toml), *flags).count == expected


def test_toml_types(tmp_path: Path) -> None:
    toml = tmp_path / "c.toml"
    toml.write_text(
        'prompts_json = "q.json"\ntemperature = 1\nthinking_mode = false\nnames = ["--a", ""]\nnumbers = [1, -2]\n'
    )
    config = parse_config(Config, ["--config_path", str(toml)])
    assert (config.prompts_json, config.temperature, config.thinking_mode) == (Path("q.json"), 1.0, False)
    assert (config.names, config.numbers) == (["--a", ""], [1, -2])


def test_a_list_in_a_variable_is_split_as_a_shell_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILLER_NAMES", "a 'b c'")
    assert parse().names == ["a", "b c"]
    monkeypatch.setenv("TILLER_NAMES", "a 'b")
    with pytest.raises(InputError, match="TILLER_NAMES"):
        parse()


def test_the_root_of_caches_is_no_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TILLER_CACHE_DIR", str(tmp_path))
    argv = ["--output_dir", "o", "--model_id", "m"]
    assert parse_config(ModelConfigBase, argv).cache_dir is None
    assert parse_config(ModelConfigBase, [*argv, "--cache_dir", "c"]).cache_dir == Path("c")
    assert parse() == Config(prompts_json=Path("p.json"))


WRONG = [
    (["--cuont", "3"], ["--cuont", "--count"]),
    (["--coun", "3"], ["--coun", "--count"]),  # no abbreviations
    (["--no_count"], ["--no_count", "--count"]),
    (["--count", "three"], ["--count", "'three'", "whole number"]),
    (["--count", "1.5"], ["--count", "'1.5'", "whole number"]),
    (["--count", "1", "2"], ["'2'"]),
    (["--count"], ["--count", "whole number"]),
    (["--count", "--names", "a"], ["--count", "whole number"]),
    (["--n-repeats=x"], ["--n-repeats", "'x'"]),
    (["--temperature", "hot"], ["--temperature", "'hot'", "a number"]),
    (["--kind", "hff"], ["--kind", "'hff'", "auto, hf, vllm", "nearest is hf"]),
    (["--thinking_mode=perhaps"], ["--thinking_mode", "'perhaps'", "true or false"]),
    (["--no_thinking_mode=true"], ["--no_thinking_mode"]),
    (["--adapter_path="], ["--adapter_path", "empty"]),
    (["--numbers", "1", "x"], ["--numbers", "'x'"]),
    (["--config_path", "absent.toml"], ["absent.toml", "No such file"]),
]


@pytest.mark.parametrize(("argv", "told"), WRONG)
def test_what_is_wrong_is_told_in_one_line(argv: list[str], told: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in told), caught.value


def test_a_missing_required_setting_is_named() -> None:
    with pytest.raises(InputError, match="--prompts_json"):
        parse_config(Config, [])


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("cuont = 3", ["'cuont'", "'count'"]),
        ("count = 'x'", ["count", "'x'"]),
        ("count = [1, 2]", ["count", "2 values"]),
        ("[count]\na = 1", ["count", "dict"]),
        ("count = 2024-01-01", ["count", "date"]),
        ("count = \ntemperature = 1", ["line 1"]),
    ],
)
def test_wrong_toml_is_told_with_its_file(tmp_path: Path, toml: str, told: list[str]) -> None:
    path = tmp_path / "c.toml"
    path.write_text(toml)
    with pytest.raises(InputError) as caught:
        parse("--config_path", str(path))
    assert all(word in str(caught.value) for word in [str(path), *told]), caught.value


def test_an_unknown_variable_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILLER_CUONT", "3")
    with pytest.raises(InputError, match=r"TILLER_CUONT.*TILLER_COUNT"):
        parse()


def test_a_wrong_variable_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILLER_COUNT", "x")
    with pytest.raises(InputError, match=r"TILLER_COUNT: 'x' is not a whole number"):
        parse()


def test_show_config_tells_where_each_value_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = tmp_path / "c.toml"
    toml.write_text("temperature = 0.25\ncount = 1")
    monkeypatch.setenv("TILLER_KIND", "auto")
    with pytest.raises(SystemExit) as left:
        parse("--config_path", str(toml), "--n_repeats", "3", "--show_config")
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert left.value.code == 0
    assert list(lines) == [field.name for field in fields(Config)]
    assert "= 3" in lines["count"] and "command line: --n_repeats" in lines["count"]
    assert "= 0.25" in lines["temperature"] and f"file: {toml}" in lines["temperature"]
    assert "= auto" in lines["kind"] and "environment: TILLER_KIND" in lines["kind"]
    assert "= none" in lines["limit"] and "default" in lines["limit"]


def test_help_names_every_setting_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse("--wrong", "-h")
    text = capsys.readouterr().out
    assert left.value.code == 0
    for word in ("--prompts_json", "100% of them", "--n_repeats", "{auto,hf,vllm}", "(default: 0.5)", "--show_config"):
        assert word in text, word
    assert text.startswith("Precedence of the four sources")
    assert max(map(len, text.splitlines())) <= 120


def test_every_base_config_survives_json() -> None:
    model = ModelConfigBase(output_dir=Path("o"), model_id="m", adapter_path=Path("a"))
    experiment = ExperimentConfigBase(output_dir=Path("o"))
    for config in (model, experiment, parse("--names", "x")):
        values = to_json(config)
        assert json.loads(json.dumps(values)) == values
        assert list(values) == [field.name for field in fields(config)]
    assert to_json(model)["adapter_path"] == "a"


def test_a_number_below_one_is_refused_and_one_that_was_not_given_is_not() -> None:
    require_at_least_one(Config(prompts_json=Path("p"), count=1, limit=None), ("count", "limit"))
    for values, told in (({"count": 0}, "--count 0"), ({"limit": -1}, "--limit -1")):
        with pytest.raises(InputError, match=f"^{told}: expected at least 1$"):
            require_at_least_one(Config(prompts_json=Path("p"), **values), ("count", "limit"))


def test_row_fields_are_those_not_declared_otherwise() -> None:
    assert "names" not in row_fields(parse())
    assert row_fields(parse())["count"] == 3
    names = row_fields(ModelConfigBase(output_dir=Path("o"), model_id="m"))
    assert set(names) == {"seed", "model_id", "adapter_path", "revision", "dtype", "quantization", "trust_remote_code"}


# ---- real processes

COMMAND = '''"""A small command."""
import sys, time
from dataclasses import dataclass
from src.common.cli import run_command
from src.common.errors import CheckFailed, InputError

@dataclass(kw_only=True)
class C:
    """It"""
    what: str
    """What to do."""

def main(config):
    if config.what == "bad":
        raise InputError("f.json:3: wrong; expected right")
    if config.what == "check":
        raise CheckFailed("cosine 0.5 is below 0.9")
    if config.what == "crash":
        raise KeyError("surprise")
    if config.what == "wait":
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            time.sleep(0.3)  # a second signal arrives while the first unwinds
            print("tidied up")
    print("done")

if __name__ == "__main__":
    run_command(main, C)
'''


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    path = tmp_path / "command.py"
    path.write_text(COMMAND)
    return [sys.executable, str(path)]


def run(command: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *words], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--what", "nothing"], 0, ""),
        (["--help"], 0, ""),
        (["--what", "x", "--show_config"], 0, ""),
        (["--what", "check"], 1, "check failed: cosine 0.5 is below 0.9\n"),
        (["--what", "bad"], 2, "error: f.json:3: wrong; expected right\n"),
        (["--waht", "bad"], 2, "error: unknown flag --waht; the nearest is --what\n"),
        ([], 2, "error: missing --what; --help says what each is\n"),
    ],
)
def test_exit_codes(command: list[str], words: list[str], code: int, said: str) -> None:
    result = run(command, *words)
    assert (result.returncode, result.stderr) == (code, said)


AT_ONCE = COMMAND.replace(
    "def main(config):",
    """import atexit, os
from src.common.cli import end_at_once
class Late:
    def __del__(self):
        os.write(1, b"cleared away;")
late = Late()
late.itself = late  # lives until Python clears everything away
atexit.register(print, "exit function", end=";")

def main(config):
    if config.what.startswith("at once"):
        end_at_once()
        config.what = config.what.removeprefix("at once ")""",
)


@pytest.mark.parametrize(("what", "code"), [("bad", 2), ("check", 1), ("nothing", 0)])
def test_a_process_that_ends_at_once_runs_its_exit_functions_alone(tmp_path: Path, what: str, code: int) -> None:
    path = tmp_path / "command.py"
    path.write_text(AT_ONCE)
    plain, at_once = (run([sys.executable, str(path)], "--what", words) for words in (what, f"at once {what}"))
    done = "done\n" if code == 0 else ""
    assert (plain.returncode, plain.stdout) == (code, f"{done}exit function;cleared away;")
    assert (at_once.returncode, at_once.stdout) == (code, f"{done}exit function;")
    assert at_once.stderr == plain.stderr


def test_any_other_exception_keeps_its_traceback(command: list[str]) -> None:
    result = run(command, "--what", "crash")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and result.stderr.rstrip().endswith("KeyError: 'surprise'")


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGTERM], 75),
        ([signal.SIGUSR1], 75),
        ([signal.SIGINT], 130),
        ([signal.SIGTERM, signal.SIGTERM], 75),
        ([signal.SIGUSR1, signal.SIGTERM], 75),
    ],
)
def test_a_stopped_command_says_that_it_resumes(command: list[str], signals: list[signal.Signals], code: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--what", "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=heeds_ctrl_c,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)
    output, error = process.communicate(timeout=30)
    assert (process.returncode, output) == (code, "tidied up\n")
    assert "the same command goes on from here" in error and "Traceback" not in error


def test_help_and_a_typo_answer_at_once(command: list[str]) -> None:
    for words in (["--help"], ["--waht"]):
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            run(command, *words)
            seconds.append(time.perf_counter() - started)
        assert min(seconds) < 1.0, (words, seconds)
