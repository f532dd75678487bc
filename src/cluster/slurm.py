"""What SLURM is asked and told: each of its commands, read by its own format."""

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from src.common.errors import InputError

SECONDS = 120
"""A busy controller answers late."""
WAITING = {
    *("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"),
    *("SPECIAL_EXIT", "RESV_DEL_HOLD", "SUSPENDED", "STOPPED"),
}
"""Not PREEMPTED: a job that is queued again is PENDING to the controller."""
BETWEEN = {"PREEMPTED", "REQUEUED", "NODE_FAIL"}
"""Words of the records alone that do not say whether the job is queued again: the controller does."""
RUNNING = {"RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING", "RESIZING"}
NO_TASK = "4294967294"
"""SLURM's number for none."""
LIMITS = re.compile(r"MaxSubmit|QOSMaxSubmit|AssocMaxSubmit|Job violates accounting/QOS policy|MaxJobCount", re.I)
ARRAY = re.compile(r"(\d+)_\[([\d,\-]+)(?:%\d+)?\]")


@dataclass(frozen=True)
class TaskState:
    """One task of an array as SLURM knows it."""

    state: str
    """SLURM's own word, as PENDING or COMPLETED."""
    reason: str = ""

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING

    @property
    def is_running(self) -> bool:
        return self.state in RUNNING


class SubmitLimit(Exception):
    """SLURM takes no more jobs of this user for now."""


def is_here() -> bool:
    """Whether there is a SLURM."""
    return shutil.which("sbatch") is not None


def require() -> None:
    """Raises InputError where there is no SLURM."""
    if not is_here():
        raise InputError("no SLURM here (no sbatch); add --local to run the same plan in this machine's processes")


def refusal(script: Path, words: Sequence[str], root: Path) -> str | None:
    """What sbatch says of a script that it would not take; None for one that it would."""
    done = _call(["sbatch", "--test-only", *words, str(script)], root)
    return done.stderr.strip() if done.returncode else None


def submit(script: Path, words: Sequence[str], root: Path) -> str:
    """
    Submit a script from `root` and return the job's number. Raises InputError with all that sbatch says where it does
    not take it, and SubmitLimit where it would later.
    """
    done = _call(["sbatch", "--parsable", *words, str(script)], root)
    if done.returncode:
        refuse(script, done.stderr.strip())
    return done.stdout.strip().split(";")[0]


def refuse(script: Path, told: str) -> NoReturn:
    """The error of a script that sbatch does not take."""
    if LIMITS.search(told):
        raise SubmitLimit(told)
    raise InputError(f"sbatch refuses {script}:\n{told}")


def cancel(tasks: Iterable[str]) -> None:
    """End tasks ("123_4"). Raises InputError where SLURM refuses."""
    words = sorted(set(tasks))
    for at in range(0, len(words), 500):
        done = _call(["scancel", *words[at : at + 500]])
        if done.returncode:
            raise InputError(f"scancel: {done.stderr.strip()}")


def answers() -> bool:
    """Whether the controller can be reached: what it does not know then, it does not know."""
    return _call(["scontrol", "ping"]).returncode == 0


def configuration() -> dict[str, str]:
    """`scontrol show config`, name → value; empty where it does not answer."""
    done = _call(["scontrol", "show", "config"])
    pairs = (line.partition("=") for line in done.stdout.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs} if not done.returncode else {}


def states(tasks: Iterable[str]) -> tuple[dict[str, TaskState | None], bool]:
    """
    Of tasks ("123_4"): task → what the first of squeue, sacct, sacct --completion and scontrol says that knows it (None
    where none does; one that does not answer is passed over), and whether the controller answered: a task that it did
    not name then is none of its tasks.
    """
    tasks = sorted(set(tasks))
    if not tasks:
        return {}, True
    known, answered = _squeue(_jobs(tasks))
    # scontrol asks the controller too, job by job, and waits long for one that is not there.
    for source in (_sacct, _completion, *((_scontrol,) if answered else ())):
        lacking = [task for task in tasks if _of(known, task) is None]
        if lacking:
            more = source(_jobs(lacking))
            known |= {task: state for task, state in more.items()
                      if task not in known and (answered or state.state not in BETWEEN)}  # fmt: skip
    return {task: _of(known, task) for task in tasks}, answered


