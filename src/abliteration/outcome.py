"""What a search ends with: the choice, the report's prompts before and after, and the edited model."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from src.abliteration.evaluation import answer, further, measures, rows_of, written_measures, written_rows
from src.abliteration.extraction import VALIDATION, validate
from src.abliteration.kernel import plan_of
from src.abliteration.report import Reported, print_before_after, print_front, report
from src.abliteration.saved import Choice, Outcome, remove_others, save
from src.abliteration.search import choose, on_front
from src.abliteration.settings import AbliterateSettings
from src.abliteration.study import Study, row_of, written
from src.common.errors import CheckFailed, InputError
from src.common.files import write_json_atomic, write_text_atomic
from src.common.jsonl import write_jsonl_atomic
from src.common.provenance import without_secrets
from src.common.settings import to_json
from src.models.weight_editor import Edits

Row = dict[str, Any]


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
    responses, found = measured(given, edits)
    remove_others(run, chosen["id"])
    run.record(chosen=chosen["id"], rule=rule)
    write_jsonl_atomic(run.path("responses.jsonl"), written_rows(responses))
    evaluation = written_measures(found) | {"chosen": written(chosen), "rule": rule}
    write_json_atomic(run.path("evaluation.json"), evaluation)
    about = {name: value for name, value in without_secrets(to_json(config)).items() if name != "datetime_str"}
    weights = {name: [given.maker.factor(i, name) * w for i, w in enumerate(each)]
               for name, each in plan.weights(given.maker.n_layers).items()}  # fmt: skip
    title = f"Abliteration of {config.model_id}"
    page = report(Reported(title, shown, chosen["id"], rule, weights, found, responses, about))
    write_text_atomic(run.path("report.html"), page)
    files = {
        "writers.jsonl": "the matrices that could be edited, equal layers in a row",
        "trials.jsonl": "a row a trial: parameters, scores, the stage it reached",
        "responses.jsonl": "the report's prompts, answered before and after",
        "evaluation.json": "before and after with 95 % intervals, and the chosen trial",
        "report.html": "front, history, weights by layer, answers side by side",
    }
    if config.save != "none":
        files |= save(given, plan, Choice(chosen, rule, len(rows), found, study.warm_start))
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


def measured(given: Outcome, edits: Edits) -> tuple[list[Row], dict[str, Any]]:
    """The report's prompts with their answers before and after, and the measures of both."""
    config, model, writers = given.config, given.model, given.maker.writers
    after = answer(model, given.reference.protocol, writers, edits)
    rows = rows_of(given.reference, after, given.reference.kl(model, writers, edits))
    found = measures(rows, given.reference.answers, after, config.seed)
    for when, acting in (("before", {}), ("after", edits)):
        found[when] |= further(config, model, given.reference.protocol, writers, acting)
    return rows, found
