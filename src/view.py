"""
Make an HTML report of run folders: settings, summary, rows, provenance. From the repository root:
uv run -m src.view data/experiments/first_personas
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from src.common.cli import run_command
from src.common.errors import InputError
from src.common.files import encode_json, write_text_atomic
from src.common.html_report import facts, page, table, text_block
from src.common.jsonl import read_jsonl
from src.common.run_folder import DONE, read_json, read_run
from src.common.settings import setting

MOST_ROWS = 2000
REPORT, BESIDE, ROWS, SUMMARY = "report.html", "view.html", "results.jsonl", "summary.json"


@dataclass(kw_only=True)
class ViewConfig:
    """The view"""

    runs: list[Path] = setting(positional=True)
    """Run folders; each gets a report.html, or a view.html beside its own. May stand without the flag."""


def main(config: ViewConfig) -> None:
    # 1. All folders are looked at before anything is written.
    reports = {folder / page_name(folder): report(folder) for folder in config.runs}

    # 2. One page in each.
    for path, text in reports.items():
        try:
            write_text_atomic(path, text)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; the run folder must be writable") from error
        print(f"wrote {path}  open it in a browser")


def page_name(folder: Path) -> str:
    """report.html, or view.html beside a report that the run wrote itself."""
    own = (folder / DONE).exists() and REPORT in read_json(folder / DONE)["files"]
    return BESIDE if own else REPORT


def report(folder: Path) -> str:
    """The HTML of one run. Raises InputError where the folder is no run's."""
    run, provenance = read_run(folder)
    settings = run["config"]
    title = " · ".join(str(part) for part in (run["command"], settings.get("model_id"), folder) if part)
    sections = []
    if not (folder / DONE).exists():
        sections.append(("Unfinished", text_block("The run has not finished; what follows is what there is so far.")))
    if (folder / SUMMARY).exists():
        sections += summary_sections(read_json(folder / SUMMARY))
    if (folder / ROWS).exists():
        rows = [row for _, row in islice(read_jsonl(folder / ROWS, in_progress=True), MOST_ROWS)]
        sections.append((f"Rows (the first {len(rows)})", table(rows)))
    sections.append(("Settings", facts(settings)))
    if (folder / DONE).exists():
        done = read_json(folder / DONE)
        sections.append(("Files", table([{"file": name} | about for name, about in done["files"].items()])))
    sections.append(("Provenance", text_block(encode_json(provenance, indent=2))))
    return page(title, sections)


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


if __name__ == "__main__":
    run_command(main, ViewConfig)
