"""Whether a response shows the behaviour, by a model behind an API that is asked so under a rubric."""

from collections.abc import Sequence
from pathlib import Path

from src.abliteration.markers import is_empty
from src.common.api_asking import Asked, Failures, ask_all
from src.common.api_types import Answer
from src.common.async_run import run_async
from src.common.errors import CheckFailed, InputError
from src.common.judge_config import judge_config
from src.common.rubrics import CHOICE, PLACEHOLDER, judge_prompt, read_reply, read_rubric


class JudgeScorer:
    """Asks about each different text once, in a later start too: answers are in the run's cache."""

    def __init__(self, model_id: str, rubric_path: Path, base_url: str | None, folder: Path) -> None:
        """
        rubric_path: a rubric whose score is a choice, its first word meaning that the behaviour shows, and that names
        no column but {response}. folder: of the cache, and of failures.jsonl.

        Raises InputError for another rubric, and a model or server that cannot be asked.
        """
        self._rubric = read_rubric(rubric_path)
        columns = set(PLACEHOLDER.findall(self._rubric.text))
        if self._rubric.kind != CHOICE or columns != {"response"}:
            raise InputError(
                f"--judge_rubric {rubric_path}: expected `score: choice SHOWS, …` and {{response}} alone in its text; "
                f"it has {self._rubric.kind} and {', '.join(sorted(columns))}"
            )
        self._config, _ = judge_config(model_id, base_url, folder, greedy=True)
        self._folder = folder
        self._said: dict[str, bool] = {}

    def shows(self, responses: Sequence[str]) -> list[bool]:
        """
        Which of the responses show the behaviour; an empty one shows nothing, and nobody is asked about it. Raises
        CheckFailed where the judge gives no answer, or one that is none of the rubric's words.
        """
        new = [text for text in dict.fromkeys(responses) if text not in self._said and not is_empty(text)]
        if new:
            self._said |= self._ask(new)
        return [self._said.get(text, False) for text in responses]

    def _ask(self, texts: Sequence[str]) -> dict[str, bool]:
        asked = [
            Asked(id=text, messages=({"role": "user", "content": judge_prompt(self._rubric, {"response": text}, "")},),
                  parameters=self._config.parameters(0))
            for text in texts
        ]  # fmt: skip
        found: dict[str, bool] = {}

        def note(each: Asked, answer: Answer) -> None:
            word = read_reply(self._rubric, answer).value
            if word is None:
                raise CheckFailed(
                    f"--judge_model_id {self._config.model_id}: it answers {answer.completion[:80]!r}; expected one of "
                    f"{', '.join(self._rubric.choices)}. Take another judge, or a rubric that it follows"
                )
            found[each.id] = word == self._rubric.choices[0]

        self._folder.mkdir(exist_ok=True)
        failures = Failures(self._folder)
        run_async(ask_all(self._config.api, self._config.model_id, asked, note, failures))
        if failures.rows:
            first = next(iter(failures.rows.values()))
            raise CheckFailed(
                f"--judge_model_id {self._config.model_id}: no answer to {len(failures.rows)} of {len(asked)} "
                f"questions, first {first['reason']}; what was answered is kept, and the same command goes on from here"
            )
        return found
