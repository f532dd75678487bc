"""
Talk to a model as a persona, steered or not, in the terminal or through pipes. From the repository root:
uv run -m src.chat --model_id bundled:smollm2-135m --persona Hamlet
"""

import os
import sys
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from src.common.cli import run_command
from src.common.logs import start_logging
from src.interactive.settings import ChatSettings

if TYPE_CHECKING:
    from src.interactive.conversation import Place
    from src.interactive.session import ChatSession


@dataclass(kw_only=True)
class ChatConfig(ChatSettings):
    """The chat"""


def main(config: ChatConfig) -> None:
    # 1. Everything that can be wrong without a model.
    entries, told = steering(config)
    check_names(config)

    # 2. The model, and who answers.
    start_logging(None)
    import torch

    from src.interactive.conversation import converse
    from src.interactive.session import ChatSession
    from src.models.cpu_linear import packed_linears
    from src.models.engine import bounded_context
    from src.models.language_model import LanguageModel

    model = LanguageModel.load(config)
    model.context_length = bounded_context(config, model.context_length)
    session = ChatSession(config, model)
    if entries:
        session.steer(entries, told)

    # 3. Questions and answers. No weight changes, so that they are packed once for all answers.
    place = chosen_place()
    greet(session, place)
    try:
        with torch.inference_mode(), packed_linears(model.model), closing(session):
            converse(session, place)
    except BrokenPipeError:
        # Whoever read the answers has gone; what is left in the buffer would raise again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def steering(config: ChatConfig) -> tuple[list, list[str]]:
    """The interventions, and each as it was given. Raises InputError for a bad --steer, spec or directions file."""
    from src.common.intervention_config import naming, try_entries
    from src.common.interventions import parse_steer, read_interventions

    if config.interventions_path is not None:
        entries = read_interventions(config.interventions_path)
        try_entries(entries, f"{config.interventions_path}: ")
        return entries, [str(config.interventions_path)]
    entries = [parse_steer(text) for text in config.steer or []]
    for text, entry in zip(config.steer or [], entries, strict=True):
        with naming(f"--steer {text}"):
            try_entries([entry])
    return entries, list(config.steer or [])


def check_names(config: ChatConfig) -> None:
    """Raises InputError for a model, adapter or chat template that is not there."""
    from src.common.system_prompts import PLAIN, read_chat_template
    from src.models.hub import check_reference

    check_reference(config.model_id, config.adapter_path)
    if config.chat_template not in (None, PLAIN):
        read_chat_template(config.chat_template)


def chosen_place() -> "Place":
    """The terminal where there is one on both sides, else the pipes."""
    from src.interactive.commands import COMMANDS
    from src.interactive.pipe import Pipe

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return Pipe()
    from src.interactive.terminal import Terminal

    return Terminal(list(COMMANDS))


def greet(session: "ChatSession", place: "Place") -> None:
    """In a terminal: who is there, and how to find out more."""
    from src.interactive.answers import show_legend
    from src.interactive.commands import steering_lines

    if place.columns() is not None:
        device = session.model.facts.get("device")
        who = f"{session.config.model_id} on {device} as {session.label}; /help lists the commands"
        place.say([who, *(steering_lines(session) if session.steering.told else [])])
        if session.manner.entropy:
            show_legend(place)


if __name__ == "__main__":
    run_command(main, ChatConfig)
