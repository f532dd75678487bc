"""
Look at run folders: an HTML report each, a server of reports, or the app. From the repository root:
uv run -m src.view data/experiments/first_personas
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from src.common.cli import run_command
from src.common.errors import InputError
from src.common.files import write_text_atomic
from src.common.run_folder import CONFIG, DONE, read_json
from src.common.settings import setting

REPORT, BESIDE = "report.html", "view.html"
APP = Path(__file__).parent / "viz" / "app.py"


@dataclass(kw_only=True)
class ViewConfig:
    """The view"""

    runs: list[Path] | None = setting(None, positional=True)
    """Run folders; each gets a report.html, or a view.html beside its own. May stand without the flag."""
    root: Path | None = None
    """A folder: all runs below it, in place of naming them; links out of it are not followed."""
    serve: bool = False
    """Show the reports at localhost:PORT/NAME.html instead of writing them."""
    app: bool = False
    """Open the app, which filters, draws and compares the rows of several runs."""
    port: int = 8765
    """Where --serve and --app listen, on 127.0.0.1 only."""

    def __post_init__(self) -> None:
        if not self.runs and self.root is None:
            raise InputError("no runs; expected run folders, or --root FOLDER for all runs below it")
        if self.runs and self.root is not None and not self.app:
            raise InputError("--root names all runs below it; leave it or the run folders out")
        if self.serve and self.app:
            raise InputError("--serve and --app exclude each other; give one of them")
        if not 1 <= self.port <= 65535:
            raise InputError(f"--port {self.port}: expected 1 to 65535")


def main(config: ViewConfig) -> None:
    from src.viz.report import report

    # 1. The app finds its runs itself.
    if config.app:
        open_app(config)
        return

    # 2. All folders are looked at before anything is written or shown.
    folders = chosen_folders(config)
    if config.serve:
        serve(folders, config.port)
        return
    reports = {folder / page_name(folder): report(folder) for folder in folders}

    # 3. One page in each.
    for path, text in reports.items():
        try:
            write_text_atomic(path, text)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; the run folder must be writable") from error
        print(f"wrote {path}  open it in a browser")


def chosen_folders(config: ViewConfig) -> list[Path]:
    """The folders that were named, or all below --root. Raises InputError where there is none."""
    if config.root is None:
        return list(config.runs or [])
    from src.viz.data import find_runs, inside
    from src.viz.report import is_experiment

    found = [inside(config.root, name) for name in find_runs(config.root).runs]
    runs = [folder for folder in found if (folder / CONFIG).exists() or is_experiment(folder)]
    if not runs:
        raise InputError(f"--root {config.root}: no run folder below it")
    return runs


def page_name(folder: Path) -> str:
    """report.html, or view.html beside a report that the run wrote itself."""
    return BESIDE if has_own_report(folder) else REPORT


def has_own_report(folder: Path) -> bool:
    """Whether the run wrote a report itself."""
    return (folder / DONE).exists() and REPORT in read_json(folder / DONE)["files"]


def serve(folders: list[Path], port: int) -> None:
    """Show reports, made anew at each visit, until Ctrl-C; a run's own report as NAME-own.html."""
    from src.viz.report import check_folder, own_report, report
    from src.viz.serving import names_of, server

    pages = {}
    names = names_of(folders)
    for name, folder in names.items():
        check_folder(folder)
        pages[name] = partial(report, folder)
        if has_own_report(folder):
            own = f"{name}-own"
            while own in names:
                own += "-own"
            pages[own] = partial(own_report, folder)
    with server(pages, port) as running:
        for name in pages:
            print(f"http://localhost:{port}/{name}.html")
        print(f"Ctrl-C ends it; from another machine: ssh -L {port}:localhost:{port} THIS_MACHINE", flush=True)
        running.serve_forever()


def open_app(config: ViewConfig) -> None:
    """Run Streamlit until it ends. Raises InputError for a folder that is not there."""
    root, names = app_root(config)
    address = f"http://localhost:{config.port}/" + ("?" + "&".join(f"run={name}" for name in names) if names else "")
    print(f"the app: {address}  (Ctrl-C ends it)", flush=True)
    words = [
        sys.executable, "-m", "streamlit", "run", str(APP), "--server.address", "127.0.0.1", "--server.port",
        str(config.port), "--server.headless", "true", "--browser.gatherUsageStats", "false", "--", "--root", str(root),
    ]  # fmt: skip
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(APP.parents[2])}, check=False)
    if done.returncode:
        raise InputError(f"Streamlit ended with {done.returncode}; its own lines above say why")


def app_root(config: ViewConfig) -> tuple[Path, list[str]]:
    """The folder that the app may read, and the runs to open first, as they stand in its address."""
    from urllib.parse import quote

    from src.viz.data import find_runs, inside

    runs = [path.resolve() for path in config.runs or []]
    root = (config.root or Path(os.path.commonpath([path.parent for path in runs]))).resolve()
    found = find_runs(root).runs
    names = [str(inside(root, str(path)).relative_to(root)) for path in runs]
    for path, name in zip(runs, names, strict=True):
        if name not in found:
            raise InputError(f"{path}: no run folder below {root}; expected a folder with results")
    return root, [quote(name, safe="/") for name in names]


if __name__ == "__main__":
    run_command(main, ViewConfig)
