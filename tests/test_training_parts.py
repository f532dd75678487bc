"""The parts of training that need no training: orders, packs, passes, checkpoints, metrics, steering contexts."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from src.common.errors import InputError
from src.common.run_names import random_name
from src.training.batches import Collator, EpochSampler, packed, packs, parts, steps_of
from src.training.checkpoints import Checkpoints
from src.training.keeping import Plan
from src.training.metrics import Metrics, loss_page
from src.training.rendering import IGNORED
from src.training.trainers import SftTrainer, only_at
from tests.conftest import ROOT
from tests.tiny_models import tiny_model

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=300)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 5), st.booleans())
def test_every_row_comes_once_an_epoch_and_the_order_is_the_seeds(lengths, size, epoch, grouped) -> None:
    def order(seed: int) -> list[int]:
        sampler = EpochSampler(lengths, size, seed, grouped)
        sampler.epoch = epoch
        return list(sampler)

    found = order(3)
    assert sorted(found) == list(range(len(lengths)))
    assert found == order(3) and steps_of(len(lengths), size, 1) == -(-len(lengths) // size)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 5))
def test_the_order_is_that_of_transformers_trainer(n: int, seed: int, epoch: int) -> None:
    theirs = SeedableRandomSampler(range(n), data_seed=seed)
    ours = EpochSampler([1] * n, 4, seed, grouped=False)
    theirs.epoch = ours.epoch = epoch
    assert list(ours) == list(theirs)


def test_steps_are_of_like_rows_and_epochs_differ() -> None:
    chance = random.Random(0)
    lengths = [round(chance.lognormvariate(3, 1)) + 1 for _ in range(400)]
    sampler = EpochSampler(lengths, 8, 0, grouped=True)
    first = list(sampler)
    sampler.epoch = 1
    assert first != list(sampler)
    padded = sum(8 * max(lengths[i] for i in first[k : k + 8]) for k in range(0, 400, 8))
    assert padded < 1.2 * sum(lengths)
    plain = list(EpochSampler(lengths, 8, 0, grouped=False))
    assert sum(8 * max(lengths[i] for i in plain[k : k + 8]) for k in range(0, 400, 8)) > 1.5 * sum(lengths)
    firsts = [lengths[first[k]] for k in range(0, 400, 8)]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)


@settings(max_examples=50, deadline=None)
@given(LENGTHS)
def test_packs_hold_every_row_once(lengths: list[int]) -> None:
    found = packs(lengths, 64)
    assert sorted(i for pack in found for i in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= 64 for pack in found)
    assert found == by_best_fit(lengths, 64)
    assert len(found) <= max(1, 1.25 * sum(lengths) / 64 + 2) or max(lengths) > 32


def by_best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """As a textbook has it: each row, the longest first, into the fullest pack that it fits into."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        used = [sum(lengths[k] for k in pack) for pack in found]
        fitting = [k for k in range(len(found)) if used[k] + lengths[i] <= size]
        if fitting:
            found[max(fitting, key=lambda k: (used[k], -k))].append(i)
        else:
            found.append([i])
    return found


def row(*ids: int) -> dict[str, list[int]]:
    return {"input_ids": list(ids), "labels": [IGNORED, *ids[1:]]}


