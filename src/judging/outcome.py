"""From judgements to columns of the judged rows, and to the summary: means, counts, agreement between repeats."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from src.common.jsonl import round_measured
from src.common.rows import Record
from src.common.rubrics import PROBABILITIES, Rubric
from src.ops.agreement import alpha_interval, alpha_nominal, exact_agreement
from src.ops.statistics import summarize

Judgement = Mapping[str, Any]
NOTHING = "unscored"


def judged_rows(
    records: Sequence[Record], rubrics: Sequence[Rubric], judgements: Sequence[Judgement], n_repeats: int
) -> list[dict[str, Any]]:
    """
    The rows as they were, each with its id and, for each rubric, NAME: the score (with repeats the mean of numbers, the
    most frequent word or None where two are), NAME_repeats: the scores one by one, NAME_mass and NAME_read_from.
    """
    found = _by_row(judgements)
    rows = []
    for record in records:
        row: dict[str, Any] = {"id": record.id} | record.values
        row["id"] = record.id
        for rubric in rubrics:
            row |= _columns(rubric, found.get((record.id, rubric.name), []), n_repeats)
        rows.append(row)
    return rows


def _by_row(judgements: Sequence[Judgement]) -> dict[tuple[str, str], list[Judgement]]:
    found: dict[tuple[str, str], list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        found[judgement["row_id"], judgement["rubric"]].append(judgement)
    return found


def _scores(judgements: Sequence[Judgement]) -> list[Any]:
    return [judgement["score"] for judgement in judgements if judgement["score"] is not None]


def _columns(rubric: Rubric, judgements: Sequence[Judgement], n_repeats: int) -> dict[str, Any]:
    scores = _scores(judgements)
    columns: dict[str, Any] = {rubric.name: _together(rubric, scores)}
    if n_repeats > 1:
        columns[f"{rubric.name}_repeats"] = [judgement["score"] for judgement in judgements]
    if rubric.kind == PROBABILITIES:
        masses = [judgement["mass"] for judgement in judgements if judgement["mass"] is not None]
        columns[f"{rubric.name}_mass"] = round_measured(fmean(masses)) if masses else None
    columns[f"{rubric.name}_read_from"] = "+".join(sorted({judgement["read_from"] for judgement in judgements})) or None
    return columns


def _together(rubric: Rubric, scores: Sequence[Any]) -> Any:
    if not scores:
        return None
    if rubric.is_numeric:
        return round_measured(fmean(scores))
    (word, count), *others = Counter(scores).most_common(2)
    return None if others and others[0][1] == count else word


def summarize_judged(
    rows: Sequence[Mapping[str, Any]],
    rubrics: Sequence[Rubric],
    judgements: Sequence[Judgement],
    group_by: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """
    {"rubrics": {name: {"score" or "shares", "rows", "unscored", "read_from", "agreement"}}, "by COLUMN": {value: {name:
    …}}}. Scores read from probabilities and from text are never averaged together: with both, each has its mean.
    """
    found = _by_row(judgements)
    by_rubric = {}
    for rubric in rubrics:
        units = [
            [
                judgement["score"]
                for judgement in found.get((row["id"], rubric.name), [])
                if judgement["score"] is not None
            ]
            for row in rows
        ]
        by_rubric[rubric.name] = _measures(rubric, rows, seed) | {"agreement": _agreement(rubric, units)}
    summary: dict[str, Any] = {"rubrics": by_rubric}
    for column in group_by:
        groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            groups[str(row[column])].append(row)
        summary[f"by {column}"] = {
            value: {
                f"{rubric.name} {name}": measure
                for rubric in rubrics
                for name, measure in _measures(rubric, members, seed).items()
            }
            for value, members in groups.items()
        }
    return summary


def _measures(rubric: Rubric, rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    scored = [row for row in rows if row[rubric.name] is not None]
    counts = {"rows": len(rows), NOTHING: len(rows) - len(scored)}
    if not rubric.is_numeric:
        said = Counter(row[rubric.name] for row in scored)
        return {word: said[word] for word in rubric.choices} | counts
    ways = sorted({row[f"{rubric.name}_read_from"] for row in scored})
    scores = {}
    for way in ways:
        members = [row for row in scored if row[f"{rubric.name}_read_from"] == way]
        # Repeats of one prompt are not independent.
        clusters = [row.get("prompt_id", row["id"]) for row in members]
        made = summarize([row[rubric.name] for row in members], clusters, seed)
        assert made is not None, "a way of reading without a row"
        scores[f"score from {way}"] = {
            name: value if isinstance(value, int) else round_measured(value) for name, value in made._asdict().items()
        }
    return scores | counts


def _agreement(rubric: Rubric, units: Sequence[Sequence[Any]]) -> dict[str, Any] | None:
    """Krippendorff's α and exact agreement over the rows with two scores or more; None without one."""
    n = sum(len(unit) > 1 for unit in units)
    if not n:
        return None
    alpha = alpha_interval(units) if rubric.is_numeric else alpha_nominal(units)
    return {
        "krippendorff_alpha": round_measured(alpha),
        "level": "interval" if rubric.is_numeric else "nominal",
        "exact": round_measured(exact_agreement(units)),
        "n": n,
    }
