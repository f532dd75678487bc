"""What the app says in numbers: group statistics, correlations, paired differences, dose and response."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
from scipy import stats

from src.models.arms import CONTROL_SUFFIX
from src.ops.statistics import Summary, summarize
from src.viz import data

SEED = 42
PAIRED_WITHIN = ("run", "task", "model_id", "persona", "arm")


def group_statistics(frame: pd.DataFrame, by: str, measure: str) -> pd.DataFrame:
    """
    Rows with a value, mean, sample standard deviation and median of `measure`, a row a group, the lowest first; runs,
    tasks, models and arms are groups of their own where there are several.
    """
    names = [*data.apart(frame, by), by]
    keyed = frame[[measure]].assign(**{name: data.labels(frame, name) for name in names})
    table = keyed.groupby(names)[measure].agg(["count", "mean", "std", "median"])
    table = table[table["count"] > 0].sort_values("mean").reset_index()
    return table.rename(columns={"count": "n", "std": "standard deviation"})


def correlations(frame: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """
    Pearson's r of each pair of measures with its two-sided p, over the rows that have both; r and p are missing where
    there are fewer than three or one does not vary. The p takes rows for independent.
    """
    rows = []
    for i, first in enumerate(measures):
        for second in measures[i + 1 :]:
            both = frame[[first, second]].dropna().astype(float)
            varies = len(both) >= 3 and both[first].nunique() > 1 and both[second].nunique() > 1
            found = stats.pearsonr(both[first], both[second]) if varies else None
            rows.append(
                {
                    "first": first,
                    "second": second,
                    "r": None if found is None else float(found.statistic),
                    "p": None if found is None else float(found.pvalue),
                    "n": len(both),
                }
            )
    return pd.DataFrame(rows, columns=["first", "second", "r", "p", "n"])


class Paired(NamedTuple):
    """Differences first − second, pair by pair."""

    summary: Summary | None
    """None when there is no pair."""
    pairs: pd.DataFrame
    """Columns cluster, prompt, turn, those of `within`, first, second, difference."""
    n_alone: int
    """Prompts, with their turn and `within`, that only one of the two has."""


def pair_within(frame: pd.DataFrame, by: str) -> list[str]:
    """
    Columns besides the prompt that must be the same on both sides when groups of `by` are compared, so that no
    difference between personas is taken for one between runs. Categories have personas of their own.
    """
    free = {by, "persona"} if by == "category" else {by}
    return [name for name in PAIRED_WITHIN if name in frame and name not in free]


def paired_differences(first: pd.DataFrame, second: pd.DataFrame, measure: str, within: Sequence[str] = ()) -> Paired:
    """
    The mean of `measure` for each prompt, turn and value of `within` that both have, and the differences with the
    bootstrap's 95 % interval, the pairs of one prompt being one cluster.

    Prompts are the same when their texts are, whatever their ids; rows without a value are left out.
    """
    sides = {"first": first, "second": second}
    means = [_means(rows, measure, within).rename(columns={measure: name}) for name, rows in sides.items()]
    both = means[0].join(means[1], how="inner")
    table = both.assign(difference=both["first"] - both["second"]).reset_index()
    summary = summarize(table["difference"].tolist(), table["cluster"].tolist(), SEED)
    n_alone = sum(len(each) for each in means) - 2 * len(both)
    return Paired(summary, table, n_alone)


def with_texts(pairs: pd.DataFrame, first: pd.DataFrame, second: pd.DataFrame, within: Sequence[str]) -> pd.DataFrame:
    """Pairs with one answer of each side to that prompt in that conversation."""
    keys = ["cluster", "prompt", "turn", *within]
    for name, rows in (("response of the first", first), ("response of the second", second)):
        if "response" in rows:
            texts = _keyed(rows, within).drop_duplicates(keys)[[*keys, "response"]]
            pairs = pairs.merge(texts.rename(columns={"response": name}), on=keys, how="left")
    return pairs.drop(columns="cluster")


def _means(rows: pd.DataFrame, measure: str, within: Sequence[str]) -> pd.DataFrame:
    keyed = _keyed(rows, within)
    valued = keyed[keyed[measure].notna()].astype({measure: float})
    return valued.groupby(["cluster", "prompt", "turn", *within])[[measure]].mean()


def _keyed(rows: pd.DataFrame, within: Sequence[str]) -> pd.DataFrame:
    """The rows with what pairs them: the prompt that their conversation began with (`cluster`), turn, `within`."""
    turns = rows["turn"].fillna(0).astype(int) if "turn" in rows else 0
    # The question of a later turn is the same in all conversations; which prompt one began with, its id tells.
    begun = rows["prompt_id"].astype(str) if "prompt_id" in rows else rows["prompt"]
    keyed = rows.assign(turn=turns, conversation=begun, **{name: data.labels(rows, name) for name in within})
    opening = keyed[keyed["turn"] == 0].drop_duplicates("conversation").set_index("conversation")["prompt"]
    return keyed.assign(cluster=keyed["conversation"].map(opening).fillna(keyed["prompt"]))


def dose_response(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """
    The mean of `measure` at each coefficient with its 95 % interval over prompts, steered rows and random controls
    apart: columns run, control, coefficient, mean, low, high, n. Unsteered rows, coefficient 0, count in both. Tasks
    and models of one run are lines of their own, with their names in `run`.
    """
    rows = frame[frame["coefficient"].notna() & frame[measure].notna()]
    lines = ["run", *(name for name in data.apart(rows, "arm") if name != "run")]
    rows = rows.assign(cluster=rows.get("prompt_id", rows.get("prompt", rows.index)))
    table = []
    for names, of_line in rows.groupby([data.labels(rows, name) for name in lines]):
        control = _is_control(of_line)
        is_reference = of_line["coefficient"] == 0
        for is_control in [False, *([True] if control.any() else [])]:
            some = of_line[(control == is_control) | is_reference]
            for coefficient, dose in some.groupby("coefficient"):
                found = summarize(dose[measure].astype(float).tolist(), dose["cluster"].tolist(), SEED)
                line = " · ".join(name for name in names if name != data.NONE)
                table.append((line, is_control, coefficient, found.mean, found.ci_low, found.ci_high, found.n))
    return pd.DataFrame(table, columns=["run", "control", "coefficient", "mean", "low", "high", "n"])


def _is_control(rows: pd.DataFrame) -> pd.Series:
    """Whether a row is a random control's: what it says itself, else the name of its arm."""
    nothing = pd.Series(None, index=rows.index, dtype=object)
    said = rows.get("control", nothing)
    named = data.labels(rows, "arm").str.endswith(CONTROL_SUFFIX) if "arm" in rows else nothing.notna()
    return named.where(said.isna(), said == True)  # noqa: E712 (anything else, missing values too, is no control)
