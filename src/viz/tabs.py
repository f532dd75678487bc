"""The tabs of the app. What a file says is shown by st.text, st.code and tables: elsewhere it would be Markdown."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import streamlit as st

from src.common.score_plot import score_by_layer
from src.viz import charts, data, numbers

ENTROPIES = ("avg_entropy", "avg_entropy_output", "avg_entropy_thinking")
MASSES = ("avg_top_k_mass", "avg_top_k_mass_output", "avg_top_k_mass_thinking")
THINKING = ("num_thinking_tokens", "think_end_position")
MOST_ROWS = 1000
"""Rows on one page of a table; the browser holds them all."""


def measure_tab(rows: pd.DataFrame, measures: Sequence[str], key: str) -> None:
    """Distribution of a measure by group, its statistics, and the way down to single responses."""
    known = data.numeric(rows)
    there = [name for name in measures if name in known]
    if not there:
        st.info("No row that is chosen has a value here.")
        return
    left, middle, right = st.columns(3)
    measure = left.selectbox("Measure", there, format_func=charts.title_of, key=f"{key} measure")
    groups = data.groups_in(rows)
    by = middle.selectbox("By", groups, index=groups.index(data.first_group(groups)), key=f"{key} by")
    kind = right.radio("Chart", ["box", "violin"], horizontal=True, key=f"{key} kind")
    _chart(rows, by, measure, kind, f"{key} chart")
    _drill_down(rows, by, measure, kind, key)


def _chart(rows: pd.DataFrame, by: str, measure: str, kind: str, key: str) -> None:
    table = numbers.group_statistics(rows, by, measure)
    draw = charts.boxes if kind == "box" else charts.violins
    st.plotly_chart(draw(rows, by, measure), key=key)
    n_groups = table[by].nunique()
    if n_groups > charts.MOST_GROUPS:
        st.text(f"the chart shows the {charts.MOST_GROUPS} groups with the lowest means of {n_groups}")
    with st.expander("Mean, standard deviation, median"):
        st.dataframe(table, hide_index=True)


def _drill_down(rows: pd.DataFrame, by: str, measure: str, kind: str, key: str) -> None:
    """One group, then within it one persona or arm, then one response."""
    some = _narrowed(rows, by, f"{key} group")
    if some is None:
        return
    finer = next((name for name in ("persona", "arm") if name != by and name in data.groups_in(some)), None)
    if finer:
        _chart(some, finer, measure, kind, f"{key} finer chart")
        some = _narrowed(some, finer, f"{key} finer")
        if some is None:
            return
    shown = [name for name in ("prompt", measure, "num_tokens", "response") if name in some]
    table = some[some[measure].notna()].sort_values(measure)[shown].head(MOST_ROWS)
    st.text("choose a row to read the whole response")
    picked = st.dataframe(table, hide_index=True, on_select="rerun", selection_mode="single-row", key=f"{key} rows")
    for number in picked.selection.rows:
        _read(some.loc[table.index[number]])


def _narrowed(rows: pd.DataFrame, by: str, key: str) -> pd.DataFrame | None:
    names = data.labels(rows, by)
    name = st.selectbox(f"Look into one {by}", sorted(names.unique()), index=None, key=key)
    return None if name is None else rows[names == name]


def _read(row: pd.Series) -> None:
    for name in ("system_prompt", "prompt", "thinking", "response"):
        if name in row and isinstance(row[name], str):
            st.text(name.replace("_", " "))
            st.code(row[name], language=None, wrap_lines=True)


def correlations_tab(rows: pd.DataFrame) -> None:
    """Pearson's r and p of the chosen measures."""
    names = data.numeric(rows)
    known = [name for name in charts.MEASURES if name in names]
    picked = st.multiselect("Measures", names, default=known[:6], format_func=charts.title_of, key="correlated")
    if len(picked) < 2 or rows.empty:
        st.info("Choose at least two measures, and rows that have them.")
        return
    table = numbers.correlations(rows, picked)
    st.plotly_chart(charts.heat(table), key="heat")
    with st.expander("Pearson's r and p", expanded=True):
        st.text("p takes rows for independent; rows of one prompt or persona are not")
        st.dataframe(table, hide_index=True, column_config={"p": st.column_config.NumberColumn(format="%.3g")})
    left, middle, right = st.columns(3)
    x = left.selectbox("Across", picked, format_func=charts.title_of, key="scatter x")
    y = middle.selectbox("Up", picked, index=1, format_func=charts.title_of, key="scatter y")
    by = right.selectbox("Colour", data.groups_in(rows), key="scatter by")
    st.plotly_chart(charts.points(rows, x, y, by), key="scatter")
    _statistics(rows, by, [x, y])


def _statistics(rows: pd.DataFrame, by: str, measures: Sequence[str]) -> None:
    with st.expander("Mean, standard deviation, median"):
        for measure in dict.fromkeys(measures):
            st.text(charts.title_of(measure))
            st.dataframe(numbers.group_statistics(rows, by, measure), hide_index=True)


