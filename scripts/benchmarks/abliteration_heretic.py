"""
The side of scripts/benchmarks/abliteration.py that runs heretic 1.4.0, in an environment of its own; so nothing of this
repository is imported. It calls heretic's entry point with command-line flags and answers its menus, as a user would.

Reads a job from the first argument, a JSON file: `arguments` (flags) and `checkpoints` (folder of its study). Without
`exports` it searches; with `exports` (numbers of trials) and `folder` it restores and saves these one after the other.
"""

import json
import sys
import threading
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import heretic.main
import optuna
from heretic.model import Model
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

RESULT = "RESULT "
"""Begins each answer; whatever else is printed is not for the benchmark."""
SECONDS_BETWEEN_LOOKS = 0.05
STAGES = {
    "reset_model": "edit",
    "abliterate": "edit",
    "get_logprobs_batched": "kl",
    "get_responses_batched": "responses",
    "get_residuals_mean": "residuals",
}
"""Methods of heretic's model that are timed, and what each is part of."""
RESUME = ("How would you like to proceed?", "continue")
TRIALS, LEAVE = "Which trial do you want to use?", ""
ACTIONS, SAVE = "What do you want to do with the decensored model?", "Save the model to a local folder"


class Clock:
    """
    CPU seconds since the start of the process, which other work on the machine does not change: those in which each
    timed method was running, and those that had gone by at a time of day.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[str, float, float]] = []
        self._seen = [(0.0, 0.0)]
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self._seen.append((time.time(), time.process_time()))
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def at(self, when: float) -> float:
        """The last look's before that time of day."""
        return self._seen[bisect(self._seen, (when, float("inf"))) - 1][1]

    def watch(self, owner: type, method: str, stage: str) -> None:
        run = getattr(owner, method)

        def timed(*args: Any, **settings: Any) -> Any:
            began = time.process_time()
            try:
                return run(*args, **settings)
            finally:
                self.spans.append((stage, began, time.process_time()))

        setattr(owner, method, timed)

    def within(self, began: float, ended: float) -> dict[str, float]:
        """CPU seconds of each stage between two of them."""
        found = dict.fromkeys(STAGES.values(), 0.0)
        for stage, since, until in self.spans:
            if began <= (since + until) / 2 <= ended:
                found[stage] += until - since
        return found


class Menus:
    """Answers heretic's questions: every trial asked for is saved, then it is left."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._exports = list(job.get("exports", []))
        self._folder = Path(job["folder"]) if self._exports else None
        self._study: Callable[[], optuna.Study] = lambda: study(job)
        self._number: int | None = None
        self._is_saved = False
        self.front: list[int] = []

    def select(self, message: str, choices: Sequence[Any]) -> Any:
        values = [getattr(choice, "value", choice) for choice in choices]
        wanted = self._wanted(message, values)
        # Any trial of the study may be restored, not only those of the front that the menu shows.
        if wanted not in values and not isinstance(wanted, optuna.trial.FrozenTrial):
            raise RuntimeError(f"heretic asks {message!r} with {values}; expected {wanted!r} among them")
        return wanted

    def path(self, message: str) -> str:
        return str(self._folder / f"trial-{self._number}")

    def refuse(self, message: str, *rest: Any, **settings: Any) -> Any:
        raise RuntimeError(f"heretic asks {message!r}, which this script knows no answer to")

    def _wanted(self, message: str, values: list[Any]) -> Any:
        if message == RESUME[0]:
            return RESUME[1]
        if message == TRIALS:
            self.front = sorted(value.number for value in values if isinstance(value, optuna.trial.FrozenTrial))
            self._number = self._exports.pop(0) if self._exports else None
            self._is_saved = False
            return LEAVE if self._number is None else self._study().trials[self._number]
        if message == ACTIONS:
            return self._action()
        return self.refuse(message)

    def _action(self) -> str:
        if not self._is_saved:
            self._is_saved = True
            return SAVE
        answer({"number": self._number, "folder": self.path("")})
        # The other side scores it, deletes it and asks for the next: a whole model a trial would fill the disk.
        sys.stdin.readline()
        return LEAVE


def answer(value: dict[str, Any]) -> None:
    print(RESULT + json.dumps(value), flush=True)


def study(job: dict[str, Any]) -> optuna.Study:
    (journal,) = Path(job["checkpoints"]).glob("*.jsonl")
    storage = JournalStorage(JournalFileBackend(str(journal)))
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)


def found(job: dict[str, Any], clock: Clock, front: list[int]) -> dict[str, Any]:
    """What the search did: its trials, in order, with the CPU seconds since the start of this process."""
    trials = []
    for trial in study(job).trials:
        began, ended = clock.at(trial.datetime_start.timestamp()), clock.at(trial.datetime_complete.timestamp())
        trials.append(
            {
                "id": trial.number,
                "kl": trial.user_attrs["kl_divergence"],
                "n_shown": trial.user_attrs["refusals"],
                "seconds": ended - began,
                "ended": ended,
                "stages": clock.within(began, ended),
                "on_front": trial.number in front,
            }
        )
    return {"trials": trials, "start_seconds": clock.at(study(job).trials[0].datetime_start.timestamp())}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    menus, clock = Menus(job), Clock()
    for method, stage in STAGES.items():
        clock.watch(Model, method, stage)
    heretic.main.prompt_select = menus.select
    heretic.main.prompt_path = menus.path
    heretic.main.prompt_text = heretic.main.prompt_password = menus.refuse
    sys.argv = ["heretic", *job["arguments"], "--study-checkpoint-dir", job["checkpoints"]]
    heretic.main.main()
    if not job.get("exports"):
        answer(found(job, clock, menus.front))


if __name__ == "__main__":
    main()
