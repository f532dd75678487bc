"""
Tasks on base models, adapters, edited and steered models, as personas or not. From the repository root:
uv run -m src.evaluate --model_id bundled:smollm2-135m --output_dir data/experiments/evaluated \
    --tasks data/evals/capitalization.jsonl data/evals/general_knowledge.jsonl
"""

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from src.common.cli import run_command
from src.common.errors import InputError
from src.common.files import write_text_atomic
from src.common.rows import read_personas
from src.common.runs import Run, start_run
from src.common.settings import to_json
from src.evaluation.settings import EvaluateSettings

LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EvaluateConfig(EvaluateSettings):
    """Evaluation"""


def main(config: EvaluateConfig) -> None:
    from src.common.system_prompts import PLAIN, read_chat_template
    from src.evaluation.cells import build_cells
    from src.evaluation.sources import check_judge, read_sources
    from src.models.arms import build_arms
    from src.models.engine import choose_backend
    from src.models.hub import check_reference

    # 1. Everything that can be wrong without a model.
    sources = read_sources(config.tasks, config.judge_rubric)
    check_judge(config, sources)
    if (config.n_reps or 1) > 1 and not config.temperature and all(source.file for source in sources):
        raise InputError(f"--n_reps {config.n_reps} at temperature 0 gives equal repeats; give a --temperature above 0")
    personas = read_personas(config.personae_json)[: config.num_personae] if config.personae_json else [None]
    arms = build_arms(config, config.checked_entries())
    for reference in config.model_id:
        check_reference(reference, config.adapter_path)
    choose_backend(config, keeps=len(arms) > 1 or any(source.weighs for source in sources))
    if config.chat_template not in (None, PLAIN):
        read_chat_template(config.chat_template)
    cells = build_cells(sources, config.model_id, personas, arms)

    # 2. The run folder, fresh or resumed.
    with start_run(config, "evaluate", inputs=input_files(config, sources)) as run:
        evaluate(config, run, sources, arms, cells)


def evaluate(config: EvaluateConfig, run: Run, sources: Sequence, arms: Sequence, cells: Sequence) -> None:
    """Ask what is not answered yet, write the rows cell by cell, summarize, compare."""
    from rich.console import Console

    from src.common.results import FILE_NAME, Results
    from src.evaluation.calls import FILE_NAME as ANSWERS
    from src.evaluation.calls import Answers
    from src.evaluation.cells import FILE_NAME as CELLS
    from src.evaluation.cells import LOGS, DoneCells, drop_unfinished, ordered
    from src.evaluation.report import report
    from src.evaluation.rows import MEASURED_FIELDS
    from src.evaluation.settings import JUDGE
    from src.evaluation.summary import COLUMNS, as_csv, compare_cells, summarize_cells
    from src.evaluation.tables import print_tables

    # 3. What an earlier start left.
    results, answers = Results(run.folder, MEASURED_FIELDS), Answers(run.folder)
    done = DoneCells(run.folder, config.num_tasks)
    drop_unfinished(results, done, cells)
    to_do = [cell for cell in cells if not done.has(cell)]
    if len(to_do) < len(cells):
        LOGGER.info("%d of %d cells are there already", len(cells) - len(to_do), len(cells))

    # 4. The rest, which needs the models.
    if to_do:
        ask(config, run, sources, arms, to_do, results, answers, done)

    # 5. Rows cell by cell, scores, differences.
    results.finish(ordered(results.rows.values(), cells))
    by_cell = {cell.id: [row for row in results.rows.values() if row["cell"] == cell.id] for cell in cells}
    summary = summarize_cells(by_cell, config.seed)
    differences = compare_cells(by_cell, config.seed)
    write_text_atomic(run.path("summary.csv"), as_csv(summary, COLUMNS))
    # Not when it was run: the same rows make the same page.
    about = {name: value for name, value in to_json(config).items() if name != "datetime_str"}
    page = report(f"Evaluation of {', '.join(config.model_id)}", summary, differences, by_cell, about)
    write_text_atomic(run.path("compare.html"), page)
    print_tables(summary, differences, Console(file=sys.stdout))
    run.finish({
        FILE_NAME: "one row a sample, model, persona and arm",
        "summary.csv": "mean score with its 95 % interval, a line a cell",
        "compare.html": "scores, paired differences, samples on which cells disagree",
        LOGS: f"logs of inspect-ai: inspect view --log-dir {run.path(LOGS)}",
        CELLS: "which cells are whole, and the log of each",
        ANSWERS: "what the models answered to each call, for going on after a stop",
        **({JUDGE: "what the judge answered, and its costs"} if run.path(JUDGE).exists() else {}),
    })  # fmt: skip


def ask(
    config: EvaluateConfig, run: Run, sources: Sequence, arms: Sequence, cells: Sequence, results, answers, done
) -> None:
    """Engine by engine and task by task; what is answered is on disk at once, and a cell's rows when it is whole."""
    from src.common.progress import Progress
    from src.evaluation.desk import Desk
    from src.evaluation.judge import Judge
    from src.evaluation.running import Runner
    from src.evaluation.seats import Format
    from src.evaluation.serving import Serving, facts_of
    from src.models.adapter_switching import shared_engines
    from src.models.engine import choose_backend

    # Before the minute that loading may take: rows of two engines or of changed weights are not mixed.
    weighs = any(cell.source.weighs for cell in cells)
    backend, _ = choose_backend(config, keeps=len(arms) > 1 or weighs)
    today, renderers = run.first_started.date(), {}
    formats = {reference: Format(config, reference, today, renderers) for reference in config.model_id}
    run.record(backend=backend, **facts_of(formats))
    judge = Judge(config, run.folder) if config.judge_model_id else None
    if judge:
        run.record(provider=judge.model.provider, base_url=judge.model.base_url)
    runner = Runner(config, run, formats, Desk(answers), results, done, judge)
    with Progress(total=None, done=0) as progress, ExitStack() as at_the_end:
        if judge:
            # What was paid for is noted of a run that is stopped, too.
            at_the_end.callback(judge.note_cost)
        for sharing in shared_engines(config.of_model(config.model_id[0]), config.model_id, backend):
            own = [cell for cell in cells if cell.reference in sharing.references]
            with Serving(config, run, sharing, arms, weighs=weighs, progress=progress) as serving:
                for source in sources:
                    some = [cell for cell in own if cell.source is source]
                    if some:
                        runner.run(source, some, serving)
    answers.sync()
    run.record(tokens_generated=progress.tokens, tokens_per_second=round(progress.rate, 1))


def input_files(config: EvaluateConfig, sources: Sequence) -> list[Path]:
    """The files whose content decides the rows."""
    paths = [config.personae_json, config.chat_template]
    files = [Path(p) for p in paths if p and str(p) != "plain"]
    tasks = [path for source in sources for path in source.inputs]
    return list(dict.fromkeys([*files, *tasks, *config.intervention_files()]))


if __name__ == "__main__":
    run_command(main, EvaluateConfig)
