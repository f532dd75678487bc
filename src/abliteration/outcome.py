"""What a search ends with: the choice, the report's prompts before and after, and the edited model."""

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from src.abliteration import card as cards
from src.abliteration.edits import EditMaker
from src.abliteration.evaluation import Reference, answer, further, measures, rows_of, written_measures, written_rows
from src.abliteration.extraction import VALIDATION, validate
from src.abliteration.kernel import plan_of
from src.abliteration.report import Reported, print_before_after, print_front, report
from src.abliteration.search import choose, on_front
from src.abliteration.settings import AbliterateSettings
from src.abliteration.study import Study, row_of, written
from src.common.errors import CheckFailed, InputError
from src.common.files import write_json_atomic, write_text_atomic
from src.common.jsonl import write_jsonl_atomic
from src.common.provenance import command_line, without_secrets
from src.common.runs import Run
from src.common.settings import to_json
from src.models import loading, saving
from src.models.edit_adapter import write_adapter
from src.models.language_model import LanguageModel
from src.models.weight_editor import Edits, bake, editing

N_CHECKED = 4
"""Prompts on which the saved model is compared with the one in memory."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """A search that is over."""

    config: AbliterateSettings
    run: Run
    model: LanguageModel
    maker: EditMaker
    reference: Reference
    n_before: int


def conclude(given: Outcome, study: Study) -> None:
    """Choose, measure on the report's prompts, save, write and print it all."""
    config, run = given.config, given.run
    console = Console(file=sys.stdout)
    rows = [row_of(trial) for trial in study.done()]
    best = on_front(rows, config.max_kl, given.n_before)
    if not best:
        raise CheckFailed(
            f"none of {len(rows)} trials is better than no edit at all (behaviour in {given.n_before} answers, KL 0); "
            f"give more --n_trials, other directions (--method), or a higher --max_weight"
        )
    ids = {row["id"] for row in best}
    shown = [row | {"on_front": row["id"] in ids} for row in rows]
    chosen, rule = _chosen(config, best, shown, console)
    print_front(shown, console, chosen["id"])
    plan = plan_of(chosen["params"])
    edits = given.maker.edits(plan)
    responses, found = _measured(given, edits)
    run.record(chosen=chosen["id"], rule=rule)
    write_jsonl_atomic(run.path("responses.jsonl"), written_rows(responses))
    measured = written_measures(found) | {"chosen": written(chosen), "rule": rule}
    write_json_atomic(run.path("evaluation.json"), measured)
    about = {name: value for name, value in without_secrets(to_json(config)).items() if name != "datetime_str"}
    weights = {name: [given.maker.factor(i, name) * w for i, w in enumerate(each)]
               for name, each in plan.weights(given.maker.n_layers).items()}  # fmt: skip
    title = f"Abliteration of {config.model_id}"
    page = report(Reported(title, shown, chosen["id"], rule, weights, found, responses, about))
    write_text_atomic(run.path("report.html"), page)
    files = {
        "trials.jsonl": "a row a trial: parameters, scores, the stage it reached",
        "responses.jsonl": "the report's prompts, answered before and after",
        "evaluation.json": "before and after with 95 % intervals, and the chosen trial",
        "report.html": "front, history, weights by layer, answers side by side",
    }
    if config.save != "none":
        made = cards.card(_card(given, chosen, rule, len(rows), found, edits))
        files |= _saved(given, edits, made)
    if config.validate_tasks:
        validate(config, run.folder)
        files[VALIDATION] = "the tasks of --validate_tasks, before and after: summary.csv, compare.html"
    print_before_after(found, console)
    print(f"chosen: trial {chosen['id']}, {rule}")
    run.finish(files)
    if config.save != "none":
        flag = "--model_id" if config.save == "model" else f"--model_id {shlex.quote(config.model_id)} --adapter_path"
        print(f"talk to it: uv run -m src.chat {flag} {shlex.quote(str(run.path(config.save)))}")


