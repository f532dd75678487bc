"""The search: plans are asked for, turned into edits, scored stage by stage, and told."""

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.trial import Trial
from tqdm import tqdm

from src.abliteration.edits import EditMaker
from src.abliteration.scores import Scorer, Scores, timed
from src.abliteration.settings import AbliterateSettings
from src.abliteration.space import Space
from src.abliteration.study import Study, front, row_of

LOGGER = logging.getLogger(__name__)
NOTHING_REMOVED = 0.1
"""Nats per token: what the sampler is told on top of the KL of an edit that removes nothing; of others their share."""
SHARE_SLACK = 0.025
"""Of the responses: how many more than the fewest may show the behaviour in the trial that auto chooses."""
TIMES_KL = 2.0
"""The KL, of the least, that an answer fewer may cost."""


def search(
    config: AbliterateSettings, study: Study, space: Space, maker: EditMaker, scorer: Scorer,
    on_trial: Callable[[], None],
) -> None:  # fmt: skip
    """
    Run trials until the study has --n_trials; `on_trial` is called after each batch of them. Raises StopRequested as
    signals do; what is done stays.
    """
    with tqdm(total=config.n_trials, initial=len(study.done()), unit="trial", file=sys.stderr, smoothing=0.1) as bar:
        while len(study.done()) < config.n_trials:
            study.take_back(alone=config.storage is None)
            asked = study.ask(config.trials_per_batch, config.n_trials)
            if asked:
                with study.alive(asked, config.stale_seconds):
                    _run(config, study, space, maker, scorer, asked)
                on_trial()
            else:
                # Another process is at the last ones; should it end without telling, they are run here.
                time.sleep(min(1.0, config.stale_seconds / 4))
            rows = [row_of(trial) for trial in study.done()]
            bar.n = len(rows)
            bar.set_postfix_str(best_in_words(rows))


def _run(
    config: AbliterateSettings, study: Study, space: Space, maker: EditMaker, scorer: Scorer, asked: Sequence[Trial]
) -> None:
    """Score some trials in one batch and tell them."""
    drawn = [(trial, plan) for trial in asked if (plan := study.draw(trial, space))]
    if not drawn:
        return
    full = [row_of(trial) for trial in study.done()]
    # No edit at all is known too.
    known = [(0.0, scorer.n_before)] + [(row["kl"], shown(row)) for row in full if row["stage"] == "full"]
    with timed(scores := [], "all"):
        scores += scorer.score([maker.edits(plan) for _, plan in drawn], gate_of(config, known))
    for (trial, plan), each in zip(drawn, scores, strict=True):
        study.tell(
            trial, plain(each) | {"params": plan.as_params(), "n_layers": space.n_layers},
            values(each, config.max_kl, scorer.n_before),
        )  # fmt: skip


def gate_of(config: AbliterateSettings, known: Sequence[tuple[float, float]]) -> Callable[[Scores], bool]:
    """
    Stops a trial above --max_kl, and one that a trial of `known` (KL and `Scores.shown`, both in full) is at least as
    good as in both: its KL is final and its `shown` can only grow, so it cannot come to the front.
    """

    def gate(scores: Scores) -> bool:
        if not config.gates:
            return False
        return scores.kl > config.max_kl or any(kl <= scores.kl and n <= scores.shown for kl, n in known)

    return gate


def values(scores: Scores, max_kl: float, n_before: int) -> tuple[float, float]:
    """
    What the sampler learns from: KL, at most twice the bound, and the share of answers that show the behaviour. The KL
    of an edit that leaves behaviour where it was is told as more: nothing is nearer to the model than hardly an edit,
    and a sampler that has found that out proposes little else.
    """
    if scores.kl > max_kl and scores.stage == "kl":
        return min(scores.kl, 2 * max_kl), 1.0
    left = min(1.0, scores.shown / n_before)
    return min(scores.kl, 2 * max_kl) + NOTHING_REMOVED * left, scores.shown / scores.n_behaviour


def plain(scores: Scores) -> dict[str, Any]:
    """The scores as JSON values; no KL of an edit that left a model without probabilities."""
    # JSON knows no infinity.
    measured = {name: getattr(scores, name) for name in ("kl", "kl_first", "log_odds")}
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in measured.items()}
    return {
        "stage": scores.stage, **finite,
        "behaviour": scores.behaviour, "n_behaviour": scores.n_behaviour, "expected": scores.expected,
        "bounds": scores.bounds,
        "seconds": {name: round(value, 3) for name, value in scores.seconds.items()},
        "cpu_seconds": {name: round(value, 3) for name, value in scores.cpu_seconds.items()},
    }  # fmt: skip


def on_front(rows: Sequence[Mapping[str, Any]], max_kl: float, n_before: int) -> list[dict[str, Any]]:
    """
    The rows of the front in the order of KL: measured in full, within the bound, beaten by none, and by no edit at all
    neither, which has KL 0 and `n_before` answers that show the behaviour.
    """
    full = [row for row in rows if row["stage"] == "full" and row["kl"] <= max_kl and row["behaviour"] < n_before]
    return [full[i] for i in front([(row["kl"], shown(row)) for row in full])]


def shown(row: Mapping[str, Any]) -> float:
    """`Scores.shown` of a row of trials.jsonl."""
    return max(row["behaviour"], row["expected"] or 0.0)


def choose(best: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """The trial of the front that --select auto takes, and by which rule, in words."""
    n = best[0]["n_behaviour"]
    most = min(map(shown, best)) + max(1, math.floor(SHARE_SLACK * n))
    near = [row for row in best if shown(row) <= most]
    bound = TIMES_KL * min(row["kl"] for row in near)
    rule = (
        f"of the trials of the front with at most {most:.4g} of {n} responses that show the behaviour, counted or "
        f"expected, and at most {TIMES_KL:g} times the least KL of those: the fewest counted, then the least KL"
    )
    return min((row for row in near if row["kl"] <= bound), key=lambda row: (row["behaviour"], row["kl"])), rule


def best_in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """The best so far, in counts."""
    full = [row for row in rows if row["stage"] == "full"]
    if not full:
        return ""
    best = min(full, key=lambda row: (row["behaviour"], row["kl"]))
    return f"behaviour {best['behaviour']}/{best['n_behaviour']}, KL {best['kl']:.3g}"