def compare_tab(rows: pd.DataFrame) -> None:
    """Two groups, prompt by prompt."""
    measures = data.numeric(rows)
    groups = [name for name in data.groups_in(rows) if rows[name].nunique(dropna=False) > 1]
    if not measures or not groups or "prompt" not in rows:
        st.info("There is nothing to compare: choose two runs, or rows of several categories, personas or arms.")
        return
    columns = st.columns(4)
    by = columns[0].selectbox("Compare", groups, key="compare by")
    names = data.labels(rows, by)
    values = sorted(names.unique())
    first = columns[1].selectbox("First", values, key="compare first")
    second = columns[2].selectbox("Second", values, index=1, key="compare second")
    known = [name for name in charts.MEASURES if name in measures] or measures
    measure = columns[3].selectbox("Measure", known, format_func=charts.title_of, key="compare measure")
    sides = [rows[names == name] for name in (first, second)]
    within = numbers.pair_within(rows, by)
    found = numbers.paired_differences(*sides, measure, within)
    st.text(f"pairs have the same {', '.join(['prompt', *within])}")
    if found.summary is None:
        st.info("There is no pair: nothing that both have has a value.")
        return
    _say_difference(found)
    st.plotly_chart(charts.differences(found.pairs, measure, first, second), key="differences")
    with st.expander("Mean, standard deviation, median"):
        st.dataframe(numbers.group_statistics(pd.concat(sides), by, measure), hide_index=True)
    with st.expander("Pair by pair, an answer of each"):
        pairs = found.pairs.sort_values("difference").head(MOST_ROWS)
        st.dataframe(numbers.with_texts(pairs, *sides, within), hide_index=True)


def _say_difference(found: numbers.Paired) -> None:
    summary = found.summary
    interval = "one prompt gives no interval"
    if summary.ci_low is not None:
        interval = f"95 % interval {summary.ci_low:.4g} to {summary.ci_high:.4g} (bootstrap over prompts)"
    spread = "" if summary.std is None else f", standard deviation {summary.std:.4g}"
    st.text(f"mean difference, first − second: {summary.mean:.4g}, {interval}{spread}, {summary.n} pairs")
    if found.n_alone:
        st.text(f"{found.n_alone} more are in one of the two only and are left out")


def dose_tab(rows: pd.DataFrame) -> None:
    """Means by coefficient, beside the random control."""
    if "coefficient" not in data.numeric(rows) or rows["coefficient"].nunique() < 2:
        st.info("Choose a run of src.steer or src.evaluate with several coefficients.")
        return
    names = [name for name in data.numeric(rows) if name != "coefficient"]
    known = [name for name in ("mean_projection", "kl_per_token", *charts.MEASURES) if name in names]
    measure = st.selectbox("Measure", dict.fromkeys([*known, *names]), format_func=charts.title_of, key="dose measure")
    table = numbers.dose_response(rows, measure)
    st.plotly_chart(charts.doses(table, measure), key="doses")
    with st.expander("Mean, standard deviation, median"):
        by = "arm" if "arm" in rows else "coefficient"
        st.dataframe(numbers.group_statistics(rows, by, measure), hide_index=True)
        st.dataframe(table, hide_index=True)


def directions_tab(scores: dict[str, list[dict[str, Any]]]) -> None:
    """Scores by layer of every chosen run that has directions."""
    if not scores:
        st.info("Choose a run of src.extract_directions.")
    for number, (run, rows) in enumerate(scores.items()):
        st.text(run)
        st.plotly_chart(score_by_layer(rows), key=f"scores {number}")
        table = pd.DataFrame(rows)
        with st.expander("Mean, standard deviation, median over layers"):
            measured = table[data.numeric(table)].agg(["mean", "std", "median"]).T.reset_index()
            st.dataframe(measured.rename(columns={"index": "score", "std": "standard deviation"}), hide_index=True)
        with st.expander("All scores"):
            st.dataframe(table, hide_index=True)


def raw_tab(rows: pd.DataFrame) -> None:
    """The rows themselves, a page at a time; the download has them all."""
    names = [str(name) for name in rows.columns]
    likely = ("run", "persona", "category", "arm", "prompt", "response", "avg_entropy", "avg_top_k_mass", "num_tokens")
    default = [name for name in likely if name in names] or names[:8]
    columns = st.multiselect("Columns", names, default=default, key="columns")
    word = st.text_input("Rows whose prompt or response holds", key="word")
    for_text = [name for name in ("prompt", "response") if name in rows]
    if word and for_text:
        holds = [rows[name].fillna("").str.contains(word, case=False, regex=False) for name in for_text]
        rows = rows[pd.concat(holds, axis=1).any(axis=1)]
    if not columns or rows.empty:
        st.info("Nothing to show: no column or no row is chosen.")
        return
    pages = -(-len(rows) // MOST_ROWS)
    page = st.number_input(f"Page of {pages}", 1, pages, key="page") if pages > 1 else 1
    shown = rows[columns].iloc[(page - 1) * MOST_ROWS : page * MOST_ROWS]
    st.dataframe(shown, hide_index=True)
    as_csv = lambda: rows[columns].to_csv(index=False).encode()  # noqa: E731
    st.download_button(f"Download these {len(rows):,} rows as CSV", as_csv, file_name="rows.csv", mime="text/csv")
