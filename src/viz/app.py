"""
The Streamlit app over run folders: `uv run -m src.view --app RUN …`, or
`uv run streamlit run src/viz/app.py -- --root data/experiments`. Needs no model and no vLLM.
"""

import argparse
import sys
from pathlib import Path

# Streamlit puts the folder of this file on the path, not the one that the command runs in.
REPOSITORY = str(Path(__file__).resolve().parents[2])
if REPOSITORY not in sys.path:
    sys.path.insert(0, REPOSITORY)

import pandas as pd  # noqa: E402
import streamlit as st  # noqa: E402

from src.common.errors import InputError  # noqa: E402
from src.viz import data, tabs  # noqa: E402

RUNS_IN_ADDRESS = "run"


def main() -> None:
    """The whole page, from the choice of runs to the tabs."""
    st.set_page_config(page_title="Tiller", layout="wide")
    root = _root()
    if root is None:
        st.info("No folder of runs was named.")
        st.code("uv run streamlit run src/viz/app.py -- --root data/experiments", language=None)
        return
    try:
        found = _found(root)
        runs = _chosen_runs(root, found)
        frames = {run: _rows(str(path), *_version(path)) for run in runs if (path := data.results_file(root, run))}
        scores = {run: rows for run in runs if (rows := data.scores(root, run))}
    except InputError as error:
        st.error("The runs cannot be shown:")
        st.code(str(error), language=None, wrap_lines=True)
        return
    st.title("Runs of Tiller")
    st.text(f"{len(runs)} of {len(found.runs)} runs below {root}")
    if not runs:
        st.info("Choose a run on the left.")
        return
    frame = data.together(frames)
    rows = data.chosen(frame, _filters(frame))
    st.text(f"{len(rows):,} of {len(frame):,} rows")
    _show(rows, scores)


@st.cache_data(ttl=10, show_spinner=False)
def _found(root: Path) -> data.Found:
    """Walking a large tree takes longer than a click may; a new run shows after some seconds."""
    return data.find_runs(root)


def _root() -> Path | None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path)
    return parser.parse_args().root


def _chosen_runs(root: Path, found: data.Found) -> list[str]:
    """The runs of the selector, at first those of the page's address. Raises InputError for one that is not there."""
    asked = st.query_params.get_all(RUNS_IN_ADDRESS)
    for name in asked:
        data.inside(root, name)
        if name not in found.runs:
            raise InputError(f"{name}: no run below {root}")
    with st.sidebar:
        if found.n_links:
            st.text(f"{found.n_links} symbolic links to folders are not followed; give their target as --root")
        return st.multiselect("Runs", found.runs, default=asked or found.runs[:1], key="runs")


def _version(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_mtime_ns, about.st_size


@st.cache_resource(max_entries=16, show_spinner="reading the rows …")
def _rows(path: str, changed_at: int, size: int) -> pd.DataFrame:
    """The rows of a file, read once for each state of it. Shared by all pages: never changed in place."""
    return data.read_frame(Path(path))


def _filters(frame: pd.DataFrame) -> dict[str, list[str]]:
    wanted = {}
    with st.sidebar:
        for name in data.groups_in(frame):
            if name != "run":
                values = sorted(data.labels(data.chosen(frame, wanted), name).unique())
                title = name.removesuffix("_id").capitalize()
                wanted[name] = st.multiselect(title, values, placeholder="all", key=f"filter {name}")
    return wanted


def _show(rows: pd.DataFrame, scores: dict[str, list[dict]]) -> None:
    """The tabs; only the open one is computed."""
    show = {
        "Entropy": lambda: tabs.measure_tab(rows, tabs.ENTROPIES, "entropy"),
        "Top-k mass": lambda: tabs.measure_tab(rows, tabs.MASSES, "mass"),
        "Thinking tokens": lambda: tabs.measure_tab(rows, tabs.THINKING, "thinking"),
        "Correlations": lambda: tabs.correlations_tab(rows),
        "Compare": lambda: tabs.compare_tab(rows),
        "Dose–response": lambda: tabs.dose_tab(rows),
        "Directions": lambda: tabs.directions_tab(scores),
        "Raw data": lambda: tabs.raw_tab(rows),
    }
    for tab, content in zip(st.tabs(list(show), on_change="rerun", key="tab"), show.values(), strict=True):
        if tab.open:
            with tab:
                content()


main()
