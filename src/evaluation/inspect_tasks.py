"""Files of rows as tasks of inspect-ai."""

from string import ascii_uppercase

from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as InspectSample
from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, GenerateConfig
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver

from src.evaluation.inspect_model import OPTIONS
from src.evaluation.judge import Judge
from src.evaluation.scorers import SCORERS, judged_by
from src.evaluation.task_files import Message, Sample, TaskFile
from src.evaluation.task_header import JUDGE, WITH_OPTIONS

ROLES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


def task_of(file: TaskFile, judge: Judge | None) -> Task:
    """The task: rows in their order, asked once each, scored as the header says; `judge` where it names one."""
    header = file.header
    weighs = header.scorer in WITH_OPTIONS
    letters = header.scorer == "choice" and header.answers == "letters"
    return Task(
        dataset=MemoryDataset([_sample(each) for each in file.samples], name=file.name, location=str(file.path)),
        solver=weigh(letters) if weighs else generate(),
        scorer=judged_by(judge, file.rubric, header) if header.scorer == JUDGE else SCORERS[header.scorer](header),
        config=GenerateConfig(max_tokens=header.max_tokens),
        name=file.name,
    )


@solver
def weigh(letters: bool) -> Solver:
    """Asks for the log-probabilities of a sample's choices, or of their letters, in place of an answer."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        choices = [choice.value for choice in state.choices]
        options = list(ascii_uppercase[: len(choices)]) if letters else choices
        return await generate(state, extra_body={OPTIONS: options})

    return solve


def _sample(sample: Sample) -> InspectSample:
    return InspectSample(
        id=sample.id,
        input=[_message(message) for message in sample.messages],
        target=list(sample.targets),
        choices=list(sample.choices) or None,
        metadata={"text": sample.text},
    )


def _message(message: Message) -> ChatMessage:
    return ROLES[message["role"]](content=message["content"])
