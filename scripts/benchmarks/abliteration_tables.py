"""The numbers of scripts/benchmarks/abliteration.py, and their tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from abliteration_rescore import hypervolumes, mean, resampled, with_interval

N_RESAMPLES = 2_000
SIDES = ("ours", "heretic")
BUDGETS = ("equal_trials", "equal_seconds")
ALMOST_GONE = 0.05
"""Share of responses up to which the behaviour counts as removed."""
BAR_SECONDS = 0.5
"""Of heretic's seconds a trial, at most."""


def summary(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    seeds: of each `seed`, `searches` (side → search), `fronts` (side → budget → trials), `scores` (`before` and side →
    trial → scores), `limit` (seconds). Every mean over seeds is of their draws, so that its interval is of the mean.
    """
    volumes = {budget: {side: [] for side in SIDES} for budget in BUDGETS}
    for each in seeds:
        before = each["scores"]["before"]
        draws = resampled(len(before["shown"]), len(before["kl"]), N_RESAMPLES, each["seed"])
        for budget in BUDGETS:
            for side in SIDES:
                chosen = [each["scores"][side][str(number)] for number in each["fronts"][side][budget]]
                volumes[budget][side].append(hypervolumes(chosen, before, draws))
    return {
        "seeds": [one_seed(each, volumes, i) for i, each in enumerate(seeds)],
        "hypervolume": {budget: over_seeds(volumes[budget]) for budget in BUDGETS},
        "seconds": {side: seconds([each["searches"][side] for each in seeds]) for side in SIDES},
    }


def over_seeds(volumes: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    means = {side: np.mean(volumes[side], axis=0) for side in SIDES}
    difference = means["ours"] - means["heretic"]
    return {side: with_interval(draws) for side, draws in means.items()} | {"difference": with_interval(difference)}


def one_seed(each: dict[str, Any], volumes: dict[str, Any], i: int) -> dict[str, Any]:
    before = each["scores"]["before"]
    return {
        "seed": each["seed"], "limit_seconds": each["limit"], "behaviour_before": mean(before, "shown"),
        "n_target": len(before["shown"]), "n_control": len(before["kl"]),
        "hypervolume": {b: over_seeds({side: [volumes[b][side][i]] for side in SIDES}) for b in BUDGETS},
        "n_trials": {b: {side: n_ended(each, side, b) for side in SIDES} for b in BUDGETS},
        "fronts": {side: front_points(each, side) for side in SIDES},
        "least_kl_of_removed": {side: least_kl(front_points(each, side)) for side in SIDES},
    }  # fmt: skip


def n_ended(each: dict[str, Any], side: str, budget: str) -> int:
    trials = each["searches"][side]["trials"]
    return len(trials) if budget == "equal_trials" else sum(trial["ended"] <= each["limit"] for trial in trials)


def front_points(each: dict[str, Any], side: str) -> list[dict[str, Any]]:
    """Of the whole search's front: what the search measured, and what the neutral scorer did."""
    by_id = {trial["id"]: trial for trial in each["searches"][side]["trials"]}
    found = []
    for number in each["fronts"][side]["equal_trials"]:
        scores = each["scores"][side][str(number)]
        measured = {name: mean(scores, field) for name, field in
                    (("behaviour", "shown"), ("kl", "kl"), ("kl_first", "kl_first"))}  # fmt: skip
        found.append({"id": number, **measured, "in_search": {k: by_id[number][k] for k in ("behaviour", "kl")}})
    return found


def least_kl(points: Sequence[dict[str, Any]]) -> float | None:
    """Of the models that hardly show the behaviour any more, on the report's prompts; None where there is none."""
    return min((point["kl"] for point in points if point["behaviour"] <= ALMOST_GONE), default=None)


def seconds(searches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean seconds of a trial, all of it and by stage, of the start, and the greatest memory."""
    trials = [trial for search in searches for trial in search["trials"]]
    stages = dict.fromkeys(stage for trial in trials for stage in trial["stages"])
    return {
        "trial": float(np.mean([trial["seconds"] for trial in trials])),
        "median_trial": float(np.median([trial["seconds"] for trial in trials])),
        "stages": {s: float(np.mean([trial["stages"].get(s, 0.0) for trial in trials])) for s in stages},
        "n_trials": len(trials),
        "n_full": sum(trial["stage"] == "full" for trial in trials),
        "start": float(np.mean([search["start_seconds"] for search in searches])),
        "search": float(np.mean([max(trial["ended"] for trial in search["trials"]) for search in searches])),
        "peak_bytes": max(search["peak_bytes"] for search in searches),
    }


def tables(found: dict[str, Any]) -> str:
    return "\n\n".join([volume_table(found), seconds_table(found["seconds"]), front_table(found), bars(found)]) + "\n"


def volume_table(found: dict[str, Any]) -> str:
    lines = ["| budget | seed | trials: ours, heretic | most possible | ours | heretic | ours − heretic |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for budget in BUDGETS:
        for each in found["seeds"]:
            n = each["n_trials"][budget]
            volume = each["hypervolume"][budget]
            lines.append(
                f"| {budget.replace('_', ' ')} | {each['seed']} | {n['ours']}, {n['heretic']} "
                f"| {each['behaviour_before']:.3f} | {shown(volume)} |"
            )
        lines.append(f"| {budget.replace('_', ' ')} | mean | | | {shown(found['hypervolume'][budget])} |")
    return "Hypervolume on the report's prompts, 95 % interval over prompts:\n\n" + "\n".join(lines)


def shown(volume: dict[str, Any]) -> str:
    return " | ".join(
        f"{value['value']:.4f} [{value['ci_low']:.4f}, {value['ci_high']:.4f}]"
        for value in (volume[name] for name in (*SIDES, "difference"))
    )


def seconds_table(found: dict[str, Any]) -> str:
    lines = ["| side | CPU s a trial (median) | by stage | in full | start, s | search, s | peak GiB |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for side, each in found.items():
        stages = ", ".join(f"{name} {value:.2f}" for name, value in each["stages"].items())
        lines.append(
            f"| {side} | {each['trial']:.2f} ({each['median_trial']:.2f}) | {stages} | {each['n_full']} of "
            f"{each['n_trials']} | {each['start']:.1f} | {each['search']:.0f} | {each['peak_bytes'] / 2**30:.2f} |"
        )
    return "CPU seconds, means over trials and seeds:\n\n" + "\n".join(lines)


def front_table(found: dict[str, Any]) -> str:
    lines = ["| seed | side | trial | behaviour | KL | first token's KL | in the search: behaviour, KL |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for each in found["seeds"]:
        for side in SIDES:
            for point in each["fronts"][side]:
                seen = point["in_search"]
                lines.append(
                    f"| {each['seed']} | {side} | {point['id']} | {point['behaviour']:.3f} | {point['kl']:.4f} "
                    f"| {point['kl_first']:.4f} | {seen['behaviour']:.3f}, {seen['kl']:.4f} |"
                )
    return "Fronts of the whole searches, on the report's prompts:\n\n" + "\n".join(lines)


def bars(found: dict[str, Any]) -> str:
    volume = found["hypervolume"]["equal_trials"]
    ratio = found["seconds"]["ours"]["trial"] / found["seconds"]["heretic"]["trial"]
    better, faster = volume["ours"]["value"] >= volume["heretic"]["value"], ratio <= BAR_SECONDS
    return (
        f"Hypervolume at least heretic's at equal trials: {'yes' if better else 'NO'}. CPU seconds a trial {ratio:.3f} "
        f"of heretic's, bar {BAR_SECONDS}: {'yes' if faster else 'NO'}."
    )
