"""
Prompts under interventions → responses, dose and response, a control with random directions. From the repository root:
uv run -m src.steer --prompts_json data/directions/french_english/control.jsonl --model_id bundled:smollm2-135m \
    --steer data/experiments/french/directions.safetensors:15:0 --coefficients -30 15 30 45 --random_control \
    --function_words data/directions/function_words.json --output_dir data/experiments/french_doses --num_tasks 16
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from src.common.cli import run_command
from src.common.files import write_json_atomic, write_text_atomic
from src.common.rows import read_prompts
from src.common.runs import Run, start_run
from src.common.settings import to_json
from src.steering.settings import SteerSettings

LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SteerConfig(SteerSettings):
    """Steering"""


def main(config: SteerConfig) -> None:
    from src.common.system_prompts import PLAIN, read_chat_template
    from src.models.arms import build_arms
    from src.models.engine import choose_backend
    from src.models.hub import check_reference
    from src.steering.measures import read_word_lists
    from src.steering.tasks import build_tasks

    # 1. Everything that can be wrong without a model.
    prompts = read_prompts(config.prompts_json, config.num_tasks)
    arms = build_arms(config, config.checked_entries())
    lists = read_word_lists(config.function_words)
    check_reference(config.model_id, config.adapter_path)
    backend, reason = choose_backend(config, keeps=True)
    if backend == "hf":
        config.refuse_transformers(reason)
    if config.chat_template not in (None, PLAIN):
        read_chat_template(config.chat_template)
    tasks = build_tasks(arms, prompts, n_reps(config))

    # 2. The run folder, fresh or resumed.
    with start_run(config, "steer", inputs=input_files(config)) as run:
        steer(config, run, arms, tasks, lists)


def steer(config: SteerConfig, run: Run, arms: Sequence, tasks: Sequence, lists: dict[str, frozenset[str]]) -> None:
    """Ask what is not answered yet, write the rows arm by arm, summarize, report."""
    from rich.console import Console

    from src.common.captures import FOLDER_NAME as CAPTURES
    from src.common.results import FILE_NAME, Results
    from src.steering.kept import Kept
    from src.steering.parity import FILE_NAME as PARITY
    from src.steering.references import REFERENCES, References
    from src.steering.report import report
    from src.steering.rows import MEASURED_FIELDS
    from src.steering.summary import print_table, summarize_rows

    # 3. What an earlier start left.
    results = Results(run.folder, MEASURED_FIELDS)
    results.refuse_other_prompts({task.row_id: task.prompt for task in tasks})
    kept = Kept(config, run.folder, results) if config.capture else None
    references = References(run.folder, results)
    row_ids = [task.row_id for task in tasks]
    done = sum(row_id in results.rows for row_id in row_ids)
    if done:
        LOGGER.info("%d of %d rows are there already", done, len(row_ids))

    # 4. The rest, which needs the model.
    if done < len(row_ids):
        ask(config, run, arms, tasks, results, references, lists, kept)

    # 5. Rows in task order, the summary, the report.
    references.close()
    results.finish(row_ids)
    if kept:
        kept.finish(row_ids)
    rows = list(results.rows.values())
    summary = summarize_rows(rows, list(lists), config.seed)
    write_json_atomic(run.folder / "summary.json", summary)
    # Not when it was run: the same rows make the same page.
    about = {name: value for name, value in to_json(config).items() if name != "datetime_str"}
    page = report(f"Steering {config.model_id}", arms, summary, rows, list(lists), about)
    write_text_atomic(run.folder / "report.html", page)
    print_table(summary, list(lists), Console(file=sys.stdout))
    files = {
        FILE_NAME: "one row a response",
        REFERENCES: "token ids of the unsteered responses, on which KL is measured",
        "summary.json": "means and 95 % intervals per arm",
        "report.html": "dose and response, responses side by side",
    }
    if kept:
        files[CAPTURES] = "hidden states: src.common.captures.read_captures(folder).tensor(row id, layer)"
    if (run.folder / PARITY).exists():
        files[PARITY] = "the first prompts on transformers and on vLLM"
    run.finish(files)


def ask(config: SteerConfig, run: Run, arms: Sequence, tasks: Sequence, results, references, lists, kept) -> None:
    """Load the model and ask; every row is on disk as soon as it is whole."""
    from rich.console import Console

    from src.common.progress import Progress
    from src.models.arms import fingerprint_of
    from src.models.engine import choose_backend, load_engine
    from src.models.intervention_check import refuse_unfit
    from src.steering.asking import asking_on
    from src.steering.parity import check_vllm, is_done, run_transformers

    # Before the minute that loading may take: rows of two engines are not mixed.
    run.record(backend=choose_backend(config, keeps=True)[0])
    refuse_unfit(config, config.kept)
    compared, today = [], run.first_started.date()
    if config.parity and not is_done(run.folder, config.parity):
        compared = run_transformers(config, tasks, lambda hf: asking_on(hf, config, arms, lists, today).request)
    with load_engine(config, config.batch_size, keeps=True) as engine:
        asking = asking_on(engine, config, arms, lists, today, kept)
        place = asking.projection.place
        acting = fingerprint_of(asking.specs)
        run.record(**engine.facts, interventions_fingerprint=acting, projected_onto=str(place))
        if compared:
            check_vllm(config, run.folder, engine, compared, tasks, Console(file=sys.stdout))
        LOGGER.info("Responses are projected at %s", place)
        done = sum(task.row_id in results.rows for task in tasks)
        with Progress(total=len(tasks), done=done) as progress:
            asking.run(tasks, results, references, progress.add_row, progress.add_tokens)
    run.record(tokens_generated=progress.tokens, tokens_per_second=round(progress.rate, 1))


def n_reps(config: SteerConfig) -> int:
    """Repeats to make: one at temperature 0, where all would be equal."""
    if config.temperature == 0 and config.n_reps > 1:
        print(f"note: at temperature 0 all {config.n_reps} repeats would be equal; making one of each", file=sys.stderr)
        return 1
    return config.n_reps


def input_files(config: SteerConfig) -> list[Path]:
    """The files whose content decides the rows."""
    paths = [config.prompts_json, config.function_words, config.chat_template]
    files = [Path(p) for p in paths if p and not str(p).startswith("hub:") and str(p) != "plain"]
    return [*files, *config.intervention_files()]


if __name__ == "__main__":
    run_command(main, SteerConfig)
