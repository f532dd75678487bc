"""`src.chat` as a person and a pipe meet it: real processes, a real pseudo-terminal, a tiny random model."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from src.common.errors import InputError
from src.common.rows import read_chats
from src.interactive.conversation import converse
from src.interactive.pipe import Pipe
from src.interactive.session import ChatSession
from src.interactive.settings import ChatSettings
from src.models.language_model import LanguageModel
from tests.conftest import ROOT, module_command
from tests.steering_specs import write_tiny_directions
from tests.terminal import CTRL_C, CTRL_D, ESC, LEFT, UP, TerminalProcess
from tests.tiny_models import copy_model

LONG = ["--persona", "Hamlet", "--max_tokens", "6000"]


@pytest.fixture(scope="module")
def talkative(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context of 8192 tokens and no end of sequence: it goes on until it is stopped."""
    folder = copy_model(tiny_folder, tmp_path_factory.mktemp("talkative") / "model")
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text()) | {"eos_token_id": 49151}
        if name == "config.json":
            config["max_position_embeddings"] = 8192
        (folder / name).write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def directions(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_directions(tmp_path_factory.mktemp("directions") / "d.safetensors", tiny_folder)


def piped(model: Path | str, text: str | bytes, *flags: str) -> subprocess.CompletedProcess:
    data = text if isinstance(text, bytes) else text.encode()
    return subprocess.run(
        module_command("chat", ["--model_id", str(model), *flags]), cwd=ROOT, input=data, capture_output=True,
        timeout=300,
    )  # fmt: skip


def in_terminal(model: Path, folder: Path, *flags: str) -> TerminalProcess:
    words = [sys.executable, "-m", "src.chat", "--model_id", str(model), *flags]
    return TerminalProcess(words, ROOT)


@pytest.fixture
def terminal(talkative: Path, tmp_path: Path) -> Iterator[TerminalProcess]:
    with in_terminal(talkative, tmp_path, *LONG) as process:
        process.expect("you:")
        yield process


def test_a_person_in_a_terminal(terminal: TerminalProcess, directions: Path, tmp_path: Path) -> None:
    # An answer in full flow; arrow keys do not end it, ESC does, and nothing goes on computing.
    terminal.line("Why — schöne Grüße ☃?")
    terminal.expect("Hamlet: ")
    _wait_for_more(terminal)
    terminal.send(UP + LEFT)
    _wait_for_more(terminal)
    assert "stopped" not in terminal.text
    terminal.send(ESC)
    terminal.expect("stopped after")
    _assert_idle(terminal.process.pid)

    # The next answer is clean, Ctrl-C ends it too, and a second one with a line between does not leave.
    terminal.line("/tokens 5")
    terminal.expect("up to 5 tokens")
    terminal.line("again")
    assert "stopped" not in terminal.expect("cut at 5 tokens")
    terminal.line("/tokens 6000")
    terminal.expect("up to 6000")
    terminal.line("more")
    terminal.expect("Hamlet: ")
    _wait_for_more(terminal)
    terminal.send(CTRL_C)
    terminal.expect("stopped after")
    _assert_idle(terminal.process.pid)

    terminal.send(b"caf\xe9\r")
    terminal.expect("not UTF-8; expected text")
    terminal.expect("you:")
    # Commands, the wrong ones too, and what was typed while nothing was computed.
    for line, said in (
        ("/tokens 4", "up to 4 tokens"),
        ("/compare", "nothing steers"),
        (f"/steer {directions}:1:30", "steering by"),
        ("/compare why?", "unsteered"),
        ("/unsteer", "nothing steers, earlier answers stay"),
        ("/temp 0", "the likeliest token"),
        ("/temp hot", "expected 0 or a positive number"),
        ("/nothinking", "no thinking"),
        ("/thinking", "knows no thinking"),
        ("/entropy", "above 3"),
        ("/retry", "mean entropy"),
        (f"/save {tmp_path / 'talk'}", "wrote"),
        ("/system Be brief.", "a new conversation begins"),
        ("/persona a pirate", "the persona is pirate"),
        ("ahoy", "pirate: "),
        ('/persona ""', "no persona"),
        (f"/load {tmp_path / 'talk.jsonl'}", "3 questions and answers with Hamlet"),
        ("/model", "persona: Hamlet, system message: none"),
        ("/clear", "a new conversation"),
        ("/sstem x", "did you mean /system?"),
        ("/help", "ESC or Ctrl-C stops an answer"),
    ):
        terminal.line(line)
        terminal.expect(said)
        terminal.expect("you:")
    # Another width, history and line editing: up brings the last line, left and a letter change it.
    terminal.resize(30, 50)
    terminal.send(UP + LEFT + LEFT + LEFT + b"x" + b"\x05")
    terminal.send(b"\r")
    terminal.expect("did you mean /help?")
    terminal.send(CTRL_C)
    terminal.expect("Ctrl-C again leaves")
    terminal.send(CTRL_C)
    assert terminal.wait() == 0, terminal.errors

    chat = read_chats(tmp_path / "talk.jsonl")[0]
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3
    assert chat.messages[0]["content"] == "Why — schöne Grüße ☃?" and chat.messages[1]["content"]


def test_keys_while_an_answer_is_made_wait_for_the_prompt(terminal: TerminalProcess) -> None:
    terminal.line("go")
    terminal.expect("Hamlet: ")
    _wait_for_more(terminal)
    terminal.send("/tok")
    time.sleep(0.3)
    terminal.send(ESC)
    terminal.expect("stopped after")
    terminal.expect("/tok")
    terminal.send("ens 7\r")
    terminal.expect("up to 7 tokens")
    terminal.expect("you:")
    terminal.send(CTRL_D)
    assert terminal.wait() == 0, terminal.errors


def _wait_for_more(terminal: TerminalProcess) -> None:
    n, end = len(terminal.raw), time.monotonic() + 60
    while len(terminal.raw) <= n + 20:
        assert time.monotonic() < end and terminal.process.poll() is None, terminal.errors
        time.sleep(0.02)


def _assert_idle(pid: int) -> None:
    process = psutil.Process(pid)
    time.sleep(0.3)
    before = sum(process.cpu_times()[:2])
    time.sleep(0.7)
    assert sum(process.cpu_times()[:2]) - before < 0.2


def test_pipes_keep_the_conversation_and_end_at_a_wrong_line(tiny_folder: Path, tmp_path: Path) -> None:
    text = f"hello\n\nand you?\n/save {tmp_path / 'a'}\n/fly\nnever asked\n"
    done = piped(tiny_folder, text, "--max_tokens", "6", "--persona", "Hamlet", "--system", "Be brief.")
    said = done.stdout.decode()
    assert said.count("Hamlet: ") == 2 and "\x1b" not in said
    assert done.returncode == 2 and "error: standard input:5: /fly: no such command" in done.stderr.decode()
    saved = json.loads((tmp_path / "a.jsonl").read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert (saved["persona"], saved["messages"][0]["content"]) == ("Hamlet", "Be brief.")


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LanguageModel:
    return LanguageModel.load(ChatSettings(model_id=str(tiny_folder)))


def through_a_pipe(model: LanguageModel, text: str | bytes, monkeypatch: pytest.MonkeyPatch) -> ChatSession:
    """The same without a process of its own: the model is loaded once."""
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    session = ChatSession(ChatSettings(model_id="m", max_tokens=4), model)
    converse(session, Pipe())
    return session


def test_the_same_lines_give_the_same_answers(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "hello\r\n/retry\n and /this is text\n/quit\nnever asked"
    first, second = (through_a_pipe(model, text, monkeypatch).messages for _ in range(2))
    assert first == second and [m["content"] for m in first[::2]] == ["hello", "and /this is text"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("hi\n/steer nowhere:1:2\nhi\n", "standard input:2: "),
        (b"hi\n\xff\xfe\n", "standard input:2: not UTF-8"),
        ("word " * 600 + "\n", "the context is 512: no room for an answer"),
        ("/steer {d}:7:2\n", "layer"),
        ("/save nothing\n", "nothing to save"),
        ("hi\n/save .\n", "no name of a file"),
        ("hi\n/save ~nobody-here/talk\n", "write the folder out"),
        ("/load /\n", "no name of a file"),
        ("/load nowhere.jsonl\n", "nowhere.jsonl"),
        ("/temp\n", "/temp : expected 0 or a positive number"),
        ("/retry\n", "nothing was asked"),
        ("/compare why?\n", "nothing steers"),
    ],
)
def test_a_wrong_line_in_a_pipe_ends_the_chat(
    model: LanguageModel, directions: Path, text: str | bytes, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text.replace("{d}", str(directions)) if isinstance(text, str) else text
    with pytest.raises(InputError, match=r"^standard input:\d: ") as raised:
        through_a_pipe(model, text, monkeypatch)
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--temperature", "-1"], "--temperature -1.0: expected"),
        (["--steer", "nowhere.safetensors:1:2"], "nowhere.safetensors"),
    ],
)
def test_wrong_settings_end_before_a_model_is_loaded(
    run_module: Callable, tiny_folder: Path, flags: list[str], complaint: str
) -> None:
    done = run_module("chat", "--model_id", str(tiny_folder), *flags)
    assert done.returncode == 2 and complaint in done.stderr and "Loading" not in done.stderr
