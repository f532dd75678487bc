"""
The full figures of src.view: seconds to open and to filter 100,000 rows in the app, in a real Chromium, and pictures of
the app and of a report. About 3 minutes:
uv run python scripts/acceptance/view.py --output_dir data/experiments/seen --runs data/experiments/first_personas
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from src.common.model_config import ModelConfigBase  # noqa: E402
from src.common.runs import start_run  # noqa: E402
from tests.browser import Watched, browser  # noqa: E402
from tests.some_runs import make_run, persona_rows  # noqa: E402
from tests.test_view_browser import choose, opened, view  # noqa: E402

N_ROWS = 100_000
OPEN_BAR, FILTER_BAR = 5.0, 1.0


def big_run(folder: Path) -> Path:
    """A run of 100,000 rows of 50 personas in 5 categories, about 60 words an answer."""
    if (folder / "DONE").exists():
        return folder
    draw = random.Random(0)
    words = ["sea", "sky", "stars", "light", "whose", "old", "and", "never", "the", "of"]
    with start_run(ModelConfigBase(output_dir=folder, model_id="some/model"), "run_personas") as run:
        with run.path("results.jsonl").open("w") as file:
            for i in range(N_ROWS):
                entropy = round(draw.gauss(2, 0.5), 4)
                row = {
                    "id": f"{i:016x}", "persona": f"persona {i % 50}", "category": f"category {i % 5}",
                    "prompt_id": str(i // 50), "prompt": f"What is the meaning of {i // 50}?", "rep_idx": 0, "turn": 0,
                    "response": " ".join(draw.choices(words, k=60)), "thinking": None, "avg_entropy_thinking": None,
                    "avg_entropy": entropy, "avg_entropy_output": entropy, "avg_top_k_mass": 0.9,
                    "num_tokens": 60 + i % 20, "num_thinking_tokens": 0, "seed": i, "model_id": "some/model",
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")
        run.finish({"results.jsonl": "rows"})
    return folder


def timed(what: str, bar: float, action, done) -> bool:
    """
    Whether `action` and what it leads to took no longer than the bar; on a machine that others load, whether all that
    was computed for it did.
    """
    started, before = time.perf_counter(), seconds_of_cpu()
    action()
    done()
    seconds = time.perf_counter() - started
    cpu = {name: now - before[name] for name, now in seconds_of_cpu().items()}
    parts = ", ".join(f"{name} {value:.2f}" for name, value in cpu.items())
    print(f"{what}: {seconds:.2f} s (bar {bar} s); seconds of CPU: {parts}", flush=True)
    return min(seconds, sum(cpu.values())) <= bar


def seconds_of_cpu() -> dict[str, float]:
    """Of the app's server, of the browser with its driver, and of this script, so far."""
    found = {"app": 0.0, "browser": 0.0, "script": sum(psutil.Process().cpu_times()[:2])}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            is_app = "streamlit" in words or "src.view" in words
            found["app" if is_app else "browser"] += sum(process.cpu_times()[:2])
    return found


def big(folder: Path) -> bool:
    """Open by an address of its own and in an app that is open, the rows not read before, and filter."""
    small = folder.parent / "small"
    if not (small / "DONE").exists():
        make_run(small, "run_personas", persona_rows())
    with view("--app", folder, "--root", folder.parent) as port, browser() as watched:
        page = watched.page
        # Streamlit itself and the browser are warm.
        page.goto(f"http://localhost:{port}/?run=absent")
        page.get_by_text("The runs cannot be shown").wait_for()
        shown = lambda n, of="100,000": page.get_by_text(f"{n} of {of} rows").wait_for()  # noqa: E731
        chart = lambda: page.locator(".main-svg").first.wait_for()  # noqa: E731
        held = timed(
            "open the page with 100,000 rows, chart drawn", OPEN_BAR,
            lambda: page.goto(f"http://localhost:{port}/?run={folder.name}"), lambda: (shown("100,000"), chart()),
        )  # fmt: skip
        held &= timed("filter by category", FILTER_BAR, lambda: pick(watched, "Category", "category 3"),
                      lambda: shown("20,000"))  # fmt: skip
        held &= timed("filter by persona", FILTER_BAR, lambda: pick(watched, "Persona", "persona 3"),
                      lambda: shown("2,000"))  # fmt: skip
        few = f"http://localhost:{port}/?run={small.name}"
        timed("for comparison, the page with 16", OPEN_BAR, lambda: page.goto(few), lambda: (shown(16, 16), chart()))
        # Other times are another file to the app: it reads the rows again.
        os.utime(folder / "results.jsonl")
        held &= timed("choose the 100,000 rows in the open app", OPEN_BAR, lambda: pick(watched, "Runs", folder.name),
                      lambda: (shown("100,016", "100,016"), chart()))  # fmt: skip
        watched.assert_quiet()
    return held


def pick(watched: Watched, label: str, value: str) -> None:
    box = watched.page.get_by_label(label, exact=True).last
    box.click()
    box.fill(value)
    watched.page.get_by_role("option", name=value, exact=True).first.click()
    watched.page.keyboard.press("Escape")


def pictures(runs: list[Path], folder: Path) -> None:
    """The app's tabs on real runs and the runs' reports, to be looked at."""
    folder.mkdir(parents=True, exist_ok=True)
    with view("--app", *runs) as port, browser(width=1300, height=900) as watched:
        opened(watched, f"http://localhost:{port}/?" + "&".join(f"run={run.name}" for run in runs))
        for tab in watched.page.get_by_role("tab").all():
            name = tab.inner_text()
            tab.click()
            watched.page.wait_for_timeout(3000)
            watched.page.screenshot(path=folder / f"app-{name.lower().replace(' ', '-')}.png")
        watched.page.get_by_role("tab").first.click()
        choose(watched, "Look into one category", "history")
        watched.page.wait_for_timeout(3000)
        watched.page.screenshot(path=folder / "app-drilled.png", full_page=True)
        watched.assert_quiet()
    subprocess.run([sys.executable, "-m", "src.view", *map(str, runs)], cwd=ROOT, check=True)
    with browser(width=1300, height=900) as watched:
        for run in runs:
            for file in [*run.glob("report.html"), *run.glob("view.html")]:
                watched.page.goto(file.resolve().as_uri())
                watched.page.wait_for_timeout(1500)
                watched.page.screenshot(path=folder / f"{file.stem}-{run.name}.png")
        watched.assert_quiet()
    print(f"pictures in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--only", choices=["big", "pictures"])
    given = parser.parse_args()
    held = given.only == "pictures" or big(big_run(given.output_dir / "big"))
    if given.runs and given.only != "big":
        pictures(given.runs, given.output_dir / "pictures")
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
