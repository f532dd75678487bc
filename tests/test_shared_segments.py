"""Tensors through shared memory: what arrives is what was sent, and nothing stays behind."""

import contextlib
import errno
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.common.errors import InputError
from src.models import shared_segments
from src.models.shared_segments import (
    Budget,
    discard_segment,
    open_segment,
    sweep_stale_segments,
    write_segment,
)

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("/dev/shm")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)
GIVE_UP_SECONDS = 60

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm")


def segments() -> set[str]:
    return {path.name for path in FOLDER.glob("tiller-*")}


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = segments()
    yield
    # Of a test running beside this one, a segment may be there for a moment.
    assert not {name for name in segments() - before if name.startswith(f"tiller-{os.getpid()}-")}


def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return open_segment(write_segment(tensors))


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def eventually(holds: Callable[[], bool]) -> None:
    """Waits for what must come; how long it takes is not tested."""
    until = time.monotonic() + GIVE_UP_SECONDS
    while not holds():
        assert time.monotonic() < until, "did not come about"
        time.sleep(0.005)


SHAPES = st.lists(st.integers(0, 5), max_size=3)


@settings(deadline=None, max_examples=60)
@given(
    kinds=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES), st.booleans()), max_size=6), seed=st.integers(0, 2**31)
)
def test_any_tensors_arrive_as_they_were_sent(kinds: list, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sent = {}
    for i, (shape, dtype, transposed) in enumerate(kinds):
        # Any bits, NaN among them; a bool has but two.
        size = [*shape, 1 if dtype == torch.bool else dtype.itemsize]
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, size, generator=draw, dtype=torch.uint8)
        tensor = raw.view(dtype)[..., 0]
        sent[f"{i}.é"] = tensor.T if transposed and tensor.dim() == 2 else tensor
    arrived = moved(sent)
    assert list(arrived) == list(sent)
    for key, tensor in sent.items():
        assert (arrived[key].dtype, arrived[key].shape) == (tensor.dtype, tensor.shape)
        assert bits(arrived[key]) == bits(tensor)
        assert arrived[key].data_ptr() % 64 == 0 or not tensor.numel()


@pytest.mark.gpu
def test_tensors_of_a_gpu_arrive_on_the_cpu() -> None:
    sent = {"a": torch.randn(300, 7, device="cuda").bfloat16(), "b": torch.randn(5, 3, device="cuda").T}
    arrived = moved(sent)
    assert all(tensor.device.type == "cpu" and torch.equal(tensor, sent[key].cpu()) for key, tensor in arrived.items())


def test_the_descriptor_is_plain_data_and_the_tensors_can_be_written_to() -> None:
    descriptor = write_segment({"14.resid_post": torch.ones(3, 2, requires_grad=True), "b": torch.zeros(())})
    again = json.loads(json.dumps(descriptor))
    assert again == descriptor and descriptor["n_bytes"] == 128
    tensors = open_segment(again)
    tensors["14.resid_post"] += 1
    assert tensors["14.resid_post"].tolist() == [[2, 2]] * 3 and tensors["b"] == 0


def test_a_segment_opens_once_and_its_memory_is_gone_with_its_last_tensor() -> None:
    descriptor = write_segment({"a": torch.arange(1000), "b": torch.zeros(5)})
    tensors = open_segment(descriptor)
    assert descriptor["name"] not in segments()
    with pytest.raises(FileNotFoundError):
        open_segment(descriptor)

    def mapped() -> bool:
        return descriptor["name"] in Path("/proc/self/maps").read_text()

    kept = tensors["a"][3:5]
    del tensors
    gc.collect()
    assert mapped() and kept.tolist() == [3, 4]
    del kept
    gc.collect()
    assert not mapped()


def test_an_open_segment_holds_no_file_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    held = [moved({"a": torch.zeros(2)}) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) < before + 50 and len(held) == 50


def test_a_segment_is_its_owners_alone_and_can_be_discarded() -> None:
    descriptor = write_segment({"a": torch.zeros(2)})
    assert (FOLDER / descriptor["name"]).stat().st_mode & 0o777 == 0o600
    discard_segment(descriptor)
    assert descriptor["name"] not in segments()
    discard_segment(descriptor)


@pytest.mark.parametrize("name", ["../../etc/passwd", "tiller-1-2-x/../y", "/dev/shm/tiller-1-2-x", "psm_1", "", None])
def test_a_name_that_is_no_segments_is_refused(name: object) -> None:
    for act in (open_segment, discard_segment):
        with pytest.raises(ValueError, match="is not the name of a segment"):
            act({"name": name, "n_bytes": 64, "tensors": {}})


def test_a_segment_of_another_size_is_refused_and_removed() -> None:
    descriptor = write_segment({"a": torch.zeros(2)})
    with pytest.raises(RuntimeError, match=r"holds 64 bytes; its descriptor says 128"):
        open_segment(descriptor | {"n_bytes": 128})
    descriptor = write_segment({"a": torch.zeros(2)})
    descriptor["tensors"]["a"]["shape"] = [17]
    with pytest.raises(RuntimeError, match="ends after its segment"):
        open_segment(descriptor)


