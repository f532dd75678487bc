"""
The full figures of src.embed_dataset, each check by itself or all in turn:
uv run --extra openvino python scripts/acceptance/embedding.py --output_dir data/experiments/acceptance_embedding \
    --checks kills memory overhead workers slurm openai
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def embed(data: Path, folder: Path, model: Path | str, **settings: object) -> None:
    """The command, in this process."""
    from src.embed_dataset import EmbedDatasetConfig, main

    defaults = {"backend": "st", "verify": 0}
    main(EmbedDatasetConfig(dataset_path=str(data), output_dir=folder, model_id=str(model), **{**defaults, **settings}))


def start(*arguments: object, **settings: object) -> multiprocessing.Process:
    """The command in a process of its own, which has everything imported already."""
    process = multiprocessing.get_context("fork").Process(target=embed, args=arguments, kwargs=settings)
    process.start()
    return process


def write_rows(path: Path, count: int, mean_words: int) -> Path:
    """Made anew only when it is not there."""
    from tests.tiny_embedder import WORDS

    if not path.exists():
        draw = random.Random(0)
        with path.open("w") as file:
            for number in range(count):
                text = " ".join(draw.choices(WORDS, k=draw.randint(1, 2 * mean_words - 1)))
                file.write(json.dumps({"id": str(number), "text": f"{text} {number}"}) + "\n")
    return path


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*.parquet")}


def kills(folder: Path, tiny: Path) -> None:
    """Killed at 20 random moments of its work and run again each time: the same bytes."""
    data, target = write_rows(folder / "rows_20k.jsonl", 20_000, 8), folder / "killed"
    embed(data, folder / "whole", tiny, rows_per_shard=256)
    draw, killed = random.Random(0), 0
    while killed < 20:
        process = start(data, target, tiny, rows_per_shard=256)
        # Loading takes most of a start: the moments are counted from the first sign of work.
        while process.is_alive() and not list(target.glob(".shard-*.tmp")):
            time.sleep(0.001)
        time.sleep(draw.random() * 0.2)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            break
        killed += 1
        print(f"kills: {killed}, {len(shard_bytes(target))} shards there", flush=True)
    embed(data, target, tiny, rows_per_shard=256)
    same = shard_bytes(target) == shard_bytes(folder / "whole")
    print(f"kills: {killed} of a run of {len(shard_bytes(target))} shards; byte-identical: {same}", flush=True)


def memory(folder: Path, tiny: Path, most: int) -> None:
    """Peak memory at 10,000 rows and at many more."""
    peaks = {}
    for count in (10_000, most):
        data = write_rows(folder / f"rows_{count}.jsonl", count, 6)
        target = folder / f"memory_{count}"
        flags = ("--dataset_path", data, "--output_dir", target, "--model_id", tiny, "--verify", 0, "--backend", "st")
        subprocess.run([sys.executable, "-m", "src.embed_dataset", *map(str, flags)], cwd=ROOT, check=True)
        provenance = json.loads((target / "provenance.json").read_text())
        peaks[count] = provenance["sessions"][-1]["peak_memory_mib"]["process"]
        print(f"memory: {count} rows, peak {peaks[count]} MiB", flush=True)
    print(f"memory: ratio {peaks[most] / peaks[10_000]:.3f}", flush=True)


def overhead(folder: Path, model: str, count: int) -> None:
    """CPU seconds of the whole run, from the loaded model on, over those of the encoder alone on the same pieces."""
    from src.embed_dataset import EmbedDatasetConfig
    from src.embedding.backends import load_backend
    from src.embedding.loading import load_shards
    from src.embedding.making import make_shards, stored_settings
    from src.embedding.reading import find_source

    data = write_rows(folder / f"short_{count}.jsonl", count, 6)
    target = folder / "overhead"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    config = EmbedDatasetConfig(dataset_path=str(data), output_dir=target, model_id=model, text_field="text")
    source = find_source(str(data), None, None)
    backend = load_backend(config)
    shards = list(load_shards(source, config, backend.pieces_of, lambda index: True))
    started, wall = time.process_time(), time.perf_counter()
    for shard in shards:
        backend.encoders[0].encode(shard, lambda pieces, tokens: None)
        shard.embeddings = None
    alone, alone_wall = time.process_time() - started, time.perf_counter() - wall
    del shards
    started, wall = time.process_time(), time.perf_counter()
    make_shards(config, source, backend, stored_settings(config, source, source.content(), backend.facts))
    whole, whole_wall = time.process_time() - started, time.perf_counter() - wall
    print(
        f"overhead: {count} rows on {backend.facts['backend']} {backend.facts['dtype']}: encoder alone {alone:.1f} "
        f"CPU-s ({alone_wall:.1f} s), whole {whole:.1f} CPU-s ({whole_wall:.1f} s): {whole / alone:.3f}×"
    )
    stages: dict[str, dict[str, float]] = {}
    for path in sorted(target.glob("shard-*.json")):
        for stage, seconds in json.loads(path.read_text())["stages"].items():
            for kind, value in seconds.items():
                stages.setdefault(stage, {}).setdefault(kind, 0.0)
                stages[stage][kind] += value
    print(f"overhead: stages, wall seconds: {json.dumps(stages)}", flush=True)


def workers(folder: Path, tiny: Path) -> None:
    """Four processes at once against one."""
    data = write_rows(folder / "rows_20k.jsonl", 20_000, 8)
    embed(data, folder / "one", tiny, rows_per_shard=1024)
    four = [start(data, folder / "four", tiny, rows_per_shard=1024, num_workers=4, worker_index=n) for n in range(4)]
    for process in four:
        process.join()
        assert process.exitcode == 0, process.exitcode
    manifests = [json.loads((folder / name / "manifest.json").read_text()) for name in ("one", "four")]
    same = shard_bytes(folder / "one") == shard_bytes(folder / "four")
    complete = [manifest["complete"] for manifest in manifests]
    print(f"workers: 4 processes = 1: {same}; complete: {complete}; rows {[m['rows'] for m in manifests]}", flush=True)


def slurm(folder: Path, tiny: Path) -> None:
    """An array of four jobs of a real SLURM on this machine against one process."""
    from tests.slurm_cluster import slurm_local

    data, repository = write_rows(folder / "rows_20k.jsonl", 20_000, 8), folder / "repository"
    embed(data, folder / "one", tiny, rows_per_shard=1024)
    if not repository.exists():
        repository.mkdir()
        shutil.copytree(ROOT / "hpc", repository / "hpc")
        (repository / "src").symlink_to(ROOT / "src")
        (repository / "hpc" / "cluster.toml").write_text(f'runner = ["{sys.executable}"]\n')
    cluster = folder / "cluster"
    cluster.mkdir(exist_ok=True)
    print(slurm_local("start", cluster).stderr, end="")
    try:
        flags = ("--dataset_path", data, "--output_dir", folder / "array", "--model_id", tiny, "--backend", "st",
                 "--verify", 4, "--rows_per_shard", 1024)  # fmt: skip
        words = ("sbatch", "--wait", "--array=0-3", "--mem=2000", "hpc/run.slurm", "embed_dataset", *map(str, flags))
        environment = {**os.environ, "SLURM_CONF": str(cluster / "slurm.conf")}
        subprocess.run(words, cwd=repository, env=environment, check=True)
    finally:
        slurm_local("stop", cluster)
    manifest = json.loads((folder / "array" / "manifest.json").read_text())
    same = shard_bytes(folder / "one") == shard_bytes(folder / "array")
    print(f"slurm: an array of 4 = 1 process: {same}; complete: {manifest['complete']}; {manifest['rows']} rows; "
          f"verified by {len(manifest['verification'])} workers", flush=True)  # fmt: skip


def openai(folder: Path, count: int = 10_000) -> None:
    """Faults in a tenth of the answers and one kill: every row once, with its own vector."""
    import numpy as np
    import pyarrow.parquet as pq

    from tests.embedding_server import embedding_server, vector_of

    data, target = write_rows(folder / "rows_10000.jsonl", count, 6), folder / "openai"
    with embedding_server(fault_share=0.1) as server:
        more = {"backend": "openai", "base_url": server.address, "execute": True, "rows_per_shard": 100}
        process = start(data, target, "tiny", **more)
        while process.is_alive() and len(list(target.glob("shard-*.json"))) < 40:
            time.sleep(0.01)
        process.kill()
        process.join()
        before = len(list(target.glob("shard-*.json")))
        embed(data, target, "tiny", **more)
        sent, faults, requests = sum(server.texts.values()), server.faults, len(server.requests)
    table = pq.read_table(sorted(target.glob("shard-*.parquet")))
    right = all(
        np.array_equal(np.float32(row["embedding"]), np.float32(vector_of(row["text"]))) for row in table.to_pylist()
    )
    indices = table["row_index"].to_pylist()
    print(
        f"openai: killed after {before} shards, {faults} faults among {faults + requests} requests, {sent} texts sent; "
        f"{len(indices)} rows, each once and in order: {indices == list(range(count))}; right vectors: {right}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--checks", nargs="+", default=["kills", "memory", "overhead", "workers", "slurm", "openai"])
    parser.add_argument("--many_rows", type=int, default=1_000_000)
    parser.add_argument("--short_rows", type=int, default=100_000)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    tiny = arguments.output_dir / "tiny"
    if not tiny.exists():
        from tests.tiny_embedder import save_tiny_embedder

        save_tiny_embedder(tiny)
    checks: dict[str, Callable[[], None]] = {
        "kills": lambda: kills(arguments.output_dir, tiny),
        "memory": lambda: memory(arguments.output_dir, tiny, arguments.many_rows),
        "overhead": lambda: overhead(arguments.output_dir, "bundled:minilm", arguments.short_rows),
        "slurm": lambda: slurm(arguments.output_dir.resolve(), tiny.resolve()),
        "workers": lambda: workers(arguments.output_dir, tiny),
        "openai": lambda: openai(arguments.output_dir),
    }
    for name in arguments.checks:
        checks[name]()


if __name__ == "__main__":
    main()
