from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.common.capture_spec import Capture
from src.common.interventions import Window
from src.common.resolved_interventions import ResolvedSpec
from src.models.hooks import Location
from src.models.vllm_plan import Asked, Operations, Program, SlotBook, StepPlan, build_plan
from tests.steering_specs import spec

POSITIONS = st.one_of(
    st.sampled_from(["all", "prompt", "generated", "last_prompt"]),
    st.builds(lambda a, n: Window(start=a, end=a + n), st.integers(0, 12), st.integers(1, 6)),
    st.builds(lambda a: Window(start=a), st.integers(-9, 9)),
    st.builds(lambda a, n: Window(start=a - n, end=a), st.integers(-6, -1), st.integers(1, 6)),
)
SPECS = st.lists(st.tuples(st.integers(0, 3), POSITIONS), min_size=1, max_size=4).map(
    lambda each: spec(
        *({"op": "add", "coefficient": 1.0 + i, "layer": layer, "positions": p} for i, (layer, p) in enumerate(each))
    )
)


class Book(SlotBook):
    """A book that remembers what each slot was filled with."""

    def __init__(self, **specs: ResolvedSpec) -> None:
        self.filled: dict[int, Operations] = {}
        super().__init__(self.filled.__setitem__)
        for name, each in specs.items():
            self.add(name, each)


def steps(lengths: Sequence[int], chunks: Sequence[int]) -> list[list[tuple[int, int, int]]]:
    """Requests of these many tokens cut into steps: (request, computed before, scheduled), at most chunks[i] a step."""
    done, planned, turn = [0] * len(lengths), [], 0
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        room, rows = chunks[turn % len(chunks)], []
        turn += 1
        for i, n in enumerate(lengths):
            take = min(room, n - done[i])
            if take:
                rows.append((i, done[i], take))
                done[i] += take
                room -= take
        planned.append(rows)
    return planned


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(SPECS, st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=4),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_every_token_gets_the_operations_of_its_position_however_it_is_scheduled(rows, chunks) -> None:
    book = Book(**{str(i): each for i, (each, _, _) in enumerate(rows)})
    asked = {str(i): Asked(prompt, str(i)) for i, (_, prompt, _) in enumerate(rows)}
    seen: dict[tuple[int, int], list] = {}
    for planned in steps([prompt + more for _, prompt, more in rows], chunks):
        plan = build_plan(
            [str(i) for i, _, _ in planned],
            [n for _, _, n in planned],
            [before for _, before, _ in planned],
            asked,
            book,
        )
        tokens = [(i, before + k) for i, before, n in planned for k in range(n)]
        assert plan.n_tokens == len(tokens) and plan.present == set(plan.slots.tolist()) - {0}
        for token, slot in zip(tokens, plan.slots.tolist(), strict=True):
            seen[token] = [o for each in book.filled.get(slot, {}).values() for o in each]
    for i, (each, prompt, more) in enumerate(rows):
        for position in range(prompt + more):
            wanted = []
            for operation in each.operations:
                start, end = operation.window(prompt)
                if start <= position and (end is None or position < end):
                    wanted.append(operation)
            assert sorted(map(id, seen[i, position])) == sorted(map(id, wanted)), (i, position)


def test_operations_at_one_place_keep_their_order() -> None:
    both = spec(
        {"op": "add", "coefficient": 1.0, "positions": "all"},
        {"op": "ablate", "coefficient": 1.0, "positions": "generated"},
        {"op": "scale", "coefficient": 2.0, "positions": "all"},
    )
    program = Program(both)
    everything = frozenset({0, 1})
    assert [o.op for o in program.active(everything)[Location(0, "resid_post")]] == ["add", "ablate", "scale"]
    assert [o.op for o in program.active(frozenset({0}))[Location(0, "resid_post")]] == ["add", "scale"]


