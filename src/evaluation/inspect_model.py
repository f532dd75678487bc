"""Our engines as a model of inspect-ai. What it cannot do as it is asked it refuses, and never leaves out."""

from collections import Counter
from collections.abc import Sequence

from inspect_ai.log._samples import sample_active
from inspect_ai.model import (
    ChatMessage,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from src.common.errors import InputError
from src.common.results import make_id, row_seed
from src.evaluation.calls import Call
from src.evaluation.desk import Desk
from src.evaluation.seats import Seat
from src.models.chat_format import Message, RenderedPrompt

OPTIONS = "tiller_options"
"""Key of `extra_body`: given answers to weigh instead of generating one."""
DEFAULT_MAX_TOKENS = 512
STOP_REASONS: dict[str, StopReason] = {"stop": "stop", "length": "max_tokens"}
NEUTRAL = {
    "top_p": (1.0,), "top_k": (0, -1), "frequency_penalty": (0.0,), "presence_penalty": (0.0,), "best_of": (1,),
    "num_choices": (1,), "stop_seqs": ([],), "logit_bias": ({},), "logprobs": (False,), "top_logprobs": (0,),
    "prompt_logprobs": (0,), "response_schema": (), "modalities": (),
}  # fmt: skip
"""Settings that would change an answer and that the engines lack, with the values that change nothing."""


@modelapi(name="tiller")
class TillerAPI(ModelAPI):
    """A seat, asked through a desk."""

    def __init__(self, seat: Seat, desk: Desk, seed: int, facts: str) -> None:
        """seed: the run's. facts: what tells this model from others of its name, for inspect-ai's own cache."""
        super().__init__(seat.name, base_url=f"tiller:{facts}")
        self._seat, self._desk, self._seed = seat, desk, seed
        self._asked: Counter[str] = Counter()

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        try:
            self._refuse(tools, config)
            prompt = self._seat.prompt(as_messages(input))
            options = list((config.extra_body or {}).get(OPTIONS, ()))
            call = self._weighing(prompt, options) if options else self._writing(prompt, config)
        except InputError as error:
            self._desk.refuse(InputError(f"{calling_sample()}: {error}"))
            raise
        row = await self._desk.ask(call)
        return self._weighed(row, call, options) if options else self._written(row, call)

    def _writing(self, prompt: RenderedPrompt, config: GenerateConfig) -> Call:
        temperature = config.temperature or 0.0
        return Call(
            reference=self._seat.reference,
            arm=self._seat.arm.name,
            token_ids=prompt.token_ids,
            header=prompt.header,
            max_tokens=config.max_tokens or DEFAULT_MAX_TOKENS,
            temperature=temperature,
            seed=self._call_seed(prompt, config.seed) if temperature else 0,
        )

    def _weighing(self, prompt: RenderedPrompt, options: Sequence[str]) -> Call:
        if self._seat.format.reader.is_opened_by(prompt.header):
            raise InputError(
                f"the chat template of {self._seat.reference} opens the thinking before the answer, where no choice "
                f"can be weighed; give --nothinking_mode, or a --chat_template that opens none"
            )
        ids = tuple(self._seat.format.option_ids(prompt, option) for option in options)
        for one, first in zip(options, ids, strict=True):
            for other, second in zip(options, ids, strict=True):
                if one is not other and second[: len(first)] == first:
                    raise InputError(
                        f"the choice {other!r} begins with the tokens of {one!r}, whose probability would hold its "
                        f"own; word them so that none begins with another"
                    )
        return Call(
            reference=self._seat.reference, arm=self._seat.arm.name, token_ids=prompt.token_ids, header=prompt.header,
            options=ids,
        )  # fmt: skip

    def _call_seed(self, prompt: RenderedPrompt, seed: int | None) -> int:
        """A seed that depends on the sample, its repeat, and how often it has asked this before."""
        # inspect-ai has no public name for the sample that is asking.
        sample = sample_active()
        who = (str(sample.sample.id), sample.epoch) if sample else ("", 0)
        key = make_id(self._seat.persona.persona if self._seat.persona else "", *who, str(prompt.token_ids))
        self._asked[key] += 1
        return row_seed(self._seed if seed is None else seed, f"{key}:{self._asked[key]}")

    def _written(self, row: dict, call: Call) -> ModelOutput:
        reason = STOP_REASONS.get(str(row["finish_reason"]), "unknown")
        output = ModelOutput.from_content(self.model_name, str(row["response"]), reason)
        output.metadata = {key: value for key, value in row.items() if key not in ("id", "token_ids", "response")}
        n_prompt, n_answer = len(call.token_ids), len(row["token_ids"])
        output.usage = ModelUsage(
            input_tokens=n_prompt, output_tokens=n_answer, total_tokens=n_prompt + n_answer,
            reasoning_tokens=row["num_thinking_tokens"],
        )  # fmt: skip
        return output

    def _weighed(self, row: dict, call: Call, options: Sequence[str]) -> ModelOutput:
        values = row["log_probabilities"]
        best = max(range(len(options)), key=values.__getitem__)
        output = ModelOutput.from_content(self.model_name, options[best])
        output.metadata = {"options": list(options), "log_probabilities": values}
        output.usage = ModelUsage(input_tokens=len(call.token_ids), total_tokens=len(call.token_ids))
        return output

    def _refuse(self, tools: Sequence[ToolInfo], config: GenerateConfig) -> None:
        if tools:
            raise InputError(f"the task gives tools ({tools[0].name} for one), and local models here take none")
        is_greedy = not config.temperature
        for name, neutral in NEUTRAL.items():
            value = getattr(config, name)
            if value is None or value in neutral or (is_greedy and name in ("top_p", "top_k")):
                continue
            raise InputError(
                f"the task sets {name} to {value!r}, which the engines here lack; leave it out of the task"
            )

    def max_tokens(self) -> int:
        return DEFAULT_MAX_TOKENS

    def collapse_user_messages(self) -> bool:
        return True

    def collapse_assistant_messages(self) -> bool:
        return True

    def connection_key(self) -> str:
        return self.model_name


def as_messages(input: Sequence[ChatMessage]) -> list[Message]:
    """inspect-ai's messages as ours, leading system messages as one. Raises InputError for what is more than text."""
    messages: list[Message] = []
    for each in input:
        if each.role == "tool" or (
            isinstance(each.content, list) and any(part.type != "text" for part in each.content)
        ):
            raise InputError(f"a message of the role {each.role} is more than text; expected text alone")
        if messages and each.role == "system" and messages[-1]["role"] == "system":
            messages[-1] = {"role": "system", "content": f"{messages[-1]['content']}\n\n{each.text}"}
        else:
            messages.append({"role": each.role, "content": each.text})
    return messages


def calling_sample() -> str:
    """The task and sample that is asking, for messages."""
    sample = sample_active()
    return f"{sample.task}, sample {sample.sample.id}" if sample else "a call"
