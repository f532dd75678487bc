"""Batches and the fair queue of the embedding server: properties over many arrivals, without a model."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.embedding.batching import BATCHES_COST, MOST_PADDING, batch_of_first, stepped_width
from src.serving.embedding_queue import FairQueue, Job, QueueFull, Waiting

BUDGET = 64
LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=60)


def job(client: str, lengths: list[int], kind: str = "text", weight: int = 1) -> Job:
    return Job(client=client, kind=kind, inputs=[np.zeros(n) for n in lengths], lengths=lengths, arrived=0.0,
               weight=weight)  # fmt: skip


def choose(lengths: list[int]) -> list[int]:
    return batch_of_first(lengths, BUDGET)


def drained(queue: FairQueue) -> list[list[Waiting]]:
    batches = []
    while queue:
        batches.append(queue.take(choose))
    return batches


@given(LENGTHS)
def test_a_batch_holds_the_first_and_keeps_the_budget_and_the_padding(lengths: list[int]) -> None:
    chosen = batch_of_first(lengths, BUDGET)
    own = [lengths[index] for index in chosen]
    assert 0 in chosen and len(set(chosen)) == len(chosen)
    assert max(own) * len(own) <= BUDGET or len(own) == 1
    assert max(own) - min(own) <= max(BUDGET // BATCHES_COST, (1 - MOST_PADDING) * max(own) + 1e-9)
    # What was left out lies outside of the batch's lengths, or is as long as its ends.
    left = [length for index, length in enumerate(lengths) if index not in chosen]
    assert not [length for length in left if min(own) < length < max(own)]


def test_a_batch_of_equal_lengths_fills_the_budget() -> None:
    assert len(batch_of_first([8] * 30, BUDGET)) == BUDGET // 8
    assert batch_of_first([500], BUDGET) == [0]
    # The first is far from the others: it goes alone, unless they cost less than a batch of their own.
    assert sorted(batch_of_first([60, 1, 1, 1], BUDGET)) == [0]
    assert sorted(batch_of_first([12, 16, 16, 18, 19], 1024)) == [0, 1, 2, 3]


@pytest.mark.parametrize("rows", range(1, 9))
def test_numbers_of_tokens_are_few_and_widths_never_beyond_what_the_model_reads(rows: int) -> None:
    widths = [stepped_width(length, rows, 62) for length in range(1, 63)]
    assert all(length <= width <= 62 for length, width in enumerate(widths, 1))
    assert all(width < length + 4 for length, width in enumerate(widths, 1))
    assert all(rows * width % 4 == 0 for width in widths[:60])
    assert (widths == list(range(1, 63))) == (rows % 4 == 0)
    assert stepped_width(61, rows, None) == 61


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), LENGTHS, st.sampled_from(["text", "image"])), max_size=12))
def test_everything_is_taken_once_and_the_head_first(arrivals: list[tuple[str, list[int], str]]) -> None:
    queue = FairQueue(10_000, BUDGET)
    jobs = [job(*arrival) for arrival in arrivals]
    taken: Counter = Counter()
    for number, each in enumerate(jobs):
        queue.add(each)
        if number % 3 == 2:
            taken.update((id(one.job), one.position) for one in queue.take(choose))
    for batch in iter(lambda: queue.take(choose) if queue else [], []):
        assert len({one.job.kind for one in batch}) == 1
        taken.update((id(one.job), one.position) for one in batch)
    assert taken == Counter({(id(each), n): 1 for each in jobs for n in range(len(each.inputs))})
    assert (queue.weight, queue.tokens, len(queue)) == (0, 0, 0) and not queue._last_turns


def test_one_who_asks_for_much_does_not_hold_up_the_others() -> None:
    queue = FairQueue(10_000, BUDGET)
    queue.add(job("bulk", [8] * 1000))
    queue.take(choose)
    for number in range(5):
        queue.add(job(f"small {number}", [8]))
    first_two = [one.job.client for _ in range(2) for one in queue.take(choose)]
    assert {f"small {number}" for number in range(5)} <= set(first_two)


def test_nobody_waits_for_ever_behind_newcomers() -> None:
    queue = FairQueue(10_000, BUDGET)
    bulk = job("bulk", [60] * 10)
    queue.add(bulk)
    for number in range(60):
        # New clients all the time, and each batch holds one text: turn n is n long, ten turns are 55 batches.
        queue.add(job(f"new {number}", [60]))
        queue.take(choose)
    assert not [one for one in queue if one.job is bulk], "a turn of newcomers ended never"


def test_one_client_is_served_in_the_order_of_its_requests() -> None:
    queue = FairQueue(10_000, BUDGET)
    jobs = [job("a", [60]) for _ in range(6)]
    for each in jobs:
        queue.add(each)
    assert [batch[0].job for batch in drained(queue)] == jobs


def test_what_is_gone_is_not_taken_and_is_not_held_against_its_client() -> None:
    queue = FairQueue(100, BUDGET)
    gone, other = job("a", [60] * 50), job("b", [60] * 4)
    queue.add(gone)
    queue.add(other)
    queue.take(choose)
    queue.remove(gone)
    again = job("a", [60])
    queue.add(again)
    order = [batch[0].job for batch in drained(queue)]
    assert gone not in order and order.index(again) == 2
    queue.remove(gone)
    assert (queue.weight, queue.tokens) == (0, 0)


def test_a_full_queue_takes_nothing_of_a_request() -> None:
    queue = FairQueue(10, BUDGET)
    queue.add(job("a", [1] * 8))
    with pytest.raises(QueueFull):
        queue.add(job("b", [1] * 3))
    assert len(queue) == 8 and not queue.has_room(1, weight=3)
    queue.add(job("b", [1] * 2))
    assert not queue.has_room(1)


def test_the_turns_of_a_client_follow_one_another() -> None:
    queue = FairQueue(1000, BUDGET)
    queue.add(job("a", [60] * 3))
    queue.add(job("b", [60] * 3))
    queue.add(job("a", [60]))
    turns = defaultdict(list)
    for batch in drained(queue):
        turns[batch[0].job.client].append(batch[0].turn)
    assert turns == {"a": [1, 2, 3, 4], "b": [1, 2, 3]}