def test_what_does_not_fit_names_the_folder_and_leaves_no_file() -> None:
    before = segments()
    with pytest.raises(OSError, match=r"/dev/shm: No space left on device: \d+ bytes needed .* \d+ are free") as caught:
        write_segment({"a": torch.zeros(1).expand(10**12)})
    assert caught.value.errno == errno.ENOSPC and segments() <= before


def test_a_failure_half_way_leaves_no_file() -> None:
    with pytest.raises(NotImplementedError):
        write_segment({"a": torch.zeros(4), "b": torch.zeros(4, device="meta")})


def in_a_process(code: str, *arguments: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(words, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


# The limit on a file's size stands for a memory that ends while it is being allocated.
LIMITED = """
import resource, torch
from src.models.shared_segments import write_segment
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for tensor in (torch.zeros(4096), torch.zeros(64, 64).T):
    try:
        write_segment({"a": tensor})
    except OSError as error:
        print(error)
"""


def test_memory_that_cannot_be_allocated_is_an_error_and_not_the_end_of_the_process() -> None:
    before, process = segments(), in_a_process(LIMITED)
    told = process.communicate()[0].splitlines()
    assert process.returncode == 0 and len(told) == 2
    assert all("/dev/shm: File too large: 16384 bytes needed" in line for line in told)
    assert not {name for name in segments() - before if f"-{process.pid}-" in name}


WRITER = """
import json, sys, time, torch
from src.models.shared_segments import write_segment
print(json.dumps(write_segment({"a": torch.arange(6, dtype=torch.bfloat16).view(2, 3)})), flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def a_writer() -> Iterator[tuple[subprocess.Popen[str], dict]]:
    """A process that has written a segment and now waits, and the segment's descriptor."""
    process = in_a_process(WRITER)
    descriptor = json.loads(process.stdout.readline())
    try:
        yield process, descriptor
    finally:
        process.kill()
        process.communicate()
        discard_segment(descriptor)


def test_another_process_reads_what_one_wrote_also_after_its_end() -> None:
    for ends_first in (False, True):
        with a_writer() as (process, descriptor):
            if ends_first:
                process.communicate("\n")
            assert open_segment(descriptor)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_only_segments_of_the_dead_are_swept() -> None:
    ours = write_segment({"a": torch.zeros(2)})
    started = int(ours["name"].split("-")[2])
    # The process of another that had our number before, and a file that is not a segment.
    former, other = (FOLDER / f"tiller-{os.getpid()}-{started - 1000}-old", FOLDER / f"tiller-{os.getpid()}-notes")
    former.touch()
    other.touch()
    try:
        with a_writer() as (process, theirs), a_writer() as (killed, orphan):
            os.kill(killed.pid, signal.SIGKILL)
            eventually(lambda: psutil.Process(killed.pid).status() == psutil.STATUS_ZOMBIE)
            assert sweep_stale_segments() >= 2
            assert {ours["name"], theirs["name"], other.name} <= segments()
            assert not {orphan["name"], former.name} & segments()
            process.kill()
            process.wait()
            assert sweep_stale_segments() >= 1 and theirs["name"] not in segments()
    finally:
        other.unlink()
        former.unlink(missing_ok=True)
        discard_segment(ours)


def test_without_shared_memory_a_temporary_folder_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_segments, "SHARED_MEMORY", tmp_path / "absent")
    monkeypatch.setattr(shared_segments.tempfile, "tempdir", str(tmp_path))
    descriptor = write_segment({"a": torch.arange(3)})
    assert [path.name for path in tmp_path.iterdir()] == [descriptor["name"]]
    assert open_segment(descriptor)["a"].tolist() == [0, 1, 2] and not list(tmp_path.iterdir())


def test_a_budget_takes_what_fits_and_no_more() -> None:
    budget = Budget(10, ttl_seconds=GIVE_UP_SECONDS)
    assert budget.try_reserve(6) and not budget.try_reserve(5) and budget.try_reserve(4)
    assert budget.reserve(0) and budget.in_flight == 10
    budget.release(4)
    assert budget.in_flight == 6 and budget.reserve(4)


def test_more_than_the_budget_is_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"--capture_budget_gb: one request keeps 2 GB .* is 1 GB; raise it to 2\.01"):
        Budget(10**9, ttl_seconds=GIVE_UP_SECONDS).reserve(2 * 10**9 + 1)


