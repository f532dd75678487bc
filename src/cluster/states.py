"""Where each run of a plan stands: marker files first, then what SLURM knows."""

import json
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from src.cluster import slurm
from src.cluster.matrix import PlannedRun
from src.cluster.records import Submitted
from src.common.run_folder import DONE, PROVENANCE

DONE_STATE, RUNNING, WAITING, FAILED, CANCELLED, LOST, PLANNED, UNKNOWN = (
    "done", "running", "waiting", "failed", "cancelled", "lost", "planned", "unknown",
)  # fmt: skip
OPEN = (PLANNED, FAILED, CANCELLED, LOST)
"""Those that `submit` submits."""
TAIL_BYTES = 20_000
LINES = re.compile(r"[\r\n]+")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """One run, now."""

    run: PlannedRun
    state: str
    reason: str = ""
    """SLURM's word for why it waits or failed, and what the command said last of an error."""
    progress: str = ""
    """The last line of the job's output."""
    tokens_per_second: float | None = None
    restarts: int = 0
    seconds: float | None = None
    task: str | None = None
    log: Path | None = None


def states_of(runs: Sequence[PlannedRun], submitted: Mapping[str, Submitted]) -> list[RunState]:
    """The state of every run."""
    pending = [submitted[run.id].task for run in runs if run.id in submitted and not is_done(run)]
    known, answered = slurm.states(task for task in pending if task)
    return [_state(run, submitted.get(run.id), known, LOST if answered else UNKNOWN) for run in runs]


def is_done(run: PlannedRun) -> bool:
    """Whether a run has finished, whoever ran it."""
    return (Path(run.folder) / DONE).exists()


def _state(
    run: PlannedRun, submitted: Submitted | None, known: Mapping[str, slurm.TaskState | None], lost: str
) -> RunState:  # fmt: skip
    folder = Path(run.folder)
    sessions = _sessions(folder)
    log = Path(submitted.log) if submitted else newest_log(folder)
    last = sessions[-1] if sessions else {}
    facts: dict[str, Any] = {
        "run": run, "restarts": max(0, len(sessions) - 1), "seconds": _seconds(sessions),
        "tokens_per_second": _rate(folder), "task": submitted.task if submitted else None, "log": log,
    }  # fmt: skip
    if is_done(run):
        return RunState(state=DONE_STATE, **facts)
    facts["progress"] = last_line(log)
    if submitted and (last.get("started") or submitted.submitted) < submitted.submitted:
        # What an earlier start said of itself is no news of this one.
        last = {}
    if submitted is None or submitted.task is None:
        state, reason = _of_process(run, submitted, last)
        return RunState(state=state, reason=reason or (facts["progress"] if state == FAILED else ""), **facts)
    task, told = known.get(submitted.task), _failure(last)
    if task is None:
        return RunState(state=lost, reason=told or "SLURM does not know it", **facts)
    if task.is_running:
        return RunState(state=RUNNING, **facts)
    if task.is_waiting:
        return RunState(state=WAITING, reason=task.reason, **facts)
    if task.state == "CANCELLED":
        return RunState(state=CANCELLED, reason=told or task.reason, **facts)
    reason = "no DONE in its folder" if task.state == "COMPLETED" else f"{task.state} ({task.reason})"
    return RunState(state=FAILED, reason=f"{reason}: {told}" if told else reason, **facts)


def _failure(session: Mapping[str, Any]) -> str:
    """What a session said of its failure."""
    outcome = session.get("outcome") or ""
    return outcome.removeprefix("failed: ") if outcome.startswith("failed") else ""


def _of_process(run: PlannedRun, started: Submitted | None, session: Mapping[str, Any]) -> tuple[str, str]:
    """State and reason of a run that SLURM has no part in, from its process and what it last said of itself."""
    if started and _is_process(started, run):
        return RUNNING, ""
    outcome = session.get("outcome")
    if outcome == "running":
        # A lock would say it too, but asking for it could turn away the run that is about to take it.
        alive = session["hostname"] == socket.gethostname() and psutil.pid_exists(session["pid"])
        return (RUNNING, "") if alive else (FAILED, "it was killed")
    if outcome == "stopped":
        return PLANNED, "stopped; it goes on when it is submitted again"
    failure = _failure(session)
    # A process that ended before it made its run folder said why in its output alone.
    return (FAILED, failure) if started or failure else (PLANNED, "")


def _is_process(started: Submitted, run: PlannedRun) -> bool:
    """Whether the process that was started for a run is still there, and not another by its number."""
    if started.pid is None or started.host != socket.gethostname():
        return False
    try:
        return run.folder in psutil.Process(started.pid).cmdline()
    except psutil.Error:
        return False


def _sessions(folder: Path) -> list[dict[str, Any]]:
    try:
        return json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError):
        # Not begun, or being written this moment on a file system that shows it.
        return []


def _seconds(sessions: Sequence[Mapping[str, Any]]) -> float | None:
    known = [each["seconds"] for each in sessions if each.get("seconds") is not None]
    return sum(known) if known else None


def _rate(folder: Path) -> float | None:
    """Tokens a second in the last line of metrics.jsonl that has them."""
    for line in reversed(LINES.split(_end(folder / "metrics.jsonl"))):
        try:
            value = json.loads(line).get("tokens_per_second")
        except (ValueError, AttributeError):
            continue
        if value is not None:
            return value
    return None


def newest_log(folder: Path) -> Path | None:
    """The log of the last start of a run."""
    return max((folder / "logs").glob("*.log"), default=None, key=lambda path: path.name)


def last_line(log: Path | None) -> str:
    """The last line that a log or a progress bar has written."""
    return next((line.strip() for line in reversed(LINES.split(_end(log))) if line.strip()), "")


def tail(log: Path | None, n_lines: int) -> list[str]:
    """The last lines of a log, of a progress bar only what it showed last."""
    lines = [line.rsplit("\r", 1)[-1] for line in _end(log).replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line.strip()][-n_lines:]


def _end(path: Path | None) -> str:
    if path is None or not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode("utf-8", "replace")
