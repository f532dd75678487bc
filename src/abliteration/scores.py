"""
What a trial is judged by, stage by stage: cheap measures first, and each a bound on the ones that follow.

- kl: KL(model ‖ edited) on the model's own continuations of control prompts. This is final.
- odds: of target prompts whose answer showed the behaviour, is its beginning, up to where it showed, still the edited
  model's greedy choice? Those surely show it, and one pass tells.
- short: the other target prompts, answered up to a quarter of the length.
- full: the same answers to their full length. One that shows the behaviour is not continued: no verdict changes by it.

The number of answers that show the behaviour can only grow from stage to stage: each is a lower bound of the last.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from src.abliteration.answering import Answers, Asked, Detector, batches_of, shows_already, trial_of
from src.abliteration.forcing import Forced, checked_lower, force, kept_layers, log_probability
from src.common.errors import InputError
from src.models.devices import FREE_MEMORY_SHARE, free_memory
from src.models.generation import NoNumbers
from src.models.language_model import LanguageModel, generate_all
from src.models.lower_layers import LowerStates
from src.models.residual_writers import PlacedWriter
from src.models.teacher_forcing import not_finite
from src.models.types import GenerationRequest
from src.models.weight_editor import Edits, editing
from src.ops.divergence import divergence

STAGES = ("kl", "odds", "short", "full")
SHORT_SHARE = 4
"""The short stage is of this part of the full length."""


@dataclass(kw_only=True)
class Scores:
    """What is known of a trial."""

    stage: str = "kl"
    kl: float = 0.0
    """Nats per token, mean over prompts; infinite where the edited model gives no probabilities any more."""
    kl_first: float = 0.0
    """Of the answers' first tokens alone, as heretic measures it."""
    log_odds: float | None = None
    """Mean over prompts of ln P(beginning by which the behaviour shows), edited less unedited."""
    behaviour: int = 0
    """Answers that show the behaviour, so far."""
    n_behaviour: int = 0
    """Answers in all."""
    expected: float | None = None
    """Answers that would show it if the odds were all there is to it."""
    bounds: dict[str, int] = field(default_factory=dict)
    """Stage → `behaviour` at its end."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage → seconds on the clock."""
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    """Stage → CPU seconds of this process, all threads together: other work on the machine does not add to them."""
    answers: dict[str, str] = field(default_factory=dict)
    """Prompt id → text, of the answers that were written to their end."""

    @property
    def shown(self) -> float:
        """
        Answers that show the behaviour, counted or expected, whichever is more: a greedy answer that only just does not
        begin so is no success. At every stage a lower bound of the last one's.
        """
        return max(self.behaviour, self.expected or 0.0)


@contextmanager
def timed(scores: Sequence[Scores], stage: str) -> Iterator[None]:
    """Notes what the context takes; the trials of one batch, also those that come within it, share it evenly."""
    began, began_cpu = time.monotonic(), time.process_time()
    yield
    for each in scores:
        each.seconds[stage] = (time.monotonic() - began) / len(scores)
        each.cpu_seconds[stage] = (time.process_time() - began_cpu) / len(scores)


Gate = Callable[[Scores], bool]
"""Whether a trial with these scores, whose behaviour is a lower bound, is to go no further."""


