"""
vLLM engines one after another in a process of their own, for tests: reads jobs (JSON) from stdin, writes what each
gave. A job: {"config", "engine_args", "requests", "top_k", "patch"}; `patch` breaks something on purpose.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import psutil

from src.common.engine_config import EngineConfigBase
from src.common.errors import CheckFailed, InputError
from src.models.types import GenerationRequest, GenerationResult


def run_jobs(jobs: list[dict], root: Path, timeout: float = 500) -> list[dict]:
    """Run the jobs in a new process, which must leave no socket behind, and return what each gave."""
    # Not pytest's folder: a socket's path must be short.
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.run(
            [sys.executable, "-m", "tests.vllm_process"], input=json.dumps(jobs), cwd=root, text=True,
            capture_output=True, timeout=timeout, env=os.environ | {"TMPDIR": folder},
        )  # fmt: skip
        assert not [path for path in Path(folder).rglob("*") if path.is_socket()]
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.strip().splitlines()[-1])


def results_of(job: dict) -> list[GenerationResult]:
    """The results of a job that had no error, as the engine's own type."""
    assert "error" not in job, job["error"]
    tuples = ("token_ids", "entropy", "top_k_mass")
    return [GenerationResult(**(row | {name: tuple(row[name]) for name in tuples})) for row in job["results"]]


@contextlib.contextmanager
def broken(patch: str | None) -> Iterator[None]:
    """Take out one part, as a change of vLLM might."""
    from src.models.vllm_adapter import Adapter
    from src.models.vllm_worker import TillerWorker

    if patch == "sampler":
        with mock.patch.object(TillerWorker, "tiller_install", lambda self: "v1"):
            yield
    elif patch == "adapter":
        with mock.patch.object(Adapter, "request", lambda self: None):
            yield
    else:
        assert patch is None, patch
        yield


def run_job(job: dict) -> dict:
    from src.models.language_model import generate_all
    from src.models.vllm_engine import VLLMEngine
    from src.models.vllm_process import segments_of

    requests = [
        GenerationRequest(**{k: tuple(v) if isinstance(v, list) else v for k, v in request.items()})
        for request in job.get("requests", [])
    ]
    config = EngineConfigBase(**({"output_dir": Path("unused"), "device": "cpu", "kv_cache_gib": 0.25} | job["config"]))
    preempted = []
    try:
        with broken(job.get("patch")), VLLMEngine.load(config, **job.get("engine_args", {})) as engine:
            scheduler = engine._engine.engine_core.engine_core.scheduler
            plain = scheduler._preempt_request
            scheduler._preempt_request = lambda request, *a, **k: (preempted.append(request), plain(request, *a, **k))
            results = generate_all(engine, requests, top_k=job.get("top_k", 5))
            facts, room, segments = engine.facts, engine.room, segments_of(engine._engine)
    except (InputError, CheckFailed) as error:
        return {"error": [type(error).__name__, str(error)]}
    return {
        "results": [asdict(r) for r in results], "facts": facts, "room": room, "preemptions": len(preempted),
        "segments": [path.name for path in segments],
    }  # fmt: skip


def main() -> None:
    shared_before = set(os.listdir("/dev/shm"))
    answers = []
    for job in json.load(sys.stdin):
        answers.append(run_job(job))
        # multiprocessing's own bookkeeper lives as long as the process does.
        children = [
            c.cmdline() for c in psutil.Process().children(recursive=True) if c.status() != psutil.STATUS_ZOMBIE
        ]
        answers[-1]["children"] = [words for words in children if "resource_tracker" not in " ".join(words)]
        answers[-1]["shared_memory"] = sorted(set(os.listdir("/dev/shm")) - shared_before)
    print()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
