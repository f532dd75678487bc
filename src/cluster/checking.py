"""What a cluster needs for an experiment, and whether it is there."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from src.cluster import slurm
from src.cluster.records import CLUSTER, cluster_settings

Finding = tuple[bool, str]
TIMEOUT = 300
PROBE = "#!/bin/sh\n#SBATCH --time=1\ntrue\n"


def findings(root: Path) -> list[Finding]:
    """Whether it is there, and in words what it is or what to do."""
    settings = cluster_settings(root)
    found = [_slurm(), _controller()] if slurm.is_here() else [_slurm()]
    example = CLUSTER.with_name("cluster.example.toml")
    told = "read" if settings else f"not there; copy {example} to it and keep what applies"
    found.append((bool(settings), f"{CLUSTER}: {told}"))
    if slurm.is_here():
        found.append(_probe(root, settings))
    container = settings.get("container") or []
    if container:
        is_there = shutil.which(container[0]) is not None
        found.append((is_there, f"container: {container[0]} {'found' if is_there else 'not found: load its module'}"))
        images = [word for word in container if word.endswith((".sif", ".img"))]
        found += [(Path(image).exists(), f"image {image}") for image in images]
    found.append(_runner(root, settings))
    if settings.get("cache_dir"):
        folder = Path(settings["cache_dir"])
        near = next(each for each in (folder, *folder.parents) if each.exists())
        free = shutil.disk_usage(near).free / 1e9
        found.append((os.access(near, os.W_OK), f"cache_dir {folder}: {free:.0f} GB free, "
                      f"{'can be written' if os.access(near, os.W_OK) else 'cannot be written'}"))  # fmt: skip
    return found


def _slurm() -> Finding:
    return slurm.is_here(), "sbatch" if slurm.is_here() else "sbatch: no SLURM here; `submit --local` needs none"


def _controller() -> Finding:
    answers = slurm.answers()
    return answers, "SLURM's controller answers" if answers else "SLURM's controller does not answer (scontrol ping)"


def _probe(root: Path, settings: dict) -> Finding:
    words = [f"--{name}={settings[name]}" for name in ("account", "partition", "constraint") if settings.get(name)]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "probe.sh"
        script.write_text(PROBE)
        refusal = slurm.refusal(script, words, root)
    told = " ".join(words) or "no account or partition named"
    return refusal is None, f"a job is taken ({told})" if refusal is None else f"a job is refused ({told}): {refusal}"


def _runner(root: Path, settings: dict) -> Finding:
    runner = settings.get("runner") or ["uv", "run", "--no-sync"]
    told = f"runner {' '.join(runner)}"
    # Imports torch, and does nothing.
    words = [*(settings.get("container") or []), *runner, "-m", "torch.version"]
    try:
        done = subprocess.run(
            words, cwd=root, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return False, f"{told}: {error}"
    if done.returncode:
        return False, f"{told}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}"
    return True, f"{told}: starts, and finds torch"
