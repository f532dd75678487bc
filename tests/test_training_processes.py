"""Several processes on one training: the numbers of one process, sharded or not, stopped and resumed or not."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from src.common.errors import InputError
from src.training.launching import COUNT, from_launcher
from src.training.processes import together
from tests.conftest import ROOT
from tests.test_finetune import (
    DROPOUT,
    WORDS,
    arguments,
    dataset,  # noqa: F401 (a fixture)
    files_of,
    logits_of,
    rows_of,
    run_apart,
    run_here,
    same_tensors,
    start,
    tensors_of,
    wait_for_step,
)

# 14 rows in batches of 4: the last of an epoch has 2, and a step of it only one batch.
BATCHES = ["--batch_size", "4", "--gradient_accumulation", "2", "--validate_every", "1"]
TWO = ["--num_processes", "2"]


def assert_same_numbers(first: Path, second: Path) -> None:
    """Up to rounding: losses of every step, and the adapter's tensors."""
    for one, other in zip(rows_of(first), rows_of(second), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-4)
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], abs=2e-4)
        assert (one["tokens"], one["learning_rate"]) == (other["tokens"], other["learning_rate"])
    for name, tensor in tensors_of(first).items():
        assert torch.allclose(tensor, tensors_of(second)[name], atol=2e-4), name