def test_batches_are_padded_on_the_right_and_packs_count_anew() -> None:
    batch = Collator(9)([row(1, 2, 3), row(4, 5)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [IGNORED, 5, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    pack = Collator(9)([packed([row(1, 2), row(3, 4, 5)]), packed([row(6)])])
    assert pack["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]
    assert (
        "attention_mask" not in pack
        and pack["n_tokens"].tolist() == [5, 1]
        and pack["labels"][1].tolist() == [IGNORED] * 5
    )


def test_passes_hold_every_row_and_little_padding() -> None:
    rows = [row(*range(1, n + 1)) for n in (3, 40, 5, 4, 38, 2)]
    found = parts(Collator(0)(rows), 60)
    assert sorted(len(part["input_ids"]) for part in found) == [1, 1, 1, 3]
    assert sum(int(part["attention_mask"].sum()) for part in found) == 92
    assert all(2 * part["attention_mask"].sum(dim=1).min() >= part["input_ids"].shape[1] for part in found)
    assert all(part["attention_mask"][0].all() for part in found)
    assert len(parts(Collator(0)([packed(rows[:2]), packed(rows[2:])]), 60)) == 2


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_logits_at_learned_places_are_the_models_own(name: str) -> None:
    model = tiny_model(name)
    ids = torch.arange(12).view(2, 6) + 5
    learned = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()
    with torch.inference_mode():
        expected = model(ids).logits[:, :-1][learned]
        with only_at(model, learned):
            found = model(ids).logits
    assert torch.allclose(found[0], expected, atol=1e-5)
    with torch.inference_mode():
        assert model(ids).logits.shape[:2] == (2, 6)


def save_tensors(folder: Path) -> None:
    torch.save({"a": torch.zeros(9)}, folder / "optimizer.pt")


def test_a_checkpoint_takes_the_place_of_the_last_only_when_it_is_whole(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "f")
    assert checkpoints.latest() is None
    first = checkpoints.write(3, save_tensors)

    def killed(folder: Path) -> None:
        save_tensors(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(6, killed)
    assert checkpoints.latest() == (3, first) == Checkpoints(tmp_path, "f").latest()
    second = checkpoints.write(12, save_tensors)
    assert checkpoints.latest() == (12, second) and not first.exists()
    with pytest.raises(InputError, match="another configuration"):
        Checkpoints(tmp_path, "g").latest()
    checkpoints.clear()
    assert list(tmp_path.iterdir()) == []


def with_torch(path: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, path)


def with_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(100_000)}, path)


def with_python(path: Path) -> None:
    path.write_text("x" * 100_000)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, the device on which nothing has room")
@pytest.mark.parametrize("write", [with_torch, with_python])
def test_a_full_disk_leaves_the_last_checkpoint(write: Callable, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "f")
    kept = checkpoints.write(3, save_tensors)

    def onto_a_full_disk(folder: Path) -> None:
        (folder / "file").symlink_to("/dev/full")
        write(folder / "file")

    with pytest.raises(InputError, match=r"disk is full.*step 6 was not saved; the checkpoint of step 3 is whole"):
        checkpoints.write(6, onto_a_full_disk)
    assert checkpoints.latest() == (3, kept)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000003"]


def metrics_row(step: int) -> dict:
    return {"step": step, "loss": 1.23456789, "validation_loss": None, "learning_rate": 1e-4 / 3, "tokens": 7 * step}


def test_metrics_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    for step in range(1, 6):
        metrics.add(metrics_row(step))
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    metrics = Metrics(tmp_path, 3)
    assert metrics.tokens == 21 and [r["step"] for r in metrics.rows] == [1, 2, 3]
    metrics.set_validation(0.5)
    metrics.add(metrics_row(4))
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["validation_loss"] for r in rows] == [None, None, 0.5, None]
    assert rows[3]["loss"] == 1.2346 and rows[3]["learning_rate"] == 1e-4 / 3
    page = loss_page("<b>", rows, {"a": "<i>"})
    assert "&lt;b&gt;" in page and "<i>" not in page


def test_the_plan_says_when() -> None:
    plan = Plan(steps_per_epoch=4, epochs=2, validate_every=3, checkpoint_every=100, saved_epochs=(1,))
    assert [step for step in range(1, 9) if plan.validates(step)] == [3, 6, 8]
    assert [step for step in range(1, 9) if plan.checkpoints(step)] == [4, 8]
    assert [plan.ends_epoch(step) for step in (3, 4, 8)] == [None, 0, 1]


def test_names_are_two_words() -> None:
    names = {random_name() for _ in range(50)}
    assert len(names) > 40 and all(name.count("_") == 1 and name.replace("_", "").isalpha() for name in names)


def test_the_trainer_tells_nobody() -> None:
    assert SftTrainer._send_telemetry(object()) is None


def test_words_that_are_evaluated_are_never_trained_on() -> None:
    splits = json.loads((ROOT / "data" / "finetuning" / "capitalization.json").read_text())
    seen = {row["input"] for name in ("train", "validation") for row in splits[name]}
    lines = (ROOT / "data" / "evals" / "capitalization.jsonl").read_text().splitlines()
    evaluated = {json.loads(line)["input"] for line in lines}
    assert len(evaluated) == 100 and not evaluated & seen
    assert not {row["input"] for row in splits["test"]} & seen