def _chosen(
    config: AbliterateSettings, best: Sequence[Row], shown: Sequence[Mapping], console: Console
) -> tuple[Row, str]:
    by_id = {str(row["id"]): row for row in best}
    select = config.select
    if select == "ask":
        print_front(shown, console)
        try:
            select = input(f"which trial ({', '.join(by_id)}; empty for auto)? ").strip() or "auto"
        except EOFError:
            raise InputError(
                f"--select ask: nobody can be asked here; give the same command --select auto or one of "
                f"{', '.join(by_id)}: the trials are kept"
            ) from None
    if select == "auto":
        return choose(best)
    if select not in by_id:
        raise InputError(f"--select {select}: no trial of the front; expected one of {', '.join(by_id)}")
    return by_id[select], "chosen by hand"


def _measured(given: Outcome, edits: Edits) -> tuple[list[Row], dict[str, Any]]:
    config, model, writers = given.config, given.model, given.maker.writers
    after = answer(model, given.reference.protocol, writers, edits)
    rows = rows_of(given.reference, after, given.reference.kl(model, writers, edits))
    found = measures(rows, given.reference.answers, after, config.seed)
    for when, acting in (("before", {}), ("after", edits)):
        found[when] |= further(config, model, given.reference.protocol, writers, acting)
    return rows, found


def _saved(given: Outcome, edits: Edits, made: str) -> dict[str, str]:
    config, run, model = given.config, given.run, given.model
    folder = run.path(config.save)
    if config.save == "adapter":
        write_adapter(folder, model.model, config.model_id, edits)
        write_text_atomic(folder / "README.md", made)
    else:
        files = loading.resolve(config)
        for each in (folder, run.path(VALIDATION)):
            _remove(each)
        bakes = lambda net: bake(net, edits, config.components)  # noqa: E731
        run.record(changed_tensors=saving.save_edited(files, config, bakes, folder, {"README.md": made}))
        try:
            saving.check_saved(folder, config, _log_probs(given, edits), _checked_prompts(given), model.model.dtype)
        except CheckFailed:
            _remove(folder)
            raise
    if config.push_to_hub:
        print(f"uploaded to {saving.push(folder, config.push_to_hub, config.public)}")
    what = "the edited model" if config.save == "model" else "the edit as a LoRA adapter"
    return {config.save: f"{what}, for --{'model_id' if config.save == 'model' else 'adapter_path'}"}


def _remove(folder: Path) -> None:
    """A model that an earlier start wrote, of which another trial may have been chosen."""
    if folder.exists():
        shutil.rmtree(folder)


def _checked_prompts(given: Outcome) -> list[tuple[int, ...]]:
    return [each.token_ids for each in given.reference.protocol.prompts["target"][:N_CHECKED]]


def _log_probs(given: Outcome, edits: Edits) -> Any:
    net: nn.Module = given.model.model

    def run(ids: Tensor) -> Tensor:
        with torch.inference_mode(), editing(net, given.maker.writers, [edits]):
            return net(input_ids=ids[None].to(given.model.device)).logits[0].float().log_softmax(dim=-1).cpu()

    return run


def _card(given: Outcome, chosen: Row, rule: str, n_trials: int, found: Mapping[str, Any], edits: Edits) -> cards.Card:
    config = given.config
    return cards.Card(
        base_model=config.model_id, base_fingerprint=given.model.facts.get("model_fingerprint"),
        command=["uv", "run", "-m", "src.abliterate", *_without_paths(sys.argv[1:])], chosen=chosen, rule=rule,
        n_trials=n_trials, measures=found,
        done=[
            f"Directions: {config.method} of {config.token_position}.",
            f"Edited: {', '.join(config.components)}, norm kept: {config.norm}; {len(edits)} matrices.",
        ],
        about={"seed": config.seed, "kl_tokens": config.kl_tokens, "response_tokens": config.response_tokens},
    )  # fmt: skip


def _without_paths(words: Sequence[str]) -> list[str]:
    """Absolute paths say more of a machine than a card is to, and keys and passwords are nobody's."""
    return [Path(word).name if word.startswith("/") else word for word in command_line(words)]
