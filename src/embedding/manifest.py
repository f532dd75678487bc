"""manifest.json: what the sidecars of a folder say together. It can be made again from them at any time."""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.common.errors import InputError
from src.common.files import write_json_atomic
from src.common.jsonl import round_measured
from src.common.provenance import git_state, now, package_versions
from src.common.run_folder import refuse_differences
from src.embedding.shards import PATTERN, read_sidecar

MANIFEST, LOCK = "manifest.json", ".manifest.lock"
FILES = ("shard-*", ".shard-*", MANIFEST, LOCK)
"""What an embedding run leaves in its folder beside the files of every run."""
OF_SHARDS = (
    "shard", "index", "row_start", "row_stop", "rows", "bad_rows", "sampled_out", "truncated", "bytes", "sha256", "dim",
    "precision", "coefficient", "norm_min", "norm_max", "created_at", "run_id",
)  # fmt: skip


def sidecars_of(folder: Path) -> list[dict[str, Any]]:
    """The sidecars in a folder by their index; what cannot be read as one is left out, its shard is made again."""
    found = [sidecar for path in folder.glob(PATTERN) if (sidecar := read_sidecar(path)) is not None]
    return sorted(found, key=lambda sidecar: sidecar["index"])


def refuse_other_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises InputError, naming the settings and both values, where a shard was made with others."""
    for sidecar in sidecars_of(folder):
        refuse_differences(folder, sidecar["settings"], settings)


def write_manifest(folder: Path, run_id: str, worker: str, verification: Mapping[str, Any] | None) -> dict[str, Any]:
    """
    Makes and returns the manifest; `verification`: what this worker found, {"failed": why} or None for nothing, beside
    what its fellows did. A folder with a failure is not complete. One process at a time, so that the last of several
    workers has the last word.
    """
    with (folder / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _earlier_verification(folder / MANIFEST, worker) | {worker: verification}
        manifest = make_manifest(folder) | {"verification": found, "run_id": run_id, "created_at": now()}
        manifest["complete"] &= not failures(manifest)
        write_json_atomic(folder / MANIFEST, manifest)
    return manifest


def failures(manifest: Mapping[str, Any]) -> list[str]:
    """Why workers' verifications failed."""
    found = (manifest.get("verification") or {}).values()
    return [each["failed"] for each in found if each and "failed" in each]


def _earlier_verification(path: Path, worker: str) -> dict[str, Any]:
    """What this worker and its fellows, one of as many, found before."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    found = earlier.get("verification") if isinstance(earlier, dict) else None
    count = worker.rpartition("-of-")[2]
    entries = found.items() if isinstance(found, dict) else []
    return {name: each for name, each in entries if name.rpartition("-of-")[2] == count}


def make_manifest(folder: Path) -> dict[str, Any]:
    """The fold of the sidecars. Raises InputError where there are none, or where they are of different settings."""
    sidecars = sidecars_of(folder)
    if not sidecars:
        raise InputError(f"{folder}: no shard with its sidecar in it; expected a folder of src.embed_dataset")
    settings = sidecars[0]["settings"]
    refuse_other_settings(folder, settings)
    present = {sidecar["index"] for sidecar in sidecars}
    missing = sorted(set(range(max(present) + 1)) - present)
    tokens = _sum(sidecars, "tokens")
    busy = sum(sidecar["stages"]["encode"]["busy"] for sidecar in sidecars)
    computed = _sum(sidecars, "padded_tokens")
    return {
        "complete": not missing and sidecars[-1]["is_last"],
        "missing": missing,
        "rows": _sum(sidecars, "rows"),
        "dataset_rows": _sum(sidecars, "row_stop") - _sum(sidecars, "row_start"),
        "bad_rows": _sum(sidecars, "bad_rows"),
        "truncated": _sum(sidecars, "truncated"),
        "dim": sidecars[0]["dim"],
        "precision": sidecars[0]["precision"],
        "settings": settings,
        "sampling": {"seed": settings["seed"], "fraction": settings["fraction"], "num_rows": settings["num_rows"],
                     "left_out": _sum(sidecars, "sampled_out")},
        "tokens": tokens,
        "tokens_per_second": round_measured((tokens or computed) / busy) if busy else None,
        "padding_share": round_measured(1 - tokens / computed) if tokens and computed else None,
        "stages": {stage: _stage_seconds(sidecars, stage) for stage in ("load", "encode", "write")},
        "git": git_state(),
        "packages": package_versions(),
        "shards": [{name: sidecar.get(name) for name in OF_SHARDS} for sidecar in sidecars],
    }  # fmt: skip


def _sum(sidecars: list[dict[str, Any]], name: str) -> int:
    return sum(sidecar.get(name) or 0 for sidecar in sidecars)


def _stage_seconds(sidecars: list[dict[str, Any]], stage: str) -> dict[str, float]:
    return {kind: round(sum(sidecar["stages"][stage][kind] for sidecar in sidecars), 4) for kind in ("busy", "idle")}
