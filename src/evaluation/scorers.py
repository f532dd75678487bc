"""
What is right: the scorers of tasks from files. A scorer gives each sample a score, 1 or 0, and says in its metadata
what it was made of. `SCORERS` is the register: a further scorer is a function of the header and a line there; the judge
stands apart, for it is more than a header.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from inspect_ai.model import get_model
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, mean, metric, scorer, stderr
from inspect_ai.solver import TaskState

from src.common.rubrics import Rubric
from src.evaluation.task_header import JUDGE, JUDGED_PLACES, SCORER_NAMES, Header
from src.ops.calibration import brier, calibration_error

if TYPE_CHECKING:
    from src.evaluation.judge import Judge

PROBABILITY, LABEL, JUDGED = "probability", "label", "judged"


def exact_of(header: Header) -> Scorer:
    """1 where the answer is one of the targets, white space around either left out; case counts unless ignored."""

    @scorer(metrics=[mean(), stderr()], name="exact")
    def exact() -> Scorer:
        async def score(state: TaskState, target: Target) -> Score:
            answer = _folded(state.output.completion.strip(), header)
            return Score(value=float(any(answer == _folded(each.strip(), header) for each in target)), answer=answer)

        return score

    return exact()


def includes_of(header: Header) -> Scorer:
    """1 where one of the targets is somewhere in the answer."""

    @scorer(metrics=[mean(), stderr()], name="includes")
    def includes() -> Scorer:
        async def score(state: TaskState, target: Target) -> Score:
            answer = _folded(state.output.completion, header)
            return Score(value=float(any(_folded(each, header) in answer for each in target)), answer=answer)

        return score

    return includes()


def choice_of(header: Header) -> Scorer:
    """
    1 where the likeliest of the given answers is the right one. Letters are compared by their log-probability, texts by
    theirs a byte, so that a long text is not unlikely for its length. `probability`: that of the right one among all,
    by the log-probabilities as they are.
    """

    @scorer(metrics=[mean(), stderr()], name="choice")
    def choice() -> Scorer:
        async def score(state: TaskState, target: Target) -> Score:
            options, values = _weighed(state)
            weights = values if header.answers == "letters" else per_byte(options, values)
            best, right = argmax(weights), "ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(target.text)
            shares = softmax(values)
            return Score(
                value=float(best == right),
                answer="ABCDEFGHIJKLMNOPQRSTUVWXYZ"[best],
                metadata={PROBABILITY: shares[right]},
            )

        return score

    return choice()


def risk_of(header: Header) -> Scorer:
    """
    The probability of the positive one of two choices, given that it is one of them; 1 where the likelier came true.
    """

    @scorer(metrics=[mean(), stderr(), area_under_curve(), brier_score(), expected_calibration_error()], name="risk")
    def risk() -> Scorer:
        async def score(state: TaskState, target: Target) -> Score:
            options, values = _weighed(state)
            positive = header.positive if header.positive is not None else options[-1]
            probability = softmax(values)[options.index(positive)]
            label = int(target.text == positive)
            return Score(
                value=float((probability >= 0.5) == bool(label)),
                answer=options[argmax(values)],
                metadata={PROBABILITY: probability, LABEL: label},
            )

        return score

    return risk()


def judged_by(judge: "Judge", rubric: Rubric, header: Header) -> Scorer:
    """
    What a judge says of the answer under a rubric: a number as its place between the scale's ends, 0 to 1, a word as 1
    where it is the header's `positive`. Unscored where the judge's answer says neither.
    """

    @scorer(metrics=[mean(), stderr()], name=JUDGE)
    def judged() -> Scorer:
        async def score(state: TaskState, target: Target) -> Score:
            persona = get_model().model_args.get("persona")
            parts = (state.metadata["text"], state.output.completion, ", ".join(target), persona)
            values = dict(zip(JUDGED_PLACES, parts, strict=True))
            reading, said = await judge.read(rubric, values | (header.fill or {}))
            about = {JUDGED: reading.value, "mass": reading.mass, "judgement": said}
            if reading.value is None:
                return Score.unscored(reason="the judge's answer says no score", metadata=about)
            return Score(value=place_of(reading.value, rubric, header), answer=str(reading.value), metadata=about)

        return score

    return judged()


def place_of(value: float | str, rubric: Rubric, header: Header) -> float:
    """A judge's number as its place between the ends of the scale; of a word 1 where it is the positive one, else 0."""
    if isinstance(value, str):
        return float(value == (header.positive or rubric.choices[0]))
    return (value - rubric.low) / (rubric.high - rubric.low)


SCORERS: dict[str, Callable[[Header], Scorer]] = {
    "exact": exact_of,
    "includes": includes_of,
    "choice": choice_of,
    "risk": risk_of,
}
assert {*SCORERS, JUDGE} == set(SCORER_NAMES)


@metric
def area_under_curve() -> Metric:
    """Area under the ROC curve; NaN where all samples have one label."""

    def measure(scores: list[SampleScore]) -> float:
        value = auc_of(*_probabilities(scores))
        return math.nan if value is None else value

    return measure


@metric
def brier_score() -> Metric:
    # inspect-ai goes by the annotation.
    def measure(scores: list[SampleScore]) -> float:
        return brier(*_probabilities(scores))

    return measure


@metric
def expected_calibration_error() -> Metric:
    def measure(scores: list[SampleScore]) -> float:
        return calibration_error(*_probabilities(scores))

    return measure


def auc_of(probabilities: Sequence[float], labels: Sequence[int]) -> float | None:
    """`direction_scores.auc` of the probabilities of both labels; None where one of them is missing."""
    import torch

    from src.ops.direction_scores import auc

    both = [[p for p, y in zip(probabilities, labels, strict=True) if y == label] for label in (1, 0)]
    return float(auc(*(torch.tensor(some, dtype=torch.float64) for some in both))) if all(both) else None


def softmax(values: Sequence[float]) -> list[float]:
    """exp(v) / Σ exp(v), without overflow."""
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    return [weight / math.fsum(weights) for weight in weights]


def per_byte(options: Sequence[str], values: Sequence[float]) -> list[float]:
    """Log-probabilities over the lengths of their texts in UTF-8 bytes (acc_norm of lm-evaluation-harness)."""
    return [value / len(option.encode()) for option, value in zip(options, values, strict=True)]


def argmax(values: Sequence[float]) -> int:
    """The first of the largest."""
    return max(range(len(values)), key=values.__getitem__)


def _weighed(state: TaskState) -> tuple[list[str], list[float]]:
    metadata = state.output.metadata or {}
    return metadata["options"], metadata["log_probabilities"]


def _probabilities(scores: Sequence[SampleScore]) -> tuple[list[float], list[int]]:
    known = [each.score.metadata or {} for each in scores]
    return [each[PROBABILITY] for each in known], [each[LABEL] for each in known]


def _folded(text: str, header: Header) -> str:
    return text.casefold() if header.ignore_case else text
