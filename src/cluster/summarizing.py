"""All runs of an experiment in one table, and what each factor does to each number."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.cluster.alike import differences
from src.cluster.collecting import curves_of, numbers_of
from src.cluster.matrix import PlannedRun
from src.cluster.spec import SEED
from src.cluster.states import DONE_STATE, RunState
from src.common.html_report import facts, page, plot, shown_value, table, text_block
from src.common.jsonl import round_measured
from src.ops.statistics import summarize_few

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Row = dict[str, Any]
FIXED = ("id", "name", "step", "state", "restarts", "seconds", "reason")
ALL_BUT_SEED = "all but seed"
MOST_PLOTS = 6
"""Of a step, of measures that differ between its runs; the page's table has all."""


def summary_rows(states: Sequence[RunState]) -> list[Row]:
    """One row a run, those that did not finish too: what it is, its factors, and its numbers."""
    rows = []
    for each in states:
        run = each.run
        row: Row = {"id": run.id, "name": run.name, "step": run.step, "state": each.state, "restarts": each.restarts,
                    "seconds": each.seconds, "reason": each.reason or None}  # fmt: skip
        row |= {f"factor.{name}": value for name, value in run.factors.items()}
        if each.state == DONE_STATE:
            for name, value in numbers_of(Path(run.folder)).items():
                row[f"result.{name}" if name in row else name] = round_measured(value)
        rows.append(row)
    return rows


def by_factor(rows: Sequence[Row]) -> list[Row]:
    """
    One row a step, measure, factor and level: mean over the runs that finished, its 95 % interval over runs (Student's
    t; none for a single run), how many there are and how many have no such number. A factor with one level is left out.
    Beside single factors, `all but seed` has a level for each combination of the others: there runs differ in nothing
    but their seed, while over a single factor's level they differ in the other factors too.
    """
    found = []
    for step in dict.fromkeys(row["step"] for row in rows):
        some = [row for row in rows if row["step"] == step]
        for factor, levels in _groups(some).items():
            for measure in _measures(some):
                found += [_level(step, measure, factor, level, at) for level, at in levels]
    return found


def _groups(rows: Sequence[Row]) -> dict[str, list[tuple[Any, list[Row]]]]:
    """Factor → its levels, each with its rows."""
    factors = list(dict.fromkeys(key for row in rows for key in row if key.startswith("factor.")))
    others = [factor for factor in factors if factor != f"factor.{SEED}"]
    found = {factor.removeprefix("factor."): _split(rows, [factor]) for factor in factors}
    found = {factor: levels for factor, levels in found.items() if len(levels) > 1}
    if SEED in found and len(found) != 2:
        found[ALL_BUT_SEED] = _split(rows, others)
    return found


def _split(rows: Sequence[Row], factors: Sequence[str]) -> list[tuple[Any, list[Row]]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        # True is no 1, in a factor as in a flag.
        groups.setdefault(tuple((type(row[factor]), row[factor]) for factor in factors), []).append(row)
    if len(factors) == 1:
        return [(values[0][1], some) for values, some in groups.items()]
    names = [factor.removeprefix("factor.") for factor in factors]
    return [
        (" ".join(f"{name}={shown_value(value)}" for name, (_, value) in zip(names, values, strict=True)) or "–", some)
        for values, some in groups.items()
    ]


def _measures(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows if row["state"] == DONE_STATE for name in row)
    return [name for name in names if not name.startswith("factor.") and name not in FIXED]


def _level(step: str, measure: str, factor: str, level: Any, rows: Sequence[Row]) -> Row:
    values = [row[measure] for row in rows if row.get(measure) is not None]
    found = summarize_few(values)
    numbers = found._asdict() if found else {"mean": None, "std": None, "n": 0, "ci_low": None, "ci_high": None}
    return {
        "step": step, "measure": measure, "factor": factor, "level": level, "mean": round_measured(numbers["mean"]),
        "low": round_measured(numbers["ci_low"]), "high": round_measured(numbers["ci_high"]), "runs": numbers["n"],
        "without": len(rows) - numbers["n"],
    }  # fmt: skip


def report(question: str, about: Mapping[str, Any], states: Sequence[RunState], rows: Sequence[Row]) -> str:
    """The page: runs, those that failed with their reasons, every measure by factor, loss curves."""
    effects = by_factor(rows)
    unfinished = [row for row in rows if row["state"] != DONE_STATE]
    sections = [("Experiment", text_block(question) + facts(about))]
    if unfinished:
        factors = list(dict.fromkeys(key for row in unfinished for key in row if key.startswith("factor.")))
        heading = f"{len(unfinished)} of {len(rows)} runs have not finished"
        sections.append((heading, table(unfinished, [*FIXED[1:], *factors])))
    unlike = differences(states)
    if unlike:
        sections.append(("Runs that were not made alike", table(unlike)))
    if effects:
        sections += [(f"{step}: {measure}", plot(_effect(effects, step, measure)))
                     for step, measure in _plotted(rows)]  # fmt: skip
        sections.append(("By factor (mean over runs, 95 % interval over runs by Student's t)", table(effects)))
    curves = {_words(each.run): curves_of(Path(each.run.folder)) for each in states}
    if any(curves.values()):
        sections.append(("Loss", plot(_curves(curves))))
    sections.append(("Runs", table([{k: v for k, v in row.items() if k != "id"} for row in rows])))
    return page(question, sections)


def _plotted(rows: Sequence[Row]) -> list[tuple[str, str]]:
    found = []
    for step in dict.fromkeys(row["step"] for row in rows):
        some = [row for row in rows if row["step"] == step]
        varying = [name for name in _measures(some) if len({row[name] for row in some if name in row}) > 1]
        found += [(step, name) for name in varying[:MOST_PLOTS]]
    return found


def _words(run: PlannedRun) -> str:
    return " ".join((run.step, run.name, *(f"{name}={shown_value(value)}" for name, value in run.factors.items())))


def _effect(effects: Sequence[Row], step: str, measure: str) -> "Figure":
    import plotly.graph_objects as go

    figure = go.Figure()
    some = [row for row in effects if (row["step"], row["measure"]) == (step, measure) and row["mean"] is not None]
    for factor in dict.fromkeys(row["factor"] for row in some):
        at = [row for row in some if row["factor"] == factor]
        ends = [(row["low"], row["high"]) if row["low"] is not None else (row["mean"],) * 2 for row in at]
        figure.add_scatter(
            x=[f"{factor} = {row['level']}" for row in at], y=[row["mean"] for row in at], mode="markers", name=factor,
            error_y={"type": "data", "symmetric": False,
                     "array": [high - row["mean"] for row, (_, high) in zip(at, ends, strict=True)],
                     "arrayminus": [row["mean"] - low for row, (low, _) in zip(at, ends, strict=True)]},
        )  # fmt: skip
    figure.update_layout(yaxis_title=measure, height=360)
    return figure


def _curves(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> "Figure":
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, some in curves.items():
        for measure, points in some.items():
            figure.add_scatter(
                x=[x for x, _ in points], y=[y for _, y in points], name=f"{name}: {measure}",
                mode="lines+markers" if len(points) < 30 else "lines",
            )  # fmt: skip
    figure.update_layout(xaxis_title="step", yaxis_title="loss", height=420)
    return figure
