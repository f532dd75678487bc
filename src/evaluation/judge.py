"""A model behind an API that scores answers under a rubric, and is the grader that tasks of inspect-ai may ask for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelOutput, ModelUsage, modelapi
from inspect_ai.tool import ToolChoice, ToolInfo

from src.common.api_types import Answer, Message
from src.common.errors import InputError
from src.common.judge_config import judge_config
from src.common.rubrics import Reading, Rubric, judge_prompt, read_reply, reading_parameters
from src.evaluation.desk import Desk
from src.evaluation.inspect_model import as_messages, calling_sample
from src.evaluation.settings import JUDGE, EvaluateSettings

ROLE = "grader"
"""What inspect-ai's model-graded scorers ask for."""


class Judge:
    """Asked once about each different text, in a later start too: answers are in the run's cache."""

    def __init__(self, config: EvaluateSettings, folder: Path) -> None:
        """folder: of the run. Raises InputError for a judge that cannot be asked."""
        assert config.judge_model_id is not None, "a judge without a name"
        self._config, self.model = judge_config(
            config.judge_model_id, config.judge_base_url, folder / JUDGE, temperature=config.judge_temperature,
            enable_cache=config.enable_cache, cache_dir=config.cache_dir,
        )  # fmt: skip
        self._was_asked = False

    async def ask(self, messages: Sequence[Message], **parameters: Any) -> Answer:
        """The judge's answer. Raises ApiFailure where there is none after every retry."""
        self._was_asked = True
        api, given = self._config.api, self._config.parameters(0) | parameters
        (answer,) = await api.ask(api.question(self._config.model_id, messages, given))
        return answer

    async def read(self, rubric: Rubric, values: Mapping[str, Any]) -> tuple[Reading, str]:
        """What the judge's answer says under a rubric, and its words. Raises as `ask`."""
        prompt = judge_prompt(rubric, values, "an evaluation")
        answer = await self.ask(
            [{"role": "user", "content": prompt}], **reading_parameters(rubric, self.model.provider)
        )
        return read_reply(rubric, answer), answer.completion

    def note_cost(self) -> None:
        """A line in the judge's api-costs.jsonl, where it was asked."""
        if self._was_asked:
            self._config.output_dir.mkdir(exist_ok=True)
            self._config.log_api_cost({"model_id": self._config.model_id, "started": self._config.datetime_str})


@modelapi(name="judge")
class GraderAPI(ModelAPI):
    """
    The judge as inspect-ai's grader. Without a judge it refuses: the model that is evaluated would grade itself, under
    its persona and its steering.
    """

    def __init__(self, judge: Judge | None, desk: Desk) -> None:
        super().__init__("none" if judge is None else str(judge.model))
        self._judge, self._desk = judge, desk

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        try:
            if self._judge is None:
                raise InputError("the task asks for a grader; give --judge_model_id")
            if tools:
                raise InputError(f"the task gives its grader tools ({tools[0].name} for one), which it takes not")
            messages = as_messages(input)
        except InputError as error:
            self._desk.refuse(InputError(f"{calling_sample()}: {error}"))
            raise
        wanted = {"temperature": config.temperature, "max_tokens": config.max_tokens, "top_p": config.top_p}
        answer = await self._judge.ask(messages, **{name: value for name, value in wanted.items() if value is not None})
        output = ModelOutput.from_content(self.model_name, answer.completion)
        n_read, n_written = answer.input_tokens or 0, answer.output_tokens or 0
        output.usage = ModelUsage(input_tokens=n_read, output_tokens=n_written, total_tokens=n_read + n_written)
        return output
