"""Scores of every cell with their intervals, and paired differences between cells on the same samples."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from src.common.jsonl import round_measured
from src.common.results import Row
from src.evaluation.rows import LABEL, PROBABILITY
from src.evaluation.scorers import auc_of
from src.ops.calibration import brier, calibration_error
from src.ops.statistics import paired_difference_interval, share_interval, summarize

DIMENSIONS = ("model_id", "persona", "arm")
COLUMNS = (
    *("task", *DIMENSIONS, "n", "n_samples", "score", "ci_low", "ci_high"),
    *("auc", "auc_low", "auc_high", "brier"),
    *("calibration_error", "avg_entropy", "num_tokens", "truncated", "unscored"),
)
DIFFERENCE_COLUMNS = (
    *("task", "differs", "first", "second", *DIMENSIONS, "n_samples", "difference", "ci_low", "ci_high"),
    *("second_better", "second_worse", "p"),
)
N_RESAMPLES = 2_000


def summarize_cells(cells: dict[str, list[Row]], seed: int) -> list[Row]:
    """
    A row a cell: mean score with its 95 % interval, by Wilson where each sample has one score of 0 or 1 and else by
    bootstrap over samples, and how many rows have no score and are in neither; of risks AUC (bootstrap over samples),
    Brier score and expected calibration error; mean entropy (nats), tokens, and the share of answers cut off by
    --max_tokens.
    """
    return [_summary(rows, seed) for rows in cells.values()]


def _summary(rows: Sequence[Row], seed: int) -> Row:
    first = rows[0]
    known = [row for row in rows if row["score"] is not None]
    low, high = _interval(known, seed)
    values = {
        "score": _mean([row["score"] for row in known]), "ci_low": low, "ci_high": high, **_risk(rows, seed),
        "avg_entropy": _mean([row["avg_entropy"] for row in rows if row["avg_entropy"] is not None]),
        "num_tokens": _mean([row["num_tokens"] for row in rows if row["num_tokens"] is not None]),
        "truncated": _mean([float(r["finish_reason"] == "length") for r in rows if r["finish_reason"] is not None]),
    }  # fmt: skip
    return {
        "task": first["task"], **{name: first[name] for name in DIMENSIONS}, "n": len(rows),
        "n_samples": len({row["sample_id"] for row in rows}), "unscored": len(rows) - len(known),
        **{name: round_measured(value) for name, value in values.items()},
    }  # fmt: skip


def _interval(rows: Sequence[Row], seed: int) -> tuple[float | None, float | None]:
    scores, samples = [float(row["score"]) for row in rows], [row["sample_id"] for row in rows]
    if not scores:
        return None, None
    if set(scores) <= {0.0, 1.0} and len(set(samples)) == len(samples):
        return share_interval(int(sum(scores)), len(scores))
    found = summarize(scores, samples, seed)
    return found.ci_low, found.ci_high


def _risk(rows: Sequence[Row], seed: int) -> dict[str, float | None]:
    names = ("auc", "auc_low", "auc_high", "brier", "calibration_error")
    some = [row for row in rows if row[LABEL] is not None]
    if not some:
        return dict.fromkeys(names)
    p, y = [row[PROBABILITY] for row in some], [row[LABEL] for row in some]
    low, high = _auc_interval(some, seed)
    return dict(zip(names, (auc_of(p, y), low, high, brier(p, y), calibration_error(p, y)), strict=True))


def _auc_interval(rows: Sequence[Row], seed: int) -> tuple[float | None, float | None]:
    """95 % by bootstrap over samples; resamples of a single label, which have no AUC, are left out."""
    samples = list(dict.fromkeys(row["sample_id"] for row in rows))
    members = {sample: [row for row in rows if row["sample_id"] == sample] for sample in samples}
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(N_RESAMPLES):
        drawn = [row for i in generator.integers(len(samples), size=len(samples)) for row in members[samples[i]]]
        value = auc_of([row[PROBABILITY] for row in drawn], [row[LABEL] for row in drawn])
        found += [] if value is None else [value]
    if len(found) < N_RESAMPLES // 2:
        return None, None
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def compare_cells(cells: dict[str, list[Row]], seed: int) -> list[Row]:
    """
    Second minus first for cells of a task that differ in one thing, the first being that which was named first: models
    as the same persona in the same arm, personas and arms likewise (arms against the unsteered one). On the samples
    that both have; intervals by Newcombe where every score is 0 or 1 and else by bootstrap over samples; p of the exact
    sign test over samples, two-sided.
    """
    heads = [rows[0] for rows in cells.values()]
    found = []
    for name in DIMENSIONS:
        for key, head in zip(cells, heads, strict=True):
            others = [other for other in (*DIMENSIONS, "task") if other != name]
            peers = [
                (k, h) for k, h in zip(cells, heads, strict=True) if all(h[other] == head[other] for other in others)
            ]
            if name == "arm":
                peers.sort(key=lambda pair: pair[1]["arm"] != "unsteered")
            if peers[0][0] != key:
                found += _difference(name, cells[peers[0][0]], cells[key], seed)
    return found


def _difference(name: str, first: Sequence[Row], second: Sequence[Row], seed: int) -> list[Row]:
    one, other = _by_sample(first), _by_sample(second)
    shared = [sample for sample in one if sample in other]
    if not shared:
        return []
    pairs = [(float(np.mean(one[sample])), float(np.mean(other[sample]))) for sample in shared]
    differences = [b - a for a, b in pairs]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    low, high = _paired_interval(pairs, differences, seed)
    head = second[0]
    return [{
        "task": head["task"], "differs": name, "first": first[0][name], "second": head[name],
        **{each: None if each == name else head[each] for each in DIMENSIONS}, "n_samples": len(shared),
        "difference": round_measured(float(np.mean(differences))), "ci_low": round_measured(low),
        "ci_high": round_measured(high), "second_better": better, "second_worse": worse,
        "p": round_measured(sign_test(better, worse)),
    }]  # fmt: skip


def _paired_interval(
    pairs: Sequence[tuple[float, float]], differences: Sequence[float], seed: int
) -> tuple[float | None, float | None]:
    if all(value in (0.0, 1.0) for pair in pairs for value in pair):
        count = lambda a, b: sum(pair == (a, b) for pair in pairs)  # noqa: E731
        return paired_difference_interval(count(1.0, 1.0), count(0.0, 1.0), count(1.0, 0.0), count(0.0, 0.0))
    found = summarize(differences, range(len(differences)), seed)
    return found.ci_low, found.ci_high


def sign_test(better: int, worse: int) -> float:
    """Two-sided p of as uneven a split between better and worse by chance; 1 where nothing differs."""
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def _by_sample(rows: Sequence[Row]) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row["score"] is not None:
            scores.setdefault(str(row["sample_id"]), []).append(float(row["score"]))
    return scores


def _mean(values: Sequence[Any]) -> float | None:
    return float(np.mean(values)) if values else None


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The rows as CSV; None is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([{name: row[name] for name in columns} for row in rows])
    return text.getvalue()
