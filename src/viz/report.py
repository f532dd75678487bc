"""The HTML report of one run folder of any kind: settings, summary, plots, rows, other results, provenance."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from src.common.errors import InputError
from src.common.files import encode_json
from src.common.html_report import escape, facts, page, plot, table, text_block
from src.common.jsonl import read_jsonl
from src.common.run_folder import CONFIG, DONE, PROVENANCE, read_json, read_run

MOST_ROWS = 2000
MOST_PROMPTS = 50
MOST_SIDES = 6
"""Values whose answers stand side by side."""
SIDES = ("arm", "persona", "model_id", "task")
ROWS, SUMMARY, SCORES = "results.jsonl", "summary.json", "scores.jsonl"
REPORT, EXPERIMENT = "report.html", "experiment.toml"
NO_SECTION = {CONFIG, PROVENANCE, SUMMARY, ROWS}
PLOTTED = ("avg_entropy", "avg_top_k_mass", "num_thinking_tokens")
TITLES = {
    "run_personas": "Personas and prompts",
    "extract_directions": "Directions from contrast prompts",
    "steer": "Prompts under interventions",
    "abliterate": "A searched edit of the weights",
    "finetune": "Fine-tuning",
    "evaluate": "Evaluation",
    "ask": "Answers of an API model",
    "judge": "Judged results",
    "embed_dataset": "Embeddings of a dataset",
    "experiment": "Experiment",
    "merge_shards": "Merged workers' rows",
}
IN_TITLE = ("model_id", "adapter_path", "temperature", "max_tokens", "steer", "method")
Row = Mapping[str, Any]


def report(folder: Path) -> str:
    """The page. Raises InputError where the folder is no run's, or a file in it is a link to somewhere else."""
    check_folder(folder)
    if is_experiment(folder):
        plan = (folder / EXPERIMENT).read_text(encoding="utf-8")
        return page(f"{TITLES['experiment']} · {folder}", [*_others(folder), ("Plan", text_block(plan))])
    run, provenance = read_run(folder)
    sections = []
    if not (folder / DONE).exists():
        sections.append(("Unfinished", text_block("The run has not finished; what follows is what there is so far.")))
    if (folder / SUMMARY).exists():
        sections += summary_sections(read_json(folder / SUMMARY))
    rows = _first_rows(folder / ROWS) if (folder / ROWS).exists() else []
    sections += _plots(folder)
    sections += _side_by_side(rows)
    if rows:
        sections.append((f"Rows ({_how_many(rows)})", table(rows)))
    sections += _others(folder)
    sections.append(("Settings", facts(run["config"])))
    if (folder / DONE).exists():
        done = read_json(folder / DONE)
        sections.append(("Files", table([{"file": name} | about for name, about in done["files"].items()])))
    sections.append(("Provenance", text_block(encode_json(provenance, indent=2))))
    return page(title(folder, run), sections)


def title(folder: Path, run: Mapping[str, Any]) -> str:
    """What was done, with which model and settings, and where."""
    config, command = run["config"], run["command"]
    what = TITLES.get(command, command.replace("_", " ").capitalize())
    told = [f"{name.replace('_', ' ')} {_short(config[name])}" for name in IN_TITLE[1:] if config.get(name) is not None]
    return " · ".join([what, *([_short(config["model_id"])] if config.get("model_id") else []), *told, str(folder)])


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def is_experiment(folder: Path) -> bool:
    """Whether it is the folder of a design matrix, which holds runs and is none."""
    return (folder / EXPERIMENT).exists() and not (folder / CONFIG).exists()


def check_folder(folder: Path) -> None:
    """Raises InputError for a folder that is no run's, or that has a file which is a link to somewhere outside it."""
    if not is_experiment(folder):
        read_run(folder)
    for path in folder.iterdir():
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not target.is_relative_to(folder.resolve()):
            raise InputError(f"{path}: is a link to {target}, outside the run's folder; it is not shown")


def own_report(folder: Path) -> str:
    """The report that the run wrote itself. Raises InputError as `check_folder`, and where it is gone."""
    check_folder(folder)
    try:
        return (folder / REPORT).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder / REPORT}: {error.strerror}") from error