@pytest.fixture(scope="module")
def shared(dataset: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A run of two processes. Each starts apart: vLLM, where it runs in this one, has a group of its own."""
    return run_apart(dataset, tiny_folder, tmp_path_factory.mktemp("runs") / "shared", *BATCHES, *TWO)


def test_two_processes_are_as_one(shared: Path, dataset: Path, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    alone = run_here(dataset, tiny_folder, tmp_path / "alone", *BATCHES)
    assert_same_numbers(alone, shared)
    assert files_of(alone) == files_of(shared)


def test_sharded_weights_are_as_whole_ones(
    shared: Path,
    dataset: Path,  # noqa: F811
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    spread = run_apart(dataset, tiny_folder, tmp_path / "spread", *BATCHES, *TWO, "--shard_weights")
    assert_same_numbers(shared, spread)
    assert files_of(shared) == files_of(spread)
    assert (logits_of(tiny_folder, spread / "epoch_1") - logits_of(tiny_folder, shared / "epoch_1")).abs().max() < 1e-3


@pytest.mark.slow
def test_two_processes_are_as_one_on_preferences(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": word, "chosen": word.upper(), "rejected": f"{word}, {word}."} for word in WORDS.split()[:7]]
    (tmp_path / "folder").mkdir()
    for split in ("train", "validation"):
        path = tmp_path / "folder" / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Batches of two, and one of one, of which the second process has none.
    words = ["--objective", "dpo", "--validate_every", "1"]
    alone = run_here(path.parent, tiny_folder, tmp_path / "alone", *words)
    assert_same_numbers(alone, run_apart(path.parent, tiny_folder, tmp_path / "shared", *words, *TWO))


LONG = [*BATCHES, *DROPOUT, *TWO, "--shard_weights", "--epochs", "20", "--save_last_epoch_only"]


@pytest.mark.slow
def test_stopped_and_resumed_is_uninterrupted(dataset: Path, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    whole = run_apart(dataset, tiny_folder, tmp_path / "whole", *LONG)
    folder = tmp_path / "stopped"
    process = start(dataset, tiny_folder, folder, *LONG)
    wait_for_step(folder, 3, process)
    # A scheduler signals every process of a job, and more than once.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        for each in (psutil.Process(process.pid), *psutil.Process(process.pid).children()):
            each.send_signal(number)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 75, said
    assert 3 <= len(rows_of(folder)) < len(rows_of(whole))
    run_apart(dataset, tiny_folder, folder, *LONG)
    assert same_tensors(whole, folder, 19)
    assert [row["loss"] for row in rows_of(whole)] == [row["loss"] for row in rows_of(folder)]
    assert [row["validation_loss"] for row in rows_of(whole)] == [row["validation_loss"] for row in rows_of(folder)]


@pytest.mark.slow
def test_no_process_is_left_and_a_lost_one_is_said(dataset: Path, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    words = [*BATCHES, *TWO, "--epochs", "200", "--save_last_epoch_only"]
    lost = start(dataset, tiny_folder, tmp_path / "lost", *words)
    wait_for_step(tmp_path / "lost", 1, lost)
    other_of(lost).kill()
    _, said = lost.communicate(timeout=600)
    assert lost.returncode == 1 and "ended with exit code -9" in said
    killed = start(dataset, tiny_folder, tmp_path / "killed", *words)
    wait_for_step(tmp_path / "killed", 1, killed)
    other = other_of(killed)
    killed.kill()
    killed.communicate(timeout=600)
    assert other.wait(timeout=60) is not None or not other.is_running()


def other_of(process: subprocess.Popen) -> psutil.Process:
    """The process beside the first one of a training."""
    (other,) = [
        each for each in psutil.Process(process.pid).children() if "resource_tracker" not in " ".join(each.cmdline())
    ]
    return other


def test_processes_of_torchrun_are_as_those_started_here(
    shared: Path,
    dataset: Path,  # noqa: F811
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    words = arguments(dataset, tiny_folder, tmp_path / "run", *BATCHES, *TWO)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    # The second time there is nothing left to do, and neither waits for the other.
    for _ in range(2):
        done = subprocess.run([*torchrun, "-m", "src.finetune", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert_same_numbers(shared, tmp_path / "run")
    assert files_of(shared) == files_of(tmp_path / "run")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ranks(words: list[str]) -> list[subprocess.Popen]:
    """Two processes as srun starts them by hpc/rank.sh, on two nodes."""
    found, port = [], free_port()
    for rank in (0, 1):
        about = {"SLURM_PROCID": rank, "SLURM_NTASKS": 2, "SLURM_LOCALID": 0, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
        about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in about.items()}}
        command = ["bash", "hpc/rank.sh", sys.executable, "-m", "src.finetune", *words]
        found.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    return found


@pytest.mark.slow
def test_launched_processes_stop_and_go_on_together(dataset: Path, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    # srun's own code, the highest, is that of the first, since it is the only one that is not 0.
    for folder, codes in ((whole, [0, 0]), (stopped, [75, 0]), (stopped, [0, 0])):
        both = ranks(arguments(dataset, tiny_folder, folder, *LONG))
        if codes[0]:
            wait_for_step(folder, 3, both[0])
            for process in both:
                process.send_signal(signal.SIGUSR1)
        said = [process.communicate(timeout=600)[1] for process in both]
        assert [process.returncode for process in both] == codes, said
    assert same_tensors(whole, stopped, 19)
    assert [row["loss"] for row in rows_of(whole)] == [row["loss"] for row in rows_of(stopped)]
    sessions = json.loads((stopped / "provenance.json").read_text())["sessions"]
    assert [each["outcome"] for each in sessions] == ["stopped", "done"]


@pytest.mark.slow
def test_what_is_wrong_ends_all_launched_processes(dataset: Path, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "somebody's").mkdir()
    (tmp_path / "somebody's" / "file").touch()
    both = ranks(arguments(dataset, tiny_folder, tmp_path / "somebody's", *BATCHES, *TWO))
    said = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [2, 0] and "it has no config.json but holds file" in said[0]


def test_a_launcher_is_understood_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_launcher(2) is None
    about = {"RANK": "3", COUNT: "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**about, "MASTER_ADDR": "node-1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"--num_processes 1: WORLD_SIZE is 4.*give --num_processes 4"):
        from_launcher(1)
    with pytest.raises(InputError, match="WORLD_SIZE is 4, but MASTER_PORT is not set"):
        from_launcher(4)
    monkeypatch.setenv("MASTER_PORT", "29500")
    place = from_launcher(4)
    assert (place.rank, place.size, place.local_rank, place.local_size) == (3, 4, 1, 2)
    assert place.meeting == "tcp://node-1:29500" and not set(about) & set(os.environ)


def test_what_processes_have_in_common(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "tests.process_work", tmp_path], cwd=ROOT, check=True, timeout=300)
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert first[:4] == second[:4]
    assert first[0] == [[1.0, 2.0], [[3.0, 3.0, 3.0]]] and first[1:4] == [[0.0], [1.5, 2.0], [True, False, 1]]
    assert (first[4], second[4]) == ([0, 2, 4], [1, 3]) and first[5] != second[5]


def test_one_process_alone_adds_nothing() -> None:
    with together(1, False, print) as group:
        before = torch.get_rng_state()
        group.seed(1)
        assert torch.equal(before, torch.get_rng_state())
        assert group.sums(1.5) == [1.5] and group.any(True) and not group.any(False) and group.share(2) == [0, 1]


BAD = {
    "--num_processes 0": "--num_processes 0: expected at least 1",
    "--num_processes 3": "more than the 2 of --batch_size",
    "--shard_weights": "--shard_weights needs several --num_processes",
    "--shard_weights --num_processes 2 --objective dpo": "--shard_weights needs",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_settings_are_one_line(options: str, dataset: Path, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(InputError, match=BAD[options]):
        run_here(dataset, tiny_folder, tmp_path / "run", *options.split())
