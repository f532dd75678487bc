"""
Questions → answers of a model behind an API, cached, many at once, with repeats. From the repository root:
uv run -m src.ask --dataset_path data/personas/prompts.json --num_tasks 20 --model_id openai:NAME \
    --openai_base_url http://127.0.0.1:8000/v1 --n_repeats 3 --output_dir data/experiments/asked
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from src.asking.settings import AskSettings
from src.common.cli import run_command
from src.common.runs import Run, start_run

LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class AskConfig(AskSettings):
    """Asking"""


def main(config: AskConfig) -> None:
    from src.asking.questions import read_tasks
    from src.common.api_runs import check_model

    # 1. Everything that can be wrong without a request.
    tasks = read_tasks(config)
    model = check_model(config)

    # 2. The run folder, fresh or resumed.
    with start_run(config, "ask", inputs=input_files(config)) as run:
        run.record(provider=model.provider, base_url=model.base_url)
        answer(config, run, tasks)


def answer(config: AskConfig, run: Run, tasks: Sequence) -> None:
    """Ask what is not answered yet; rows in the order of the questions."""
    from src.asking.questions import asked, results_row
    from src.common.api_runs import COSTS, ask_and_report, refuse_failures
    from src.common.results import FILE_NAME, Results
    from src.common.rows import Prompt

    # 3. What an earlier start left.
    results = Results(run.folder)
    results.refuse_other_prompts({task.row_id: Prompt(task.prompt_id, task.text) for task in tasks})
    by_id = {task.row_id: task for task in tasks}

    # 4. The rest: every answer is on disk as soon as it is there.
    failures = ask_and_report(
        config,
        run,
        asked(tasks, config),
        done=results.rows,
        on_answer=lambda each, reply: results.add(results_row(by_id[each.id], reply, config)),
        batches_every=config.poll_seconds if config.batch_api else None,
    )

    # 5. Rows in the order of the questions, with those that have none told.
    results.finish([task.row_id for task in tasks if task.row_id in results.rows])
    refuse_failures(failures, len(tasks))
    run.finish({FILE_NAME: "one row an answer"} | COSTS)


def input_files(config: AskConfig) -> list[Path]:
    """The files whose content decides the rows."""
    return [] if config.dataset_path.startswith("hub:") else [Path(config.dataset_path)]


if __name__ == "__main__":
    run_command(main, AskConfig)
