"""
The Optuna study: trials asked for and told, by one process or by several that share a storage, none lost and none run
twice. What a trial scored is kept with it, so that every process knows all of them.
"""

import contextlib
import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
import sqlalchemy
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from src.abliteration.kernel import Plan
from src.abliteration.sampler import TrialSampler
from src.abliteration.space import Space
from src.abliteration.storage import BEATS_PER_STALE
from src.common.errors import InputError
from src.common.jsonl import round_fields

LOGGER = logging.getLogger(__name__)
ABOUT, SCORES, REPEATS, SURPLUS = "tiller_about", "tiller_scores", "tiller_repeats", "tiller_surplus"
WARM_START, BEGUN = "tiller_warm_start", "tiller_begun"
FIXED = "fixed_params"
"""Where Optuna keeps the parameters of a trial that was enqueued."""
MEASURED = ("kl", "kl_first", "log_odds", "expected")


class Study:
    """The trials of one search."""

    def __init__(self, storage: JournalStorage | RDBStorage, name: str, *, n_startup: int, seed: int) -> None:
        self._storage = storage
        sampler = TrialSampler(seed, n_startup, alone=not isinstance(storage, RDBStorage))
        self._study = optuna.create_study(
            storage=storage, study_name=name, sampler=sampler, directions=["minimize", "minimize"], load_if_exists=True
        )

    def refuse_other(self, about: Mapping[str, Any]) -> None:
        """Raises InputError when the study is about something else: another model, other prompts, another protocol."""
        known = self._study.user_attrs.get(ABOUT)
        if known is None:
            if self.has_trials():
                raise InputError(f"the study {self._study.study_name!r} holds trials that are not of src.abliterate")
            return
        for name, value in about.items():
            if known.get(name) != value:
                raise InputError(
                    f"the study {self._study.study_name!r} was made with {name} {known.get(name)!r}, and this run has "
                    f"{value!r}: their scores cannot be compared; take another --study_name, or --warm_start to begin "
                    f"with its best points"
                )

    def claim(self, about: Mapping[str, Any]) -> None:
        """Write down what a new study is about. Raises what `refuse_other` raises."""
        self.refuse_other(about)
        if ABOUT not in self._study.user_attrs:
            self._study.set_user_attr(ABOUT, dict(about))

    @property
    def warm_start(self) -> dict[str, Any] | None:
        """
        What the study began with the best points of, None for nothing: `from`, its folder or storage, and
        `same_search_prompts`, whether those points were chosen on this study's search prompts; else prompts of the
        report may be among those they were chosen on.
        """
        return self._study.user_attrs.get(WARM_START)

    def note_warm_start(self, source: str, same_search_prompts: bool) -> None:
        """Keep what `warm_start` says."""
        self._study.set_user_attr(WARM_START, {"from": source, "same_search_prompts": same_search_prompts})

    def has_trials(self) -> bool:
        """Whether there is any, tried or waiting."""
        return bool(self._study.get_trials(deepcopy=False))

    def enqueue(self, plans: Sequence[Plan]) -> None:
        """
        Have these points tried first, and hold the study for begun. A point that is in it is not put there again,
        unless another process begins the study in the same moment.
        """
        for plan in plans:
            self._study.enqueue_trial(plan.as_params(), skip_if_exists=True)
        self._study.set_user_attr(BEGUN, True)

    @property
    def is_begun(self) -> bool:
        """Whether it has all points that it begins with: a process may have been killed while it put them there."""
        return BEGUN in self._study.user_attrs or bool(self.done())

    def take_back(self, alone: bool) -> None:
        """
        Have trials run again whose process has ended without telling. alone: whether no other process can have any, so
        that all that are running are such.
        """
        if isinstance(self._storage, RDBStorage):
            for trial in self._stale():
                self._repeat(trial)
            self._time_those_without_a_sign()
        elif alone:
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                self._repeat(trial)

    def ask(self, n: int, n_trials: int) -> list[optuna.Trial]:
        """Up to `n` trials of the `n_trials` that there are to be; none when all are done or running."""
        asked = []
        while len(asked) < n and sum(map(_counts, self._study.get_trials(deepcopy=False))) < n_trials:
            trial = self._study.ask()
            if isinstance(self._storage, RDBStorage):
                # At once: of a process that ends before its first sign of life nothing would be known.
                self._storage.record_heartbeat(trial._trial_id)
            mine = (trial.datetime_start, trial.number)
            others = [t for t in self._study.get_trials(deepcopy=False) if t.number != trial.number and _counts(t)]
            if sum((t.datetime_start, t.number) < mine for t in others) >= n_trials:
                # Another process has taken the last one meanwhile.
                self._give_back(trial)
                break
            asked.append(trial)
        return asked

    def draw(self, trial: optuna.Trial, space: Space) -> Plan | None:
        """The plan of a trial that was asked for; None where another process has taken the trial over."""
        try:
            return space.draw(trial)
        except optuna.exceptions.UpdateFinishedTrialError as error:
            _warn_of_loss(trial, error)
            return None

    def tell(self, trial: optuna.Trial, scores: Mapping[str, Any], values: tuple[float, float]) -> bool:
        """A trial's scores; False where another process, holding this one for dead, has taken the trial over."""
        try:
            trial.set_user_attr(SCORES, dict(scores))
            self._study.tell(trial, list(values))
        except (ValueError, RuntimeError) as error:
            _warn_of_loss(trial, error)
            return False
        return True

    def done(self) -> list[FrozenTrial]:
        """All trials that have been told, by whichever process."""
        return self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def n_running(self) -> int:
        """Trials that some process is at."""
        return len(self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    @contextlib.contextmanager
    def alive(self, trials: Sequence[optuna.Trial], stale_seconds: float) -> Iterator[None]:
        """Within the context other processes see that these trials are being run."""
        if not isinstance(self._storage, RDBStorage):
            yield
            return
        ended = threading.Event()

        def beat() -> None:
            while not ended.is_set():
                for trial in trials:
                    try:
                        self._storage.record_heartbeat(trial._trial_id)
                    except optuna.exceptions.StorageInternalError as error:
                        # The next one may arrive; without any, another process would run the trial, too.
                        LOGGER.warning("trial %d: no sign of life could be given (%s)", trial.number, error)
                ended.wait(max(0.2, stale_seconds / BEATS_PER_STALE))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _stale(self) -> list[FrozenTrial]:
        ids = set(self._storage._get_stale_trial_ids(self._study._study_id))
        return [t for t in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if t._trial_id in ids]

    def _time_those_without_a_sign(self) -> None:
        # Optuna holds a trial for running for ever whose process was killed before its first sign of life. One is given
        # here, so that it goes stale unless its process gives the next.
        with self._storage.engine.connect() as connection:
            signed = set(connection.execute(sqlalchemy.text("SELECT trial_id FROM trial_heartbeats")).scalars())
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial._trial_id not in signed:
                self._storage.record_heartbeat(trial._trial_id)

    def _repeat(self, trial: FrozenTrial) -> None:
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            # Of two processes that see it only one succeeds, and that one has it run again.
            if self._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL):
                # Of one killed before it drew them the parameters are those that it was to have, if any.
                params = trial.system_attrs.get(FIXED, {}) | trial.params
                self._study.enqueue_trial(params, user_attrs={REPEATS: trial.number})

    def _give_back(self, trial: optuna.Trial) -> None:
        known = self._storage.get_trial(trial._trial_id)
        try:
            trial.set_user_attr(SURPLUS, True)
            self._study.tell(trial, state=TrialState.FAIL)
        except (ValueError, RuntimeError) as error:
            _warn_of_loss(trial, error)
            return
        if FIXED in known.system_attrs:
            self._study.enqueue_trial(known.system_attrs[FIXED], user_attrs=known.user_attrs)


