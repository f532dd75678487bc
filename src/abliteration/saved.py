"""The edited model, or the edit as an adapter: written, compared with what was measured, and uploaded."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from src.abliteration import card as cards
from src.abliteration.edits import EditMaker
from src.abliteration.evaluation import Reference
from src.abliteration.extraction import VALIDATION
from src.abliteration.kernel import Plan
from src.abliteration.settings import AbliterateSettings
from src.common.directions_file import Directions
from src.common.errors import CheckFailed
from src.common.files import write_text_atomic
from src.common.provenance import command_line, git_state, package_versions
from src.common.runs import Run
from src.models import loading, saving
from src.models.edit_adapter import write_adapter
from src.models.language_model import LanguageModel
from src.models.weight_editor import Edits, bake, editing

N_CHECKED = 4
"""Prompts on which the saved model is compared with the one in memory."""
EVALUATION = "evaluation.json"
VERSIONS = ("torch", "transformers", "optuna")


@dataclass(frozen=True)
class Outcome:
    """A search that is over."""

    config: AbliterateSettings
    run: Run
    model: LanguageModel
    directions: Directions
    maker: EditMaker
    reference: Reference
    n_before: int


class Choice(NamedTuple):
    """The trial that was chosen."""

    row: Mapping[str, Any]
    rule: str
    n_trials: int
    measures: Mapping[str, Any]
    """Of the report's prompts, before and after."""
    warm_start: Mapping[str, Any] | None = None
    """`Study.warm_start`."""


def remove_others(run: Run, chosen: int) -> None:
    """Removes what an earlier start saved of another trial: it would lie beside this one's numbers."""
    path = run.path(EVALUATION)
    if path.exists() and json.loads(path.read_text("utf-8"))["chosen"]["id"] != chosen:
        for name in ("model", "adapter", VALIDATION):
            _remove(run.path(name))


def save(given: Outcome, plan: Plan, choice: Choice) -> dict[str, str]:
    """
    What --save says, into the run's folder, and to the hub where that is asked for. Returns its name there and what it
    is. Raises CheckFailed when the saved model answers otherwise than the one that was measured.
    """
    config, run, model = given.config, given.run, given.model
    folder = run.path(config.save)
    edits = given.maker.edits(plan)
    made = cards.card(_card(given, choice, len(edits)))
    if config.save == "adapter":
        # A folder's place says much of a machine; who has it here is to be spared naming the model.
        base = cards.base_name(config.model_id) if config.push_to_hub else config.model_id
        write_adapter(folder, model.model, base, edits)
        write_text_atomic(folder / "README.md", made)
    else:
        for each in (folder, run.path(VALIDATION)):
            _remove(each)
        # Of the stored weights, which have more digits than those in memory may have.
        bakes = lambda net: bake(net, _maker(given, net).edits(plan), config.components)  # noqa: E731
        changed = saving.save_edited(loading.resolve(config), config, bakes, folder, {"README.md": made})
        run.record(changed_tensors=changed)
        try:
            _check(given, plan, folder)
        except CheckFailed:
            _remove(folder)
            raise
        if config.quantization != "none":
            print("measured with weights in 4 bit, saved in full: --evaluate_only measures what was saved")
    if config.push_to_hub:
        print(f"uploaded to {saving.push(folder, config.push_to_hub, config.public)}")
    what = "the edited model" if config.save == "model" else "the edit as a LoRA adapter"
    return {config.save: f"{what}, for --{'model_id' if config.save == 'model' else 'adapter_path'}"}


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _maker(given: Outcome, net: nn.Module) -> EditMaker:
    return EditMaker(net, given.directions, given.maker.options)


def _check(given: Outcome, plan: Plan, folder: Path) -> None:
    config, net, dtype = given.config, given.model.model, given.model.model.dtype
    maker = given.maker
    if config.quantization != "none":
        # In 4 bit the model answers otherwise without any edit.
        net, _, _ = loading.load(replace(config, quantization="none", device="cpu", dtype="float32"))
        maker, dtype = _maker(given, net), torch.float32
    prompts = [each.token_ids for each in given.reference.protocol.prompts["target"][:N_CHECKED]]
    saving.check_saved(folder, config, log_probs(net, maker, maker.edits(plan)), prompts, dtype)


def log_probs(net: nn.Module, maker: EditMaker, edits: Edits) -> saving.LogProbs:
    """What follows each token by the edited model, the edits acting by hooks."""
    device = next(net.parameters()).device

    def run(ids: Tensor) -> Tensor:
        with torch.inference_mode(), editing(net, maker.writers, [edits]):
            return net(input_ids=ids[None].to(device)).logits[0].float().log_softmax(dim=-1).cpu()

    return run


def _card(given: Outcome, choice: Choice, n_matrices: int) -> cards.Card:
    config, metadata = given.config, given.directions.metadata
    done = [
        f"Directions: {metadata.method} of {metadata.token_position}.",
        f"Edited: {', '.join(config.components)}, norm kept: {config.norm}; {n_matrices} matrices.",
    ]
    if config.quantization != "none":
        done.append(
            f"Searched and measured with weights in 4 bit ({config.quantization}); what is saved is the same edit of "
            f"the weights in full."
        )
    if choice.warm_start:
        which = "the same search prompts" if choice.warm_start["same_search_prompts"] else "its own search prompts"
        done.append(f"The search began at the best points of another one, which were chosen on {which}.")
    versions = package_versions()
    return cards.Card(
        base_model=config.model_id, base_fingerprint=given.model.facts.get("model_fingerprint"),
        command=["uv", "run", "-m", "src.abliterate", *without_paths(sys.argv[1:])], chosen=choice.row,
        rule=choice.rule, n_trials=choice.n_trials, measures=choice.measures, measured_on=_unseen(given, choice),
        done=done,
        about={
            "seed": config.seed, "kl_tokens": config.kl_tokens, "response_tokens": config.response_tokens,
            "dtype": given.model.facts.get("dtype"), "code": (git_state() or {}).get("sha"),
            **{name: versions[name] for name in VERSIONS if name in versions},
            **{f"sha256 of {Path(path).name}": digest for path, digest in given.run.inputs.items()},
        },
    )  # fmt: skip


def _unseen(given: Outcome, choice: Choice) -> str:
    if given.config.directions_path is not None and given.directions.metadata.prompts_sha256 is None:
        return "prompts that the search did not see; the directions' file does not say of which it was made"
    if choice.warm_start and not choice.warm_start["same_search_prompts"]:
        return "prompts that neither the directions nor this search saw; the one that it began at may have seen some"
    return "prompts that neither the directions nor the search saw"


def without_paths(words: Sequence[str]) -> list[str]:
    """Absolute paths say more of a machine than a card is to, and keys and passwords are nobody's."""
    return [_named(word) for word in command_line(words)]


def _named(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{equals}{Path(value).name if value.startswith('/') else value}"
