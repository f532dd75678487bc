"""
The full figures of src.chat on the bundled model in a real pseudo-terminal: seconds from ESC to the stopped answer, in
mid-answer and while a long prompt is read; what still computes then; a context of 2,000 tokens that is full. About 3
minutes; with --picture also a picture of a terminal (needs tmux and Chromium):
uv run python scripts/acceptance/chat.py --n_stops 10 --picture docs/chat.png
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.terminal import ESC, TerminalProcess  # noqa: E402

WORDS = [sys.executable, "-m", "src.chat", "--model_id", "bundled:smollm2-135m", "--persona", "Hamlet"]
BAR = 0.3


def stop_seconds(terminal: TerminalProcess, question: str, wait_for: str, after: float) -> float:
    """Seconds from ESC to the line that says that the answer was stopped."""
    terminal.line(question)
    terminal.expect(wait_for)
    time.sleep(after)
    pressed = time.perf_counter()
    terminal.send(ESC)
    terminal.expect("· stopped ")
    seconds = time.perf_counter() - pressed
    terminal.expect("you:")
    return seconds


def seconds_of_cpu(pid: int) -> float:
    """CPU seconds that the process takes in one second."""
    process = psutil.Process(pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(1)
    return sum(process.cpu_times()[:2]) - before


def stops(n: int) -> bool:
    """Stop answers and the reading of a prompt of about 1,900 tokens; returns whether the bar was held."""
    long = "Say it all again: " + "the sea and the sky and the stars " * 210
    with TerminalProcess([*WORDS, "--max_tokens", "2000"], ROOT) as terminal:
        terminal.expect("you:")
        mid = [stop_seconds(terminal, "Tell a very long story.", "Hamlet: ", 0.5 + 0.2 * i) for i in range(n)]
        idle = seconds_of_cpu(terminal.process.pid)
        terminal.line("/clear")
        terminal.expect("you:")
        reading = [stop_seconds(terminal, long, "Hamlet: ", 0.3) for _ in range(max(1, n // 3))]
        idle = max(idle, seconds_of_cpu(terminal.process.pid))
        terminal.line("/quit")
        code = terminal.wait()
    print(f"ESC in mid-answer, {n} times: most {max(mid):.3f} s, median {sorted(mid)[n // 2]:.3f} s (bar {BAR} s)")
    print(f"ESC while a long prompt is read, {len(reading)} times: most {max(reading):.3f} s (bar {BAR} s)")
    print(f"CPU in the second after both: at most {idle:.2f} s; exit code {code}")
    return max(*mid, *reading) <= BAR and idle < 0.1 and code == 0


def overflow() -> bool:
    """Talk until a context of 2,000 tokens is full."""
    lines = ["Tell me of " + "the sea and the sky " * 90] * 6
    done = subprocess.run(
        [*WORDS, "--max_tokens", "24", "--max_model_len", "2000"], cwd=ROOT, input="\n".join(lines), text=True,
        capture_output=True,
    )  # fmt: skip
    last = done.stderr.strip().split("\n")[-1]
    print(f"2,000 tokens: exit code {done.returncode}, {done.stdout.count('Hamlet: ')} answers, then: {last}")
    return done.returncode == 2 and "the context is 2000: no room" in last


def picture(path: Path) -> None:
    """A terminal with a short chat in it, through tmux and a browser."""
    from rich.console import Console
    from rich.text import Text

    from tests.browser import browser

    tmux = ["tmux", "-L", "tiller-picture"]
    command = (
        f"cd {ROOT} && PROMPT_TOOLKIT_NO_CPR=1 {' '.join([*WORDS, '--max_tokens', '60', '--entropy'])} 2>/dev/null"
    )
    subprocess.run([*tmux, "new-session", "-d", "-x", "96", "-y", "26", command], check=True)
    try:
        for line, said in (
            (None, "you:"),
            ("What is the question?", "mean entropy"),
            ("/persona a ship's cat", "a new conversation begins"),
            ("Who are you, and what do you do all day?", "mean entropy"),
        ):
            if line:
                subprocess.run([*tmux, "send-keys", line, "Enter"], check=True)
            end = time.monotonic() + 120
            while said not in _after(_screen(tmux), line):
                assert time.monotonic() < end, _screen(tmux)
                time.sleep(0.3)
        time.sleep(1)
        console = Console(record=True, width=96, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(Text.from_ansi(_screen(tmux, colors=True).rstrip()))
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    with browser(width=860, height=420) as watched:
        watched.page.set_content(f"<body style='background:#fff;margin:12px'>{console.export_html(inline_styles=True)}")
        path.parent.mkdir(exist_ok=True)
        watched.page.screenshot(path=path)
    print(f"wrote {path}")


def _after(screen: str, line: str | None) -> str:
    return screen.rpartition(line)[2] if line else screen


def _screen(tmux: list[str], colors: bool = False) -> str:
    words = [*tmux, "capture-pane", "-p", *(["-e"] if colors else [])]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n_stops", type=int, default=10)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    if given.picture:
        picture(given.picture)
    held = stops(given.n_stops) & overflow()
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
