"""
Rows → what a judge behind an API says of them under rubrics, as new columns. From the repository root:
uv run -m src.judge --results_path data/experiments/first_personas/results.jsonl \
    --rubrics data/rubrics/persona_adherence.txt data/rubrics/coherence.txt --model_id openai:NAME \
    --openai_base_url http://127.0.0.1:8000/v1 --output_dir data/experiments/judged
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from src.common.cli import run_command
from src.common.errors import InputError
from src.common.files import write_json_atomic
from src.common.jsonl import write_jsonl_atomic
from src.common.runs import Run, start_run
from src.judging.settings import JudgeSettings

LOGGER = logging.getLogger(__name__)
JUDGED = "judged.jsonl"


@dataclass(kw_only=True)
class JudgeConfig(JudgeSettings):
    """Judging"""


def main(config: JudgeConfig) -> None:
    from src.common.api_runs import check_model
    from src.common.rows import read_records
    from src.judging.judgements import build_tasks, read_rubrics

    # 1. Everything that can be wrong without a request.
    model = check_model(config)
    rubrics = read_rubrics(config)
    records = read_records(config.results_path, config.num_tasks)
    for column in config.group_by or []:
        for record in records:
            if column not in record.values:
                raise InputError(f"{record.place}: --group_by {column}: no such column in this row")
    tasks = build_tasks(records, rubrics, config)

    # 2. The run folder, fresh or resumed.
    with start_run(config, "judge", inputs=[config.results_path, *config.rubrics]) as run:
        run.record(provider=model.provider, base_url=model.base_url)
        judge(config, run, records, rubrics, tasks, model.provider)


def judge(config: JudgeConfig, run: Run, records: Sequence, rubrics: Sequence, tasks: Sequence, provider: str) -> None:
    """Ask what is not judged yet, then the columns and the summary."""
    from rich.console import Console

    from src.common.api_runs import COSTS, ask_and_report, refuse_failures
    from src.common.results import FILE_NAME, Results
    from src.judging.judgements import MEASURED_FIELDS, asked, judgement_row
    from src.judging.outcome import judged_rows, summarize_judged
    from src.judging.tables import print_summary

    # 3. What an earlier start left, and the rest: every judgement is on disk as soon as it is there.
    results = Results(run.folder, MEASURED_FIELDS)
    by_id = {task.row_id: task for task in tasks}
    failures = ask_and_report(
        config,
        run,
        asked(tasks, config, provider),
        done=results.rows,
        on_answer=lambda each, reply: results.add(judgement_row(by_id[each.id], reply, config)),
        batches_every=config.poll_seconds if config.batch_api else None,
    )
    results.finish([task.row_id for task in tasks if task.row_id in results.rows])

    # 4. The rows with their new columns, the summary.
    if not results.rows:
        refuse_failures(failures, len(tasks))
    judgements = [results.rows[task.row_id] for task in tasks if task.row_id in results.rows]
    rows = judged_rows(records, rubrics, judgements, config.n_repeats)
    write_jsonl_atomic(run.path(JUDGED), rows)
    summary = summarize_judged(rows, rubrics, judgements, config.group_by or [], config.seed)
    write_json_atomic(run.path("summary.json"), summary)
    print_summary(summary, Console(file=sys.stdout))
    refuse_failures(failures, len(tasks))
    run.finish(
        {
            JUDGED: "the rows with a column for each rubric",
            FILE_NAME: "one row a judgement: the judge's words and what was read in them",
            "summary.json": "means, counts and agreement by rubric",
        }
        | COSTS
    )


if __name__ == "__main__":
    run_command(main, JudgeConfig)
