"""The same plan without SLURM: runs in processes of this machine, N at a time, each after what it waits for."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from src.cluster.matrix import PlannedRun
from src.cluster.records import LOGS, Submitted, add_submitted
from src.cluster.states import is_done
from src.common.errors import InputError
from src.common.provenance import now

POLL_SECONDS = 0.2
GRACE_SECONDS = 120.0
"""For a run to save after it was told to stop."""


def run_all(folder: Path, root: Path, runs: Sequence[PlannedRun], n_at_once: int) -> dict[str, int | None]:
    """
    Run id → exit code of everything that was open; None for what was not begun, as something before it failed. A
    signal or Ctrl-C is passed on to the runs, and raised again when they have saved.
    """
    from tqdm import tqdm

    (folder / LOGS).mkdir(exist_ok=True)
    waiting, running = list(runs), dict[str, tuple[PlannedRun, subprocess.Popen]]()
    codes: dict[str, int | None] = {}
    open_ids = {run.id for run in runs}
    bar = tqdm(total=len(runs), unit="run", dynamic_ncols=True, file=sys.stderr)
    try:
        while waiting or running:
            for run in list(waiting):
                before = [each for each in run.after if each in open_ids]
                if any(codes.get(each, 0) != 0 for each in before):
                    waiting.remove(run)
                    codes[run.id] = None
                    bar.update()
                elif len(running) < n_at_once and all(codes.get(each) == 0 for each in before):
                    waiting.remove(run)
                    running[run.id] = (run, _start(folder, root, run))
            for id_, (run, process) in list(running.items()):
                if process.poll() is not None:
                    code = process.returncode
                    codes[id_] = 1 if code == 0 and not is_done(run) else code
                    del running[id_]
                    bar.update()
            names = ", ".join(run.name for run, _ in running.values())
            if names != bar.postfix:
                bar.set_postfix_str(names)
            time.sleep(POLL_SECONDS)
    except BaseException:
        _stop([process for _, process in running.values()])
        raise
    finally:
        bar.close()
    return codes


def _start(folder: Path, root: Path, run: PlannedRun) -> subprocess.Popen:
    words = [sys.executable, "-m", f"src.{run.command[0]}", *run.command[1:]]
    log, at = folder / LOGS / f"{run.step}-{run.name}.out", now()
    try:
        with log.open("ab") as file:
            # In a group of its own: Ctrl-C is passed on once, by us.
            process = subprocess.Popen(
                words, cwd=root, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
    except OSError as error:
        raise InputError(f"{log}: {error.strerror}") from error
    host = socket.gethostname()
    add_submitted(folder, [Submitted(id=run.id, task=None, submitted=at, log=str(log), pid=process.pid, host=host)])
    return process


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