class Scorer:
    """Scores edits of one model on one set of prompts."""

    def __init__(
        self, model: LanguageModel, writers: Sequence[PlacedWriter], detector: Detector, *, target: Sequence[Asked],
        control: Sequence[Asked], kl_tokens: int, response_tokens: int, batch_size: int,
    ) -> None:  # fmt: skip
        """Answers the target prompts and continues the control prompts without any edit, to compare with."""
        self.model = model
        self._writers = writers
        self._detector = detector
        self._target = {asked.id: asked for asked in target}
        self._response_tokens = response_tokens
        self._batch_size = batch_size
        continued = self.answer(control, kl_tokens, [{}])[0]
        showing = dict(zip(continued, detector.shown([model.decode(each) for each in continued.values()]), strict=True))
        # A control prompt on which the behaviour shows would speak for leaving it where it is.
        forced = [Forced(asked.id, asked.token_ids, continued[asked.id]) for asked in control]
        self._continued = [each for each in forced if not showing[each.id]]
        self.n_left_out = len(forced) - len(self._continued)
        """Control prompts that show the behaviour without an edit, on which no KL is taken."""
        if not self._continued:
            raise InputError("the behaviour shows on every control prompt without an edit; expected other prompts")
        self._plain, self._lower = self._log_probabilities()
        answers = self.answer(target, response_tokens, [{}])[0]
        self.before = {name: model.decode(tokens) for name, tokens in answers.items()}
        shown = dict(zip(answers, detector.shown(list(self.before.values())), strict=True))
        self.n_before = sum(shown.values())
        """Target prompts whose answer shows the behaviour without an edit."""
        self._lower_beginnings: LowerStates | None = None
        self._beginnings, self._known = self._find_beginnings({name: answers[name] for name in answers if shown[name]})

    def score(self, trials: Sequence[Edits], gate: Gate = lambda scores: False) -> list[Scores]:
        """The trials' scores, side by side in every batch; a trial that `gate` stops keeps the stage it was at."""
        scores = [Scores(n_behaviour=len(self._target)) for _ in trials]
        open_trials = list(range(len(trials)))
        sure: list[set[str]] = [set() for _ in trials]
        with timed([scores[i] for i in open_trials], "kl"):
            for i, kl, first in zip(
                open_trials, *self._kl([trials[i] for i in open_trials], self._continued), strict=True
            ):
                scores[i].kl, scores[i].kl_first = kl, first
        open_trials = [i for i in open_trials if math.isfinite(scores[i].kl) and not gate(scores[i])]
        if open_trials and self._beginnings:
            with timed([scores[i] for i in open_trials], "odds"):
                for i, found in zip(
                    open_trials, self._odds([trials[i] for i in open_trials], self._beginnings), strict=True
                ):
                    if not found[1] < math.inf:
                        scores[i].kl = scores[i].kl_first = math.inf
                        continue
                    sure[i], scores[i].log_odds, scores[i].expected = found
                    scores[i].behaviour = scores[i].bounds["odds"] = len(sure[i])
                    scores[i].stage = "odds"
            open_trials = [i for i in open_trials if math.isfinite(scores[i].kl) and not gate(scores[i])]
        if open_trials:
            with timed([scores[i] for i in open_trials], "answers"):
                while open_trials:
                    try:
                        self._answer_rest(trials, scores, sure, open_trials, gate)
                        break
                    except NoNumbers as fault:
                        # Only what it writes itself breaks it; the others are answered anew, without it.
                        open_trials.remove(broken := trial_of(fault.request_id))
                        scores[broken].kl, scores[broken].kl_first, scores[broken].stage = math.inf, math.inf, "kl"
        return scores

    def scan(self, trials: Sequence[Edits], n_prompts: int) -> list[float]:
        """Of each trial `Scores.log_odds` on the first few prompts; one pass each, side by side where they can be."""
        return [change for _, change, _ in self._odds(trials, self._beginnings[:n_prompts])]

    def scan_kl(self, trials: Sequence[Edits], n_prompts: int) -> list[float]:
        """Of each trial `Scores.kl` on the first few prompts."""
        return self._kl(trials, self._continued[:n_prompts])[0]

    def answer(self, prompts: Sequence[Asked], n_tokens: int, trials: Sequence[Edits]) -> list[dict[str, tuple]]:
        """Greedy answers in full, prompt id → token ids, of each trial."""
        found = []
        for edits in trials:
            requests = [GenerationRequest(id=a.id, token_ids=a.token_ids, max_tokens=n_tokens) for a in prompts]
            with editing(self.model.model, self._writers, [edits]):
                results = generate_all(self.model, requests, batch_size=self._batch_size)
            found.append({result.id: result.token_ids for result in results})
        return found

    def _log_probabilities(self) -> tuple[list[Tensor], LowerStates | None]:
        """
        Unedited log-probabilities of each continuation, (places, vocabulary) float32, and what enters its layers.
        Raises InputError where the former do not fit, or are none.
        """
        vocabulary = self.model.model.get_output_embeddings().weight.shape[0]
        n_places = [each.n_places for each in self._continued]
        n_bytes, room = 4 * vocabulary * sum(n_places), FREE_MEMORY_SHARE * free_memory(self.model.device)
        if n_bytes > room:
            raise InputError(
                f"{len(n_places)} control prompts of up to {max(n_places)} tokens take {n_bytes / 1e9:.1f} GB of "
                f"log-probabilities, and {room / 1e9:.1f} may be taken; lower --n_search or --kl_tokens"
            )
        found: list[Tensor | None] = [None] * len(n_places)

        def note(trial: int, i: int, logits: Tensor) -> None:
            found[i] = logits.float().log_softmax(dim=-1)
            # A token that is masked out has none either, and that is no fault.
            if found[i].isnan().any():
                raise InputError(not_finite(self._continued[i].id, "logits"))

        kept = kept_layers(self.model, self._continued)
        force(self.model, self._writers, [{}], self._continued, note, keep=kept)
        return found, checked_lower(self.model, self._continued, kept, found)

    def _kl(self, trials: Sequence[Edits], continued: Sequence[Forced]) -> tuple[list[float], list[float]]:
        """Mean over prompts of the mean over tokens, and of the first token's, of each trial, as `Scores.kl`."""
        n = len(continued)
        means, firsts = (torch.zeros(len(trials), n, dtype=torch.float64) for _ in range(2))

        def note(trial: int, i: int, logits: Tensor) -> None:
            per_token = divergence(self._plain[i], logits).nan_to_num(nan=math.inf, posinf=math.inf)
            means[trial, i], firsts[trial, i] = per_token.mean(), per_token[0]

        force(self.model, self._writers, trials, continued, note, lower=self._lower)
        return means.mean(dim=1).tolist(), firsts.mean(dim=1).tolist()

    def _odds(self, trials: Sequence[Edits], beginnings: Sequence[Forced]) -> list[tuple[set[str], float, float]]:
        """Of each trial: prompts that surely show the behaviour, the mean change of log-odds, the expected number."""
        sure: list[set[str]] = [set() for _ in trials]
        changes, expected = [0.0] * len(trials), [0.0] * len(trials)

        def note(trial: int, i: int, logits: Tensor) -> None:
            value, is_greedy = log_probability(beginnings[i], logits)
            # Of logits that are no numbers: an infinite change is in every order last.
            value = math.inf if math.isnan(value) else value
            changes[trial] += (value - self._known[i]) / len(beginnings)
            expected[trial] += math.exp(min(value, 0.0))
            if is_greedy and self._detector.grows:
                sure[trial].add(beginnings[i].id)

        force(self.model, self._writers, trials, beginnings, note, lower=self._lower_beginnings)
        return list(zip(sure, changes, expected, strict=True))

    def _find_beginnings(self, answers: Mapping[str, tuple[int, ...]]) -> tuple[list[Forced], list[float]]:
        """Each answer that shows the behaviour up to where it has shown it, and ln P of that."""
        found = []
        for name, tokens in answers.items():
            shows = lambda n, tokens=tokens: shows_already(self.model, self._detector, tokens[:n])  # noqa: E731
            n = next(filter(shows, range(1, len(tokens))), len(tokens))
            found.append(Forced(name, self._target[name].token_ids, tokens[:n]))
        known = [0.0] * len(found)

        def note(trial: int, i: int, logits: Tensor) -> None:
            known[i], _ = log_probability(found[i], logits)

        if found:
            kept = kept_layers(self.model, found)
            force(self.model, self._writers, [{}], found, note, keep=kept)
            # What holds of the model holds here too.
            self._lower_beginnings = kept if self._lower else None
        return found, known

    def _answer_rest(
        self, trials: Sequence[Edits], scores: Sequence[Scores], sure: Sequence[set[str]], which: Sequence[int],
        gate: Gate,
    ) -> None:  # fmt: skip
        """Answer what the odds left open, in batches of all trials' rows; a trial that is stopped loses its rows."""
        open_rows = [(i, name) for name in self._target for i in which if name not in sure[i]]
        # Equal prompts of different trials lie side by side, and long ones with long ones.
        for i in which:
            scores[i].stage = "short" if self._detector.grows else "full"
            scores[i].behaviour, scores[i].answers = len(sure[i]), {}

        def note(trial: int, name: str, shown: bool, text: str | None) -> None:
            scores[trial].behaviour += shown
            if text is not None:
                scores[trial].answers[name] = text

        stopped: set[int] = set()
        numbers = {i: number for number, i in enumerate(which)}
        with editing(self.model.model, self._writers, [trials[i] for i in which]) as rows, torch.inference_mode():
            running = [
                Answers(
                    self.model, self._detector, batch, self._target, n_tokens=self._response_tokens, of_trials=rows,
                    numbers=numbers, on_answer=note,
                )
                for batch in batches_of(self.model, open_rows, self._target, self._batch_size)
            ]  # fmt: skip
            for length in (max(1, self._response_tokens // SHORT_SHARE), self._response_tokens):
                for each in running:
                    each.run(length, stopped)
                if length < self._response_tokens and self._detector.grows:
                    for i in which:
                        scores[i].bounds["short"] = scores[i].behaviour
                    stopped |= {i for i in which if gate(scores[i])}
        for i in which:
            if i not in stopped:
                scores[i].stage = "full"
