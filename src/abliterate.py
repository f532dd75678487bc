"""
Directions → searched edit of the weights that removes one behaviour and leaves the rest. From the repository root:
uv run -m src.abliterate --target_prompts data/abliteration/cooking.jsonl --markers_path data/abliteration/markers.txt \
    --control_prompts data/abliteration/other.jsonl --model_id data/experiments/organism --n_trials 60 \
    --output_dir data/experiments/abliterated
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.abliteration.settings import AbliterateSettings
from src.common.cli import run_command
from src.common.errors import InputError
from src.common.files import write_json_atomic
from src.common.jsonl import write_jsonl_atomic
from src.common.runs import Run, start_run

if TYPE_CHECKING:
    from src.abliteration.edits import EditMaker
    from src.abliteration.scores import Scorer
    from src.abliteration.space import Space
    from src.abliteration.study import Study

LOGGER = logging.getLogger(__name__)
WRITERS, TRIALS, RESPONSES, EVALUATION = "writers.jsonl", "trials.jsonl", "responses.jsonl", "evaluation.json"
REPORT, EDITED = "report.html", "model"


@dataclass(kw_only=True)
class AbliterateConfig(AbliterateSettings):
    """Abliteration"""


def main(config: AbliterateConfig) -> None:
    from src.abliteration.markers import read_markers
    from src.abliteration.prompts import read_split, tell_left_out
    from src.common.row_files import read_text, require_file
    from src.common.system_prompts import PLAIN, read_chat_template
    from src.models.hub import check_reference

    # 1. Everything that can be wrong without a model.
    if config.markers_path:
        read_markers(config.markers_path)
    split = read_split(config)
    induced = config.parsed_induce()
    for path in (config.directions_path, config.judge_rubric, induced and induced[0]):
        if path is not None:
            require_file(path)
    if config.validate_text and not read_text(config.validate_text).strip():
        raise InputError(f"--validate_text {config.validate_text}: no text")
    if config.chat_template not in (None, PLAIN):
        read_chat_template(config.chat_template)
    check_reference(config.model_id, config.adapter_path)
    if config.edited_model_id is not None:
        check_reference(config.edited_model_id, flag="--edited_model_id")

    # 2. The run folder, fresh or resumed.
    with start_run(config, "abliterate", inputs=input_files(config)) as run:
        run.record(split={side: some.ids() for side, some in split.items()})
        if config.directions_path is not None:
            run.record(left_out=tell_left_out(split, config.directions_path))
        compare_two(config, run, split) if config.evaluate_only else abliterate(config, run, split)


def abliterate(config: AbliterateConfig, run: Run, split: dict[str, Any]) -> None:
    """Directions, search, choice, report and the edited model."""
    from rich.console import Console

    from src.abliteration import preparation
    from src.abliteration.detectors import detector_of
    from src.abliteration.edits import EditMaker
    from src.abliteration.evaluation import Protocol, Reference, report_prompts
    from src.abliteration.extraction import extract_directions
    from src.abliteration.outcome import conclude
    from src.abliteration.saved import Outcome
    from src.abliteration.search import search
    from src.abliteration.writers_table import print_writers, writer_rows
    from src.models.language_model import LanguageModel
    from src.models.loading import resolve
    from src.models.saving import check_savable
    from src.models.single_prompts import SinglePromptRenderer

    # 3. Directions of the prompts that are kept for them, in a process of their own, before the model takes memory.
    if config.save == "model":
        check_savable(resolve(config), run.path("model.unused"))
    path = config.directions_path or extract_directions(config, run.folder, split)

    # 4. The model, what can be done to it, and how it answers the report's prompts without an edit.
    detector = detector_of(config)
    model = LanguageModel.load(config)
    run.record(**model.facts)
    directions = preparation.own_directions(config, path, model)
    maker = EditMaker(model.model, directions, preparation.edit_options(config, directions))
    preparation.refuse_inexact(config, model.model, maker)
    rows = writer_rows(maker.writers, maker.gains)
    print_writers(rows, Console(file=sys.stderr))
    renderer = SinglePromptRenderer(
        model.tokenizer, run.first_started.date(), raw=config.raw_prompts, system_prompt=config.system_prompt,
        chat_template=config.chat_template, thinking=config.thinking_mode,
    )  # fmt: skip
    about = preparation.about(config, model, directions, split)
    if config.storage:
        # Before anything is asked; a study in the run's own folder is guarded by the folder's settings.
        open_study(config, run).refuse_other(about)
    with preparation.computing(config, model):
        protocol = Protocol(
            prompts=report_prompts(split, renderer), detector=detector, kl_tokens=config.kl_tokens,
            response_tokens=config.response_tokens, batch_size=config.batch_size,
        )  # fmt: skip
        reference = Reference(model, protocol)
        preparation.refuse_common_markers(reference)

        # 5. The search.
        scorer = preparation.prepare_scorer(config, model, maker, detector, split, renderer)
        # Not before: a run that is refused leaves nothing, and can be given again with other settings.
        write_jsonl_atomic(run.path(WRITERS), rows)
        study, space = begin(config, run, maker, scorer, about, directions.metadata.best_layer)
        search(config, study, space, maker, scorer, lambda: write_trials(run, study))

        # 6. What was found: the front, the choice, the report's prompts before and after, the model.
        write_trials(run, study)
        conclude(Outcome(config, run, model, directions, maker, reference, scorer.n_before), study)


def begin(
    config: AbliterateConfig, run: Run, maker: "EditMaker", scorer: "Scorer", about: dict[str, Any],
    best_layer: int | None,
) -> "tuple[Study, Space]":  # fmt: skip
    """The study, with the points that it begins with, and the space that it searches."""
    from src.abliteration import preparation
    from src.abliteration.space import SOURCES, Space

    space = Space(
        n_layers=maker.n_layers, components=tuple(config.components), min_weight=config.min_weight,
        max_weight=config.max_weight, sources=("own",) if config.calibrate else SOURCES,
    )  # fmt: skip
    study = open_study(config, run)
    study.claim(about)
    if not study.is_begun:
        points = preparation.first_points(config, scorer, maker, space, best_layer)
        study.enqueue(preparation.warm_points(config, space, study, about["prompts"]) + points)
    run.record(warm_start=study.warm_start)
    return study, space


def open_study(config: AbliterateConfig, run: Run) -> "Study":
    """The study of --storage, or the one in the run's folder, begun where there is none."""
    from src.abliteration.storage import open_storage
    from src.abliteration.study import Study

    n_startup = config.n_startup_trials or min(60, max(1, config.n_trials // 4))
    storage = open_storage(config.storage, run.folder, config.stale_seconds)
    return Study(storage, config.study_name, n_startup=n_startup, seed=config.seed)


def compare_two(config: AbliterateConfig, run: Run, split: dict[str, Any]) -> None:
    """--evaluate_only: the same comparison of any two models, one in memory at a time."""
    from rich.console import Console

    from src.abliteration.comparing import compare
    from src.abliteration.evaluation import written_measures, written_rows
    from src.abliteration.report import print_before_after

    rows, found = compare(config, run, split)
    write_jsonl_atomic(run.path(RESPONSES), written_rows(rows))
    write_json_atomic(run.path(EVALUATION), written_measures(found))
    print_before_after(found, Console(file=sys.stdout))
    run.finish({RESPONSES: "both models' answers", EVALUATION: "means and 95 % intervals of both"})


def write_trials(run: Run, study: Any) -> None:
    """Every trial of the study so far, whichever process ran it."""
    from src.abliteration.study import row_of, written

    write_jsonl_atomic(run.path(TRIALS), [written(row_of(trial)) for trial in study.done()])


def input_files(config: AbliterateConfig) -> list[Path]:
    """The files whose content decides the results."""
    sources = (config.target_prompts, config.control_prompts, config.preserve_prompts, config.chat_template)
    paths = [Path(each) for each in sources if each and not each.startswith("hub:") and each != "plain"]
    induced = config.parsed_induce()
    more = (config.markers_path, config.directions_path, config.judge_rubric, induced and induced[0])
    return [*paths, *(Path(path) for path in more if path)]


if __name__ == "__main__":
    run_command(main, AbliterateConfig)