def test_a_reservation_waits_for_a_release() -> None:
    budget = Budget(10, ttl_seconds=GIVE_UP_SECONDS)
    assert budget.reserve(10)
    taken: list[bool] = []
    threads = [threading.Thread(target=lambda: taken.append(budget.reserve(5))) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert not taken
    budget.release(5)
    eventually(lambda: len(taken) == 1)
    budget.release(5)
    for thread in threads:
        thread.join(GIVE_UP_SECONDS)
    assert taken == [True, True] and budget.in_flight == 10


def test_a_cancelled_reservation_takes_nothing() -> None:
    budget = Budget(10, ttl_seconds=GIVE_UP_SECONDS)
    assert budget.reserve(10)
    cancelled, answers = threading.Event(), []
    thread = threading.Thread(target=lambda: answers.append(budget.reserve(1, cancelled.is_set)))
    thread.start()
    cancelled.set()
    thread.join(GIVE_UP_SECONDS)
    assert answers == [False] and budget.in_flight == 10
    budget.release(10)
    assert budget.reserve(1, lambda: True) is False and budget.in_flight == 0


def test_when_nobody_takes_the_captures_waiting_ends_with_the_reason() -> None:
    budget = Budget(10, ttl_seconds=0.05)
    assert budget.reserve(10)
    with pytest.raises(TimeoutError, match=r"nobody took the captures.*--capture_budget_gb.*--capture_ttl \(0\.05 s\)"):
        budget.reserve(1)
    assert budget.in_flight == 10


def test_each_release_begins_the_wait_anew() -> None:
    budget = Budget(4, ttl_seconds=0.5)
    assert budget.reserve(4)
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(budget.reserve(4)))
    released_at = time.monotonic()
    thread.start()
    gaps = []
    for _ in range(4):
        time.sleep(0.2)
        budget.release(1)
        gaps.append(time.monotonic() - released_at)
        released_at = time.monotonic() - 0.01
    thread.join(GIVE_UP_SECONDS)
    # On a machine so busy that a release came too late, there was nothing to see.
    assert answers == [True] or max(gaps) >= 0.5


def test_more_released_than_reserved_is_noticed() -> None:
    budget = Budget(10, ttl_seconds=1)
    budget.release(1)
    with pytest.raises(AssertionError, match="1 bytes more were released"):
        budget.try_reserve(1)


KEEPERS: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda tensor: tensor,
    "slice": lambda tensor: tensor[1:2],
    "view": lambda tensor: tensor.view(torch.int32).T,
    "NumPy": lambda tensor: tensor.numpy()[::2],
    "detached": lambda tensor: tensor.detach(),
    "storage": lambda tensor: tensor.untyped_storage(),
}


@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS)
@pytest.mark.parametrize("key", ["a", "b"])
def test_bytes_count_as_long_as_the_memory_is_in_use(keep: Callable[[Tensor], object], key: str) -> None:
    budget = Budget(100, ttl_seconds=GIVE_UP_SECONDS)
    assert budget.reserve(70)
    tensors = moved({"a": torch.ones(4, 3), "b": torch.ones(2, 2)})
    budget.tie(tensors.values(), 70)
    gc.collect()
    assert budget.in_flight == 70
    kept = keep(tensors[key])
    del tensors
    gc.collect()
    assert budget.in_flight == 70
    del kept
    gc.collect()
    assert budget.in_flight == 0


def test_of_several_storages_the_last_releases_once() -> None:
    budget = Budget(100, ttl_seconds=GIVE_UP_SECONDS)
    assert budget.reserve(70)
    tensors = [torch.ones(3), torch.ones(4)]
    budget.tie([*tensors, tensors[0][1:]], 70)
    del tensors[0]
    gc.collect()
    assert budget.in_flight == 70
    tensors.clear()
    gc.collect()
    assert budget.in_flight == 0
    assert budget.reserve(5)
    budget.tie([], 5)
    assert budget.in_flight == 0


def test_a_copy_is_not_counted() -> None:
    budget = Budget(100, ttl_seconds=GIVE_UP_SECONDS)
    assert budget.reserve(9)
    tensors = moved({"a": torch.ones(3)})
    budget.tie(tensors.values(), 9)
    copy = tensors.pop("a").clone()
    gc.collect()
    assert budget.in_flight == 0 and copy.sum() == 3


def test_a_release_never_waits_for_its_own_thread() -> None:
    budget = Budget(10, ttl_seconds=GIVE_UP_SECONDS)
    assert budget.reserve(10)
    with budget._condition:
        budget.release(10)
    assert budget.in_flight == 0


def test_the_collector_may_release_in_any_thread() -> None:
    budget = Budget(1000, ttl_seconds=GIVE_UP_SECONDS)
    done: list[bool] = []

    def one() -> None:
        for _ in range(20):
            assert budget.reserve(300)
            cycle: list = [torch.ones(2)]
            cycle.append(cycle)
            budget.tie(cycle[:1], 300)
            del cycle
            # The tensor is in a cycle, so that only the collector frees it, wherever its threshold is reached.
            if budget.in_flight > 600:
                gc.collect()
        done.append(True)

    kept = gc.get_threshold()
    gc.set_threshold(1, 1000, 1000)
    try:
        threads = [threading.Thread(target=one) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GIVE_UP_SECONDS)
        assert done == [True] * 3
    finally:
        gc.set_threshold(*kept)
    gc.collect()
    assert budget.in_flight == 0


def test_a_thousand_open_segments_are_not_too_many() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, len(os.listdir("/proc/self/fd")) + 50), hard))
    try:
        held = [moved({"a": torch.full((2,), i)}) for i in range(100)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [int(tensors["a"][0]) for tensors in held] == list(range(100))
