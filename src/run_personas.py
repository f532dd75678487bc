"""
Personas × prompts → responses with exact token uncertainty. From the repository root:
uv run -m src.run_personas --prompts_json data/personas/prompts.json --personae_json data/personas/personae.json \
    --model_id bundled:smollm2-135m --output_dir data/experiments/first_personas --num_tasks 4 --max_tokens 64
"""

import difflib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from src.common.cli import run_command
from src.common.errors import InputError
from src.common.files import write_json_atomic
from src.common.rows import Persona, Prompt, read_personas, read_prompts
from src.common.runs import Run, start_run
from src.personas.settings import PersonaSettings

LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RunPersonasConfig(PersonaSettings):
    """Personas × prompts"""


def main(config: RunPersonasConfig) -> None:
    from src.common.system_prompts import PLAIN, read_chat_template
    from src.models.engine import choose_backend
    from src.models.hub import check_reference
    from src.personas.tasks import build_tasks

    # 1. Everything that can be wrong without a model.
    prompts = read_prompts(config.prompts_json, config.num_tasks)
    personas = chosen_personas(config)
    follow_ups = read_prompts(config.turns) if config.turns else []
    check_reference(config.model_id, config.adapter_path)
    choose_backend(config, config.projects)
    config.checked_entries()
    if config.chat_template not in (None, PLAIN):
        read_chat_template(config.chat_template)
    tasks = config.own_tasks(build_tasks(personas, prompts, n_reps(config)))

    # 2. The run folder, fresh or resumed.
    with start_run(config, "run_personas", inputs=input_files(config)) as run:
        generate(config, run, tasks, follow_ups)


def generate(config: RunPersonasConfig, run: Run, tasks: Sequence, follow_ups: list[Prompt]) -> None:
    """Ask what is not answered yet, write the rows in task order, summarize."""
    from rich.console import Console

    from src.common.results import FILE_NAME, Results
    from src.personas.conversations import all_row_ids
    from src.personas.rows import MEASURED_FIELDS
    from src.personas.summary import print_tables, summarize_rows
    from src.personas.token_arrays import FILE_NAME as ARRAYS_NAME
    from src.personas.token_arrays import TokenArrays

    # 3. What an earlier start left.
    results = Results(run.folder, MEASURED_FIELDS)
    results.refuse_other_prompts({task.row_id(0): task.prompt for task in tasks})
    arrays = TokenArrays(run.folder) if config.token_arrays else None
    row_ids = all_row_ids(tasks, follow_ups)
    done = sum(row_id in results.rows for row_id in row_ids)
    if done:
        LOGGER.info("%d of %d rows are there already", done, len(row_ids))

    # 4. The rest, which needs the model.
    if done < len(row_ids):
        ask(config, run, tasks, follow_ups, results, arrays)

    # 5. Rows in task order, arrays beside them, the summary.
    results.finish(row_ids)
    if arrays:
        arrays.finish(results.rows)
    summary = summarize_rows(list(results.rows.values()), config.seed)
    write_json_atomic(run.folder / "summary.json", summary)
    print_tables(summary, Console(file=sys.stdout))
    files = {FILE_NAME: "one row a response", "summary.json": "means and 95 % intervals per persona and category"}
    run.finish(files | ({ARRAYS_NAME: "each token's id, entropy and top-k mass"} if arrays else {}))


def ask(config: RunPersonasConfig, run: Run, tasks: Sequence, follow_ups: list[Prompt], results, arrays) -> None:
    """Load the model and run the conversations; every row is on disk as soon as it is there."""
    from src.common.progress import Progress
    from src.models.chat_format import PersonaRenderer, with_chat_template
    from src.models.engine import choose_backend, load_engine
    from src.models.intervention_check import refuse_unfit
    from src.models.projections import projection_onto
    from src.personas.conversations import Conversations, all_row_ids

    # Before the minute that loading may take: rows of two engines are not mixed.
    run.record(backend=choose_backend(config, config.projects)[0])
    to_come = refuse_unfit(config)
    specs = [to_come] if to_come else []
    with load_engine(config, config.batch_size, keeps=config.projects, specs=specs) as engine:
        entries = config.entries()
        spec = engine.resolve(entries, config.allow_model_mismatch) if entries else None
        projection = projection_onto(config, engine)
        run.record(**engine.facts, **({"interventions_fingerprint": spec.fingerprint} if spec else {}))
        renderer = PersonaRenderer(
            with_chat_template(engine.tokenizer, config.chat_template),
            config.persona_mode,
            system_prompt_style=config.system_prompt_style,
            thinking=config.thinking_mode,
            today=run.first_started.date(),
        )
        conversations = Conversations(config, tasks, follow_ups, engine, renderer, spec, projection)
        row_ids = all_row_ids(tasks, follow_ups)
        with Progress(total=len(row_ids), done=sum(row_id in results.rows for row_id in row_ids)) as progress:
            conversations.run(results, arrays, progress.add_row, progress.add_tokens)
    run.record(tokens_generated=progress.tokens, tokens_per_second=round(progress.rate, 1))


def chosen_personas(config: RunPersonasConfig) -> list[Persona]:
    """The personas of the wanted categories, the first `num_personae` of them. Raises InputError for an unknown one."""
    personas = read_personas(config.personae_json)
    known = list(dict.fromkeys(persona.category for persona in personas))
    for category in config.categories or []:
        if category not in known:
            nearest = difflib.get_close_matches(category, known, n=1, cutoff=0)[0]
            raise InputError(f"--categories {category}: not in {config.personae_json}; the nearest is {nearest!r}")
    wanted = [p for p in personas if config.categories is None or p.category in config.categories]
    return wanted[: config.num_personae]


def n_reps(config: RunPersonasConfig) -> int:
    """Repeats to make: one at temperature 0, where all would be equal."""
    if config.temperature == 0 and config.n_reps > 1:
        LOGGER.warning("--n_reps %d at temperature 0 gives equal repeats: making one", config.n_reps)
        print(f"note: at temperature 0 all {config.n_reps} repeats would be equal; making one of each", file=sys.stderr)
        return 1
    return config.n_reps


def input_files(config: RunPersonasConfig) -> list[Path]:
    """The files whose content decides the rows."""
    paths = [config.prompts_json, config.personae_json, config.turns, config.chat_template]
    files = [Path(p) for p in paths if p and not str(p).startswith("hub:") and str(p) != "plain"]
    return [*files, *config.intervention_files()]


if __name__ == "__main__":
    run_command(main, RunPersonasConfig)