def _jobs(tasks: Iterable[str]) -> list[str]:
    return sorted({task.partition("_")[0] for task in tasks})


def _of(known: Mapping[str, TaskState], task: str) -> TaskState | None:
    # An array's own number stands for those of its tasks that are not named: they were cancelled together before they
    # began.
    return known.get(task) or known.get(task.partition("_")[0])


def _squeue(jobs: Sequence[str]) -> tuple[dict[str, TaskState], bool]:
    done = _call(["squeue", "--noheader", "--states=all", "--format=%i|%T|%r", f"--jobs={','.join(jobs)}"])
    # An unknown job among several is no error, a single one is: both leave it to the next source.
    answered = not done.returncode or "invalid job id" in done.stderr.lower()
    return dict(_tasks(line.split("|") for line in done.stdout.splitlines())), answered


def _sacct(jobs: Sequence[str], *more: str) -> dict[str, TaskState]:
    done = _call(["sacct", *more, "--noheader", "--parsable2", "--allocations", "--duplicates",
                  "--format=JobID,State,ExitCode", f"--jobs={','.join(jobs)}"])  # fmt: skip
    rows = (line.split("|") for line in done.stdout.splitlines())
    # Of a job that ran several times the last line is the newest.
    return dict(
        _tasks((task, state, f"exit code {code}") for task, state, code in (row for row in rows if len(row) == 3))
    )


def _completion(jobs: Sequence[str]) -> dict[str, TaskState]:
    # Completion records have other fields; some name an array's tasks by numbers of their own, which say nothing.
    done = _call(["sacct", "--completion", "--noheader", "--parsable2", "--format=JobID,State",
                  f"--jobs={','.join(jobs)}"])  # fmt: skip
    rows = (line.split("|") for line in done.stdout.splitlines())
    return dict(_tasks((*row[:2], "") for row in rows if len(row) >= 2 and "_" in row[0]))


def _scontrol(jobs: Sequence[str]) -> dict[str, TaskState]:
    found: dict[str, TaskState] = {}
    for job in jobs:
        done = _call(["scontrol", "--oneliner", "show", "job", job])
        for line in done.stdout.splitlines():
            fields = dict(re.findall(r"(\w+)=(\S*)", line))
            array, index = fields.get("ArrayJobId", fields.get("JobId")), fields.get("ArrayTaskId", NO_TASK)
            task = str(array) if index == NO_TASK else f"{array}_{index}"
            rows = [(task.replace("_", "_[", 1) + "]" if re.search(r"[,\-]", task) else task,
                     fields.get("JobState", ""), f"exit code {fields.get('ExitCode')}")]  # fmt: skip
            found |= dict(_tasks(rows))
    return found


def _tasks(rows: Iterable[Sequence[str]]) -> Iterator[tuple[str, TaskState]]:
    """Rows of task, state and reason; "123_[0-2,5%2]" stands for several tasks."""
    for row in rows:
        if len(row) < 3 or not row[1]:
            continue
        # "CANCELLED by 0", "CANCELLED+"
        state = TaskState(re.split(r"[ +]", row[1].strip())[0], row[2].strip())
        several = ARRAY.fullmatch(row[0])
        for task in spread(several[2]) if several else [None]:
            yield (row[0] if task is None else f"{several[1]}_{task}"), state


def spread(numbers: str) -> Iterator[int]:
    """The numbers of "0-2,5"."""
    for part in numbers.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def gathered(numbers: Iterable[int]) -> str:
    """The reverse of `spread`, as short as it goes."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _call(words: Sequence[str], root: Path | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        return subprocess.CompletedProcess(words, 127, "", f"{words[0]}: not found")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", f"{words[0]}: no answer in {SECONDS} s")
