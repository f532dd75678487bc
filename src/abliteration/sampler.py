"""What the search's next point is drawn by: TPE, whose draws a stop and a second process leave as they are."""

import hashlib
from collections.abc import Sequence
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

N_CANDIDATES = 128
"""Points that TPE chooses among, for each that it proposes."""


class TrialSampler(BaseSampler):
    """
    Multivariate TPE (Bergstra et al. 2011; Falkner et al. 2018, arXiv 1807.01774), seeded anew for every trial. What it
    draws depends on the seed, on the trial's number and on the trials before it: not on the process, nor on when that
    began. So processes that share a study never draw the same points, and one that has it alone goes on after a stop as
    if there had been none, but for one in the milliseconds in which a trial is drawn or the second of a batch is told.
    """

    def __init__(self, seed: int, n_startup: int, *, alone: bool) -> None:
        """
        n_startup: trials drawn at random first. alone: whether one process at a time has the study, so that a trial
        that failed was one that is run again: it takes no number.
        """
        self._seed, self._n_startup, self._alone = seed, n_startup, alone
        self._samplers: dict[int, TPESampler] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As the class says."""
        return self._of(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As the class says."""
        return self._of(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As the class says."""
        return self._of(study, trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Lets go of what drew the trial."""
        self._of(study, trial).after_trial(study, trial, state, values)
        del self._samplers[trial.number]

    def _of(self, study: Study, trial: FrozenTrial) -> TPESampler:
        if trial.number not in self._samplers:
            self._samplers[trial.number] = TPESampler(
                multivariate=True, constant_liar=True, n_startup_trials=self._n_startup,
                n_ei_candidates=N_CANDIDATES, seed=self._seed_of(study, trial),
            )  # fmt: skip
        return self._samplers[trial.number]

    def _seed_of(self, study: Study, trial: FrozenTrial) -> int:
        failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,)) if self._alone else []
        number = trial.number - sum(each.number < trial.number for each in failed)
        return int.from_bytes(hashlib.sha256(f"{self._seed}:{number}".encode()).digest()[:4])
