"""
Contrast prompts → one direction per layer, scored on held-out prompts against two controls. From the repository root:
uv run -m src.extract_directions --positive_path data/directions/french_english/target.jsonl \
    --negative_path data/directions/french_english/control.jsonl --paired --token_position mean_prompt \
    --model_id bundled:smollm2-135m --output_dir data/experiments/french
"""

import logging
from dataclasses import dataclass

from src.common.cli import run_command
from src.common.errors import InputError
from src.common.files import write_text_atomic
from src.common.jsonl import write_jsonl_atomic
from src.common.runs import Run, start_run
from src.directions.settings import DirectionSettings

LOGGER = logging.getLogger(__name__)
SCORES, REPORT, RESIDUALS = "scores.jsonl", "report.html", "residuals"


@dataclass(kw_only=True)
class ExtractDirectionsConfig(DirectionSettings):
    """Directions"""


def main(config: ExtractDirectionsConfig) -> None:
    from src.common.row_files import require_file
    from src.common.system_prompts import PLAIN, read_chat_template
    from src.models.hub import check_reference

    # 1. Everything that can be wrong without a model, the paths first: they answer before torch is imported.
    for path in config.local_paths:
        require_file(path)
    if config.chat_template not in (None, PLAIN):
        read_chat_template(config.chat_template)
    check_reference(config.model_id, config.adapter_path)
    if config.import_path is not None:
        with start_run(config, "extract_directions", inputs=[config.import_path]) as run:
            convert(config, run)
        return

    # 2. The examples of both classes, and which of them are held out.
    from src.directions.source import Source
    from src.models.engine import choose_backend

    source = Source(config)
    backend, reason = choose_backend(config)

    # 3. The run folder, fresh or resumed.
    with start_run(config, "extract_directions", inputs=source.inputs) as run:
        LOGGER.info("Hidden states of %s (%s)", {"hf": "transformers", "vllm": "vLLM"}[backend], reason)
        extract(config, run, source, backend)


def extract(config: ExtractDirectionsConfig, run: Run, source, backend: str) -> None:
    """The steps that need the model. source: a `Source`. backend: hf or vllm."""
    from src.common.directions_file import write_directions
    from src.directions.extraction import extract_all, refuse_same_tokens, refuse_too_many, refuse_too_many_directions
    from src.directions.outcome import next_command, print_outcome
    from src.directions.outputs import FILE_NAME, directions_of, export_all
    from src.directions.report import Reported, report
    from src.directions.scoring import best_of, score_rows
    from src.models.loading import load_config, load_tokenizer, resolve

    # 4. The model's files, its layers, and every example as tokens.
    files = resolve(config)
    facts = files.facts | {"backend": backend}
    run.record(**facts)
    shape = load_config(files.folder, config.trust_remote_code).get_text_config(decoder=True)
    layers = config.wanted_layers(shape.num_hidden_layers)
    refuse_too_many(len(source.contrast.examples), shape.hidden_size)
    refuse_too_many_directions(source, shape.hidden_size)
    tokenizer = load_tokenizer(files.folder, config.trust_remote_code)
    sequences, details = source.sequences(tokenizer, facts, run.first_started.date())
    refuse_same_tokens(sequences, config.token_position)

    # 5. Hidden states, of which a resumed run keeps what is there.
    reader = extract_all(config, facts, sequences, layers, run.path(RESIDUALS), run.record)

    # 6. Each layer's directions and their scores on held-out examples, one layer in memory at a time.
    read_layer = lambda layer, ids: reader.rows(ids, layers.index(layer))  # noqa: E731
    results = measure_layers(config, source, layers, read_layer)
    best = best_of(results)
    if best is None:
        raise InputError(f"no layer has a direction with scores; layer {layers[0]}: {results[0].problem}")
    rows = score_rows(results, config.n_directions)
    details["problems"] = {str(result.layer): result.problem for result in results if result.problem}

    # 7. The files.
    directions = directions_of(source, facts, shape.num_hidden_layers, results, rows, best, details)
    write_directions(run.path(FILE_NAME), directions)
    write_jsonl_atomic(run.path(SCORES), rows)
    write_text_atomic(run.path(REPORT), report(Reported(source, results, rows, best, details, read_layer)))
    exported = export_all(run.folder, directions, config.export or [])
    print_outcome(rows, best.layer, details)
    files_written = {
        FILE_NAME: "the directions, for --steer",
        SCORES: "a row a layer and direction: AUC, d′, class means, controls",
        REPORT: "scores by layer, projections, hidden states, extreme prompts; open it in a browser",
        RESIDUALS: "the hidden states, from which the same command goes on",
    }
    run.finish(files_written | exported)
    row = next(row for row in rows if row["layer"] == best.layer and row["k"] == 0)
    print(f"next: {next_command(config, run.path(FILE_NAME), row)}")


def measure_layers(config: ExtractDirectionsConfig, source, layers: tuple[int, ...], read_layer) -> list:
    """One LayerResult a layer. read_layer(layer, ids) → float32 (n, 1, d_model)."""
    from functools import partial

    from tqdm import tqdm

    from src.directions.estimation import plan, preserved_directions
    from src.directions.scoring import layer_rows, measure

    contrast, results = source.contrast, []
    for layer in tqdm(layers, desc="scoring", unit="layer"):
        read = partial(read_layer, layer)

        def make_plan(target, control, read=read):
            preserved = None
            if source.preserve:
                sides = ([example.id for example in side] for side in (source.preserve, source.against))
                preserved = preserved_directions(config, *map(read, sides))
            return plan(config, target, control, contrast.paired, preserved)

        results.append(measure(layer_rows(layer, contrast, source.held, read), make_plan, contrast.paired, config.seed))
    return results


def convert(config: ExtractDirectionsConfig, run: Run) -> None:
    """A file of another tool → directions.safetensors of this model."""
    from src.common.directions_file import shown, write_directions
    from src.directions.outputs import FILE_NAME, export_all, import_file
    from src.models.loading import load_config, resolve

    files = resolve(config)
    run.record(**files.facts)
    shape = load_config(files.folder, config.trust_remote_code).get_text_config(decoder=True)
    directions = import_file(config, files.facts, shape.num_hidden_layers, shape.hidden_size)
    write_directions(run.path(FILE_NAME), directions)
    print(f"directions of layers {shown(directions.layers_present)}, {directions.k} a layer")
    run.finish({FILE_NAME: "the directions as unit vectors"} | export_all(run.folder, directions, config.export or []))


if __name__ == "__main__":
    run_command(main, ExtractDirectionsConfig)