def summary_sections(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """
    A section for each group of summary.json (group -> name -> measure -> {mean, std, n, …}), a row for each name and
    measure in it. What has another shape is shown as it is.
    """
    sections = []
    for group, names in summary.items():
        if isinstance(names, dict) and all(isinstance(measures, dict) for measures in names.values()):
            sections.append((f"Summary: {group}", table(_summary_rows(names))))
        else:
            sections.append((f"Summary: {group}", facts({group: names})))
    return sections


def _summary_rows(names: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name, measures in names.items():
        present = {measure: numbers for measure, numbers in measures.items() if numbers is not None}
        for measure, numbers in present.items():
            values = numbers if isinstance(numbers, dict) else {"value": numbers}
            rows.append({"name": name, "measure": measure} | values)
    return rows


def _first_rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in islice(read_jsonl(path, in_progress=True), MOST_ROWS)]


def _how_many(rows: Sequence[Row]) -> str:
    return f"the first {len(rows)}; the app shows all" if len(rows) == MOST_ROWS else str(len(rows))


def _plots(folder: Path) -> list[tuple[str, str]]:
    """Plots over all rows, not only those of the table."""
    sections = []
    if (folder / SCORES).exists():
        from src.common.score_plot import score_by_layer

        rows = [row for _, row in read_jsonl(folder / SCORES, in_progress=True)]
        if rows:
            sections.append(("Scores by layer", plot(score_by_layer(rows))))
    if (folder / ROWS).exists():
        # A data frame library takes a second to import, which runs without rows need not wait for.
        from src.viz.data import groups_in, read_frame, together

        frame = together({folder.name: read_frame(folder / ROWS)})
        groups = [name for name in groups_in(frame) if name != "run"]
        sections += [(heading, plot(figure)) for heading, figure in _row_plots(frame, groups)]
    return sections


def _row_plots(frame: Any, groups: Sequence[str]) -> Iterator[tuple[str, Any]]:
    from src.viz import charts, numbers
    from src.viz.data import first_group, numeric

    measured = [name for name in numeric(frame) if frame[name].nunique() > 1]
    if "coefficient" in measured:
        for measure in ("mean_projection", "avg_entropy"):
            if measure in measured:
                doses = numbers.dose_response(frame, measure)
                yield f"Dose and response: {charts.title_of(measure)}", charts.doses(doses, measure)
    for measure in PLOTTED:
        if groups and measure in measured:
            by = first_group(groups)
            yield f"{charts.title_of(measure).capitalize()} by {by}", charts.boxes(frame, by, measure)


def _side_by_side(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The answers of the first arms, personas or models to the same prompts; what else varies has rows of its own."""
    rows = [row for row in rows if "prompt" in row and not row.get("turn") and not row.get("rep_idx")]
    varying = [name for name in SIDES if len({str(row.get(name)) for row in rows}) > 1]
    if not varying:
        return []
    by, *others = varying
    sides = list(dict.fromkeys(str(row.get(by)) for row in rows))[:MOST_SIDES]
    asked: dict[tuple[str, ...], tuple[dict[str, Any], dict[str, Any]]] = {}
    for row in rows:
        if str(row.get(by)) in sides:
            names = {name: row.get(name) for name in ("prompt", *others)}
            asked.setdefault(tuple(map(str, names.values())), (names, {}))[1][str(row.get(by))] = row.get("response")
    # A side may be called as a column is.
    shown = [{**names, **{f"{by} {side}": text for side, text in texts.items()}} for names, texts in asked.values()]
    about = f"The first {len(sides)} values of {by}, the first {len(shown[:MOST_PROMPTS])} prompts."
    columns = ["prompt", *others, *(f"{by} {side}" for side in sides)]
    return [("Answers side by side", f"<p>{escape(about)}</p>" + table(shown[:MOST_PROMPTS], columns=columns))]


def _others(folder: Path) -> Iterator[tuple[str, str]]:
    """A section for every other JSON and JSONL file of the folder itself."""
    for path in sorted(folder.iterdir()):
        if path.name in NO_SECTION or path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix == ".jsonl":
            rows = _first_rows(path)
            yield f"{path.name} ({_how_many(rows)})", table(rows)
        elif path.suffix == ".json":
            yield path.name, _json_section(read_json(path))


def _json_section(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return table(value[:MOST_ROWS])
    return facts(value) if isinstance(value, dict) else text_block(encode_json(value, indent=2))