def plan_of(book: Book, asked: dict[str, Asked], *rows: tuple[str, int, int]) -> StepPlan:
    """rows: (request, scheduled, computed)."""
    names, scheduled, computed = zip(*rows, strict=True)
    return build_plan(names, scheduled, computed, asked, book)


def test_requests_of_others_are_left_alone() -> None:
    book = Book(s=spec({"op": "add", "coefficient": 1.0}))
    plan = plan_of(book, {"b": Asked(2, "s")}, ("a", 3, 0), ("b", 2, 0), ("c", 1, 7))
    assert (plan.slots > 0).tolist() == [False, False, False, True, True, False]
    assert not plan_of(book, {}, ("a", 3, 0)).present


def test_one_slot_for_one_spec_and_other_slots_for_others() -> None:
    book = Book(s=spec({"op": "add", "coefficient": 1.0}), t=spec({"op": "add", "coefficient": 2.0}))
    asked = {"a": Asked(2, "s"), "b": Asked(5, "s"), "c": Asked(2, "t")}
    slots = plan_of(book, asked, ("a", 1, 0), ("b", 1, 4), ("c", 1, 1)).slots
    assert slots[0] == slots[1] != slots[2]


def test_slots_are_used_again_once_a_spec_is_forgotten() -> None:
    book = Book(
        s=spec({"op": "add", "coefficient": 1.0}, {"op": "ablate", "positions": "generated", "coefficient": 1.0})
    )
    plan_of(book, {"a": Asked(2, "s")}, ("a", 4, 0))
    freed = book.remove("s")
    assert sorted(freed) == [1, 2] and "s" not in book
    book.add("t", spec({"op": "add", "coefficient": 3.0}))
    assert plan_of(book, {"a": Asked(2, "t")}, ("a", 1, 0)).slots[0] in freed and book.n_slots == 3


def test_an_unknown_spec_is_refused() -> None:
    with pytest.raises(RuntimeError, match="never registered"):
        plan_of(Book(), {"a": Asked(2, "nothing")}, ("a", 1, 0))


@given(st.integers(0, 9), st.one_of(st.none(), st.integers(1, 12)), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_a_capture_keeps_each_of_its_positions_once(start, length, chunks) -> None:
    end = None if length is None else start + length
    capture = Capture(places=((0, "resid_post"),), start=start, end=end)
    kept: list[int] = []
    for planned in steps([15], chunks):
        plan = plan_of(Book(), {"0": Asked(6, None, capture)}, *((str(i), n, before) for i, before, n in planned))
        for each in plan.kept:
            assert each.end - each.start > 0 and each.start >= 0 and each.end <= plan.n_tokens
            kept += range(each.position, each.position + each.end - each.start)
    assert kept == list(range(start, 15 if end is None else min(15, end)))
    assert capture.n_positions(15) == len(kept)


def test_where_blocks_of_the_cache_part() -> None:
    program = lambda positions: Program(spec({"op": "add", "coefficient": 1.0, "positions": positions}))  # noqa: E731
    firsts = {p: program(p).first_position(10) for p in ("all", "prompt", "generated", "last_prompt")}
    assert firsts == {"all": 0, "prompt": 0, "generated": 10, "last_prompt": 9}
    assert program(Window(start=-3, end=-1)).first_position(10) == 7
    assert program(Window(start=-30, end=-20)).first_position(10) is None
    relative = {p: program(p).depends_on_prompt_length for p in ("all", "prompt", "generated", "last_prompt")}
    assert relative == {"all": False, "prompt": True, "generated": True, "last_prompt": True}
    assert not program(Window(start=3, end=5)).depends_on_prompt_length
    assert program(Window(start=3, end=-1)).depends_on_prompt_length


def test_arrays_are_whole_numbers() -> None:
    plan = plan_of(Book(), {}, ("a", np.int32(2), np.int32(0)))
    assert plan.slots.dtype == np.int64 and plan.n_tokens == 2
