"""Whether the runs of an experiment were made from the same things: a table of them says so by standing there."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from src.cluster.states import DONE_STATE, RunState
from src.common.errors import InputError
from src.common.run_folder import read_run

Row = dict[str, Any]


def refuse_other_inputs(states: Sequence[RunState]) -> None:
    """
    Raises InputError where an input file, or the weights under a model's name, were not the same for all finished runs.
    """
    seen: dict[str, tuple[str, RunState]] = {}
    for each in states:
        for what, content in _inputs(each):
            first, other = seen.setdefault(what, (content, each))
            if first != content:
                raise InputError(
                    f"{what}: it was not the same for {other.run.step} {other.run.name} and {each.run.step} "
                    f"{each.run.name}, and their numbers do not belong into one table; remove the folder of the one "
                    f"that is out of date ({other.run.folder} or {each.run.folder}), and of what was made from it, and "
                    f"submit again"
                )


def _inputs(state: RunState) -> Iterator[tuple[str, str]]:
    if state.state == DONE_STATE:
        config, provenance = read_run(Path(state.run.folder))
        yield from provenance["inputs"].items()
        model, fingerprint = config["config"].get("model_id"), provenance.get("model_fingerprint")
        if model and fingerprint:
            yield f"--model_id {json.dumps(model)}", json.dumps(fingerprint, sort_keys=True)


def differences(states: Sequence[RunState]) -> list[Row]:
    """A row for each way in which finished runs were made, code and packages, where there is more than one."""
    runs: dict[str, dict[str, list[str]]] = {}
    for each in states:
        if each.state == DONE_STATE:
            _, provenance = read_run(Path(each.run.folder))
            for session in provenance["sessions"]:
                for what, value in _makings(session):
                    names = runs.setdefault(what, {}).setdefault(value, [])
                    names += [each.run.name] if each.run.name not in names else []
    return [
        {"what": what, "value": value, "runs": len(names), "as": ", ".join(names[:5])}
        for what, values in runs.items() if len(values) > 1 for value, names in values.items()
    ]  # fmt: skip


def _makings(session: Row) -> Iterator[tuple[str, str]]:
    git = session.get("git")
    if git:
        yield "code", f"{git['sha'][:12]}{' with changes' if git['dirty'] else ''}"
    yield from (session.get("packages") or {}).items()