def _warn_of_loss(trial: optuna.Trial, error: Exception) -> None:
    LOGGER.warning("trial %d was given to another process meanwhile (%s)", trial.number, error)


def row_of(trial: FrozenTrial) -> dict[str, Any]:
    """The row of trials.jsonl of a trial that was told."""
    repeats = {"repeats": trial.user_attrs[REPEATS]} if REPEATS in trial.user_attrs else {}
    return {"id": trial.number} | trial.user_attrs[SCORES] | repeats


def written(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `row_of` as files hold it: what was measured rounded, parameters whole."""
    return round_fields(row, MEASURED)


def rows_there(storage: JournalStorage | RDBStorage, name: str) -> list[dict[str, Any]]:
    """The rows of a study's finished trials; none where there is no such study, or it is not of `src.abliterate`."""
    trials = [trial for trial in _trials_there(storage, name) if trial.state == TrialState.COMPLETE]
    return [row_of(trial) for trial in trials if SCORES in trial.user_attrs]


def chosen_on(storage: JournalStorage | RDBStorage, name: str, prompts: str) -> bool:
    """Whether the points of a study that is there, and those that it began with, were chosen on these prompts."""
    attrs = optuna.load_study(study_name=name, storage=storage, sampler=TPESampler()).user_attrs
    began = attrs.get(WARM_START, {"same_search_prompts": True})
    return attrs.get(ABOUT, {}).get("prompts") == prompts and began["same_search_prompts"]


def _trials_there(storage: JournalStorage | RDBStorage, name: str) -> list[FrozenTrial]:
    known = {summary.study_name for summary in optuna.get_all_study_summaries(storage, include_best_trial=False)}
    return optuna.load_study(study_name=name, storage=storage, sampler=TPESampler()).trials if name in known else []


def _counts(trial: FrozenTrial) -> bool:
    return trial.state in (TrialState.COMPLETE, TrialState.RUNNING)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The numbers of the points that no other point is below in one value and at most equal in the other."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    found, least = [], math.inf
    for i in order:
        if points[i][1] < least:
            found.append(i)
            least = points[i][1]
    return found
