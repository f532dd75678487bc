import asyncio
import gc
import os
from dataclasses import replace
from operator import sub

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.common.capture_spec import Capture
from src.common.directions_file import HOOK_POINTS
from src.common.errors import InputError
from src.common.interventions import Window
from src.common.resolved_interventions import ResolvedCondition, ResolvedSpec
from src.models.language_model import LanguageModel, generate_all
from src.models.parity import direct
from src.models.types import GenerationRequest, GenerationResult
from tests.steering_specs import spec, unit
from tests.vllm_parity import assert_same_states, chunks_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
D_MODEL = 576
TEXTS = (
    "The capital of France is",
    "Once upon a time there was a small village where everyone knew each other, and in it a baker who rose before the "
    "sun did and who sang while the dough was rising, so that all the neighbours knew what bread there would be. " * 2,
    "def f(x):",
    "In 1492 the weather was",
)
PLACES = ((8, "resid_post"), (12, "resid_post"), (29, "resid_post"))
ALL_POINTS = ((4, "resid_pre"), (0, "resid_pre"), (5, "attn_out"), (5, "mlp_out"), (29, "resid_post"))


def direction(seed: int):
    return unit(seed, D_MODEL)


def op(op: str, layer: int, seed: int, **fields: object) -> dict:
    return {"op": op, "layer": layer, "direction": direction(seed), **fields}


SPECS: tuple[ResolvedSpec | tuple[()], ...] = (
    (),
    spec(op("add", 8, 1, coefficient=20.0)),
    spec(op("add", 8, 1, coefficient=15.0), op("add", 20, 2, coefficient=30.0)),
    spec(op("ablate", 12, 3, coefficient=1.0)),
    spec(op("cap", 8, 4, lo=-0.5, hi=0.5), op("cap", 12, 5, hi=0.0)),
    spec(op("add", 12, 6, coefficient=40.0, positions=Window(start=-1))),
)


@pytest.fixture(scope="module")
def requests(hf: LanguageModel) -> list[GenerationRequest]:
    """12 requests, six specs, prompts from 3 to 100 tokens."""
    ids = [tuple(hf.tokenizer(text).input_ids) for text in TEXTS]
    return [
        GenerationRequest(
            id=f"{i:02d}", token_ids=ids[i % 4], max_tokens=16, interventions=SPECS[i % 6],
            capture=Capture(places=PLACES),
        )
        for i in range(12)
    ]  # fmt: skip


def state(engine) -> dict[str, int]:
    (counts,) = engine._engine.collective_rpc("tiller_state")
    return counts


def clear_cache(engine) -> None:
    assert engine._engine.reset_prefix_cache()


def test_a_mixed_batch_is_steered_and_kept_as_in_transformers(vllm_engine, hf, requests) -> None:
    expected = generate_all(hf, [replace(r, capture=None) for r in requests])
    with chunks_of(vllm_engine, 64):
        ours = generate_all(vllm_engine, requests)
    assert [r.token_ids for r in ours] == [r.token_ids for r in expected]
    assert len({r.token_ids for r in expected}) > 6, "the interventions should show in the answers"
    for request, result in zip(requests, ours, strict=True):
        assert assert_same_states(hf, request, result) <= 1e-4


def test_every_hook_point_is_changed_and_kept(vllm_engine, hf, requests) -> None:
    each = [
        {**op("add", layer, i, coefficient=8.0), "hook_point": point} for i, (layer, point) in enumerate(ALL_POINTS)
    ]
    several = [
        replace(requests[i], id=f"p{i}", interventions=spec(*chosen), capture=Capture(places=ALL_POINTS), max_tokens=6)
        for i, chosen in enumerate([*([e] for e in each), each, [*each[:2], {**each[2], "op": "ablate"}]])
    ]
    for request, result in zip(several, generate_all(vllm_engine, several), strict=True):
        assert_same_states(hf, request, result)


def conditioned(layer: int, seed: int, **bounds: float | None) -> ResolvedCondition:
    limits = {"above": None, "below": None} | bounds
    return ResolvedCondition(layer=layer, hook_point="resid_post", direction=direction(seed), **limits)


def test_conditions_gate_each_token(vllm_engine, hf, requests) -> None:
    gates = [
        conditioned(8, 1, above=0.0), conditioned(5, 2, below=0.0), conditioned(12, 3, above=-3.0, below=3.0),
        conditioned(0, 4, above=1e9),
    ]  # fmt: skip
    several = [
        replace(
            requests[i],
            id=f"c{i}",
            interventions=spec(
                {**op("add", 12, 6, coefficient=25.0), "condition": gates[i % 4]},
                {**op("ablate", 12, 7, coefficient=1.0), "condition": gates[(i + 1) % 4] if i % 2 else None},
            ),
        )
        for i in range(8)
    ]
    with chunks_of(vllm_engine, 48):
        ours = generate_all(vllm_engine, several)
    expected = generate_all(hf, [replace(request, capture=None) for request in several])
    for request, result, other in zip(several, ours, expected, strict=True):
        assert_same_states(hf, request, result)
        if result.token_ids == other.token_ids:
            assert [len(gate) for gate in result.gates] == [len(gate) for gate in other.gates] != []
            for mine, theirs in zip(result.gates, other.gates, strict=True):
                assert max(map(abs, map(sub, mine, theirs))) < 1e-2
    assert sum(a.token_ids == b.token_ids for a, b in zip(ours, expected, strict=True)) >= 6
    counts = state(vllm_engine)
    assert counts["captures"] == 0 and not vllm_engine._states._gated


POSITIONS = st.one_of(
    st.sampled_from(["all", "prompt", "generated", "last_prompt"]),
    st.builds(lambda a, n: Window(start=a, end=a + n), st.integers(0, 30), st.integers(1, 20)),
    st.builds(lambda a: Window(start=a), st.integers(-20, 40)),
    st.builds(lambda a, n: Window(start=a - n, end=a), st.integers(-6, -1), st.integers(1, 6)),
)
KINDS = st.one_of(
    st.builds(
        lambda c, r: {"op": "add", "coefficient": c / 20 if r else c, "relative": r}, st.floats(-30, 30), st.booleans()
    ),
    st.builds(lambda c: {"op": "ablate", "coefficient": c}, st.floats(0.5, 1.5)),
    st.builds(lambda c: {"op": "scale", "coefficient": c}, st.floats(-1, 1)),
    st.builds(lambda v: {"op": "set", "value": v}, st.floats(-10, 10)),
    st.builds(lambda a, w: {"op": "cap", "lo": a, "hi": a + w}, st.floats(-5, 5), st.floats(0, 5)),
)
OPERATIONS = st.builds(
    lambda kind, layer, point, seed, positions: {
        **kind, "layer": layer, "hook_point": point, "direction": direction(seed), "positions": positions,
    },
    KINDS, st.integers(0, 29), st.sampled_from(HOOK_POINTS), st.integers(0, 9), POSITIONS,
)  # fmt: skip
CASES = st.tuples(
    st.integers(0, 3), st.integers(1, 90), st.lists(OPERATIONS, max_size=4), st.booleans(), st.integers(1, 5)
)


@settings(max_examples=25, deadline=None)
@given(st.lists(CASES, min_size=8, max_size=8), st.integers(5, 130))
def test_random_batches_are_steered_as_in_transformers(vllm_engine, hf, cases, chunk) -> None:
    several = []
    for i, (text, length, operations, mean, max_tokens) in enumerate(cases):
        ids = tuple(hf.tokenizer(TEXTS[text]).input_ids[:length])
        capture = Capture(places=((3, "mlp_out"), (29, "resid_post")), mean=mean)
        steering = spec(*operations) if operations else ()
        # The boundary is given, so that operations that act nowhere are tried, too.
        request = GenerationRequest(id=f"r{i}", token_ids=ids, max_tokens=max_tokens, prompt_length=len(ids))
        several.append(replace(request, interventions=steering, capture=capture))
    with chunks_of(vllm_engine, chunk):
        ours = generate_all(vllm_engine, several)
    for request, result in zip(several, ours, strict=True):
        assert_same_states(hf, request, result)
    assert state(vllm_engine)["captures"] == 0


def cached_tokens(engine, request: GenerationRequest) -> tuple[int, GenerationResult]:
    """How many of its tokens a request found in the cache, and its result."""
    engine.check([request], 5)
    assert engine.reserve(request)
    engine.add(request, 5)
    while True:
        for output in engine.step():
            if output.finished:
                return output.num_cached_tokens, engine.result(output)


def test_steered_and_plain_tokens_share_no_block(vllm_engine, hf) -> None:
    ids = tuple(hf.tokenizer(TEXTS[1] * 2).input_ids[:127])
    plain = GenerationRequest(id="plain", token_ids=ids, max_tokens=2)
    steering = spec(op("add", 8, 1, coefficient=20.0))
    steered = replace(plain, id="steered", interventions=steering)
    other = replace(plain, id="other", interventions=spec(op("add", 8, 1, coefficient=21.0)))
    clear_cache(vllm_engine)
    alone = cached_tokens(vllm_engine, plain)[1]
    clear_cache(vllm_engine)
    assert cached_tokens(vllm_engine, steered)[0] == 0
    n_cached, after = cached_tokens(vllm_engine, plain)
    assert n_cached == 0 and after == alone
    assert cached_tokens(vllm_engine, other)[0] == 0
    again, same = cached_tokens(vllm_engine, steered)
    assert again == 96, "the same spec finds its own blocks"
    assert same.token_ids == generate_all(hf, [steered])[0].token_ids
    assert cached_tokens(vllm_engine, plain)[0] == 96
    # What lies before the first steered token is everybody's; the rest depends on where the prompt ends.
    late = spec(op("add", 8, 1, coefficient=20.0, positions=Window(start=64)))
    assert cached_tokens(vllm_engine, replace(plain, id="late", interventions=late))[0] == 64
    generated = spec(op("add", 8, 1, coefficient=20.0, positions="generated"))
    assert cached_tokens(vllm_engine, replace(plain, id="generated", interventions=generated))[0] == 96
    shorter = replace(plain, id="prompt", interventions=spec(op("add", 8, 1, coefficient=20.0, positions="prompt")))
    assert cached_tokens(vllm_engine, shorter)[0] == 0
    assert cached_tokens(vllm_engine, replace(shorter, id="shorter", token_ids=ids[:110]))[0] == 0
    assert cached_tokens(vllm_engine, replace(shorter, id="again"))[0] == 96


def test_a_capture_of_cached_tokens_is_whole(vllm_engine, hf) -> None:
    ids = tuple(hf.tokenizer(TEXTS[1] * 2).input_ids[:127])
    request = GenerationRequest(id="warm", token_ids=ids, max_tokens=2)
    generate_all(vllm_engine, [request])
    kept = replace(request, id="kept", capture=Capture(places=((29, "resid_post"),)))
    n_cached, result = cached_tokens(vllm_engine, kept)
    assert n_cached == 0
    assert_same_states(hf, kept, result)
    answer_only = replace(kept, id="answer", max_tokens=4, capture=Capture(places=((29, "resid_post"),), start=127))
    n_cached, result = cached_tokens(vllm_engine, answer_only)
    assert n_cached == 96, "the prompt's rows are not asked for, so they need not be computed"
    assert_same_states(hf, answer_only, result)


def test_parts_of_the_positions_are_kept(vllm_engine, hf, requests) -> None:
    wanted = {"last": (13, 14), "generated": (14, None), "window": (2, 9), "beyond": (40, None)}
    several = [
        replace(
            requests[1], id=name, max_tokens=5, token_ids=requests[1].token_ids[:14],
            capture=Capture(places=((7, "resid_post"),), start=start, end=end),
        )
        for name, (start, end) in wanted.items()
    ]  # fmt: skip
    results = generate_all(vllm_engine, several)
    for request, result in zip(several, results, strict=True):
        assert_same_states(hf, request, result)
    assert [len(r.captures["7.resid_post"]) for r in results] == [1, 4, 7, 0]


def test_an_answers_windows_hold_when_it_is_given_with_the_prompt(vllm_engine, hf, requests) -> None:
    """Teacher forcing: prompt and answer as one prompt, with the boundary where it was."""
    steering = spec(op("add", 8, 1, coefficient=20.0, positions="generated"))
    asked = replace(requests[0], id="asked", interventions=steering)
    answer = generate_all(vllm_engine, [asked])[0]
    whole = replace(
        asked, id="whole", token_ids=(*asked.token_ids, *answer.token_ids[:-1]), prompt_length=len(asked.token_ids),
        max_tokens=1,
    )  # fmt: skip
    result = generate_all(vllm_engine, [whole])[0]
    assert result.token_ids == answer.token_ids[-1:]
    assert_same_states(hf, whole, result)
    for name, states in result.captures.items():
        assert (states - answer.captures[name]).abs().max() < 1e-2


def test_unsteered_rows_of_a_mixed_batch_stay_bit_for_bit(vllm_engine, requests) -> None:
    several = [replace(r, capture=None, max_tokens=8) for r in requests]
    steered = generate_all(vllm_engine, several)
    # The same batch, with interventions that do nothing where the others do something.
    idle = spec(op("add", 8, 1, coefficient=20.0, positions=Window(start=900)))
    clear_cache(vllm_engine)
    # Refused, unless the boundary is given.
    others = [replace(r, interventions=idle, prompt_length=len(r.token_ids)) if r.spec else r for r in several]
    plain = generate_all(vllm_engine, others)
    for request, a, b in zip(several, steered, plain, strict=True):
        if not request.spec:
            assert a == b


def test_several_answers_of_one_request_are_each_steered_and_kept(vllm_engine, hf, requests) -> None:
    """vLLM's own n > 1, whose children have names of their own."""
    from vllm.inputs.engine import tokens_input

    from src.models.vllm_tag import sampling_params

    # vLLM refuses several greedy answers; draws at this temperature are the likeliest tokens.
    request = replace(requests[2], id="three", max_tokens=6, temperature=1e-3)
    vllm_engine._states.specs.take(request.id, request.spec, request.boundary, len(request.token_ids) + 6)
    params = sampling_params(request, 5, vllm_engine.eos_ids, "v1")
    params.n = 3
    name = vllm_engine._engine.add_request(request.id, tokens_input(list(request.token_ids)), params)
    outputs = []
    while vllm_engine.has_work():
        outputs += [output for output in vllm_engine.step() if output.finished]
    expected = generate_all(hf, [replace(request, capture=None, temperature=0.0)])[0]
    wanted = direct(hf, request, expected.token_ids[:-1])
    assert {tuple(c.token_ids) for output in outputs for c in output.outputs} == {expected.token_ids}
    steering = vllm_engine._engine.model_executor.driver_worker.worker.tiller_steering
    for child in range(3):
        kept = steering.take(f"{child}_{name}", len(request.token_ids) + 5, mean=False)
        assert len(kept) == len(PLACES)
        for place, states in kept.items():
            assert (states - wanted[place]).norm() / wanted[place].norm() < 1e-4
    vllm_engine._states.specs.leave(request.id)
    assert state(vllm_engine)["captures"] == 0


def shared_segments() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(f"tiller-{os.getpid()}")}


@pytest.mark.parametrize("n_steps", [1, 3, 8])
def test_an_aborted_request_leaves_nothing(vllm_engine, requests, n_steps) -> None:
    long = [replace(r, id=f"gone{r.id}", max_tokens=40) for r in requests[:4]]
    with chunks_of(vllm_engine, 30):
        for request in long:
            assert vllm_engine.reserve(request)
            vllm_engine.add(request, 5)
        for _ in range(n_steps):
            vllm_engine.step()
        assert state(vllm_engine)["captures"] > 0
        vllm_engine.abort([r.id for r in long])
    after = generate_all(vllm_engine, [replace(requests[0], id="next", capture=None)])
    assert after[0].token_ids
    counts = state(vllm_engine)
    assert counts["captures"] == 0 and counts["requests"] == 0
    assert vllm_engine._states.captures.budget.in_flight == 0 and not shared_segments()
    assert not [users for users in vllm_engine._states.specs._users.values() if users]


def test_a_client_that_fails_leaves_nothing(vllm_engine, requests) -> None:
    def fail(result: GenerationResult) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vllm_engine.generate(requests, on_result=fail)
    gc.collect()
    assert generate_all(vllm_engine, [replace(requests[0], id="next", capture=None)])
    counts = state(vllm_engine)
    assert counts["captures"] == 0 and counts["requests"] == 0
    assert vllm_engine._states.captures.budget.in_flight == 0 and not shared_segments()


def test_an_engine_that_was_broken_off_takes_no_more(vllm_engine, requests, monkeypatch) -> None:
    """Ctrl-C within a step: the prefix cache then has blocks that were never filled."""
    steering = vllm_engine._engine.model_executor.driver_worker.worker.tiller_steering
    long = replace(requests[1], id="long", capture=None)
    clear_cache(vllm_engine)
    expected = generate_all(vllm_engine, [long])
    clear_cache(vllm_engine)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    try:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(steering, "plan_step", interrupt)
            generate_all(vllm_engine, [long])
        with pytest.raises(RuntimeError, match="broken off within a step"):
            generate_all(vllm_engine, [replace(long, id="again")])
    finally:
        # For the other tests; nothing had begun to run.
        vllm_engine._broken = None
        vllm_engine.abort(["long"])
        clear_cache(vllm_engine)
    assert generate_all(vllm_engine, [long]) == expected


def test_what_was_asked_while_an_async_engine_ended_gives_its_room_back(vllm_engine, requests) -> None:
    from src.models.vllm_async import AsyncVLLMEngine

    async def ask() -> list:
        async with AsyncVLLMEngine(vllm_engine) as engine:
            # First its end, then the request: both before its thread looks.
            engine._commands.put(lambda: asyncio.run_coroutine_threadsafe(asyncio.sleep(0.3), loop).result())
            loop = asyncio.get_running_loop()
            engine._commands.put(None)
            return await asyncio.gather(engine.generate(requests[1]), return_exceptions=True)

    (error,) = asyncio.run(ask())
    assert isinstance(error, RuntimeError)
    assert vllm_engine._states.captures.budget.in_flight == 0


def test_a_capture_that_cannot_be_fetched_leaves_nothing(vllm_engine, requests, monkeypatch) -> None:
    from src.models import vllm_worker
    from src.models.vllm_async import AsyncVLLMEngine

    def full(tensors: object) -> None:
        raise OSError(28, "no space left")

    async def ask() -> list:
        async with AsyncVLLMEngine(vllm_engine) as engine:
            other = replace(requests[2], id="other", capture=None)
            return await asyncio.gather(engine.generate(requests[1]), engine.generate(other), return_exceptions=True)

    monkeypatch.setattr(vllm_worker, "write_segment", full)
    error, other = asyncio.run(ask())
    assert isinstance(error, OSError) and isinstance(other, GenerationResult)
    with pytest.raises(OSError, match="no space"):
        generate_all(vllm_engine, [requests[1]])
    assert vllm_engine._states.captures.budget.in_flight == 0 and state(vllm_engine)["captures"] == 0


def test_specs_that_nobody_uses_are_freed(vllm_engine, requests, monkeypatch) -> None:
    from src.models import vllm_specs

    monkeypatch.setattr(vllm_specs, "UNUSED_KEPT", 4)
    for seed in range(9):
        one = replace(
            requests[0], capture=None, max_tokens=2, interventions=spec(op("add", 3, seed, coefficient=seed + 1.0))
        )
        generate_all(vllm_engine, [one])
    assert state(vllm_engine)["specs"] <= 6


def test_captures_wait_for_room(vllm_engine, requests) -> None:
    budget = vllm_engine._states.captures.budget
    plain, budget.limit_bytes = budget.limit_bytes, 2 * vllm_engine._states.captures.n_bytes(requests[1])
    most, lengths = 0, []

    def use(result: GenerationResult) -> None:
        nonlocal most
        most = max(most, budget.in_flight)
        lengths.append(len(result.captures["8.resid_post"]))

    try:
        vllm_engine.generate(requests, on_result=use)
        assert len(lengths) == len(requests) and 0 < most <= budget.limit_bytes
        budget.limit_bytes = vllm_engine._states.captures.n_bytes(requests[1]) - 1
        with pytest.raises(InputError, match="--capture_budget_gb"):
            vllm_engine.generate(requests, on_result=use)
    finally:
        budget.limit_bytes = plain


def test_a_reader_that_never_comes_ends_in_an_error(vllm_engine, requests) -> None:
    budget = vllm_engine._states.captures.budget
    limit, ttl = budget.limit_bytes, budget.ttl_seconds
    budget.limit_bytes, budget.ttl_seconds = int(1.5 * vllm_engine._states.captures.n_bytes(requests[1])), 0.3
    kept: list[GenerationResult] = []
    try:
        with pytest.raises(TimeoutError, match="nobody took"):
            vllm_engine.generate([requests[1], requests[5]], on_result=kept.append)
    finally:
        budget.limit_bytes, budget.ttl_seconds = limit, ttl


def test_streams_of_an_async_client_are_steered_and_kept(vllm_engine, hf, requests) -> None:
    from src.models.vllm_async import AsyncVLLMEngine

    async def ask() -> list[GenerationResult]:
        async with AsyncVLLMEngine(vllm_engine) as engine:
            left = asyncio.ensure_future(engine.generate(replace(requests[1], id="left", max_tokens=400)))
            results = await asyncio.gather(*(engine.generate(request) for request in requests))
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
            await engine.generate(replace(requests[0], id="last", capture=None))
            return results

    results = asyncio.run(ask())
    for request in requests:
        assert_same_states(hf, request, results.pop(0))
    gc.collect()
    assert vllm_engine._states.captures.budget.in_flight == 0 and state(vllm_engine)["captures"] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"interventions": spec(op("add", 30, 1, coefficient=1.0))}, "layer 30; the model's layers are 0 to 29"),
        ({"interventions": spec({"op": "add", "coefficient": 1.0})}, "width 32"),
        ({"capture": Capture(places=((30, "resid_post"),))}, "layer 30"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(vllm_engine, requests, change, words) -> None:
    with pytest.raises(InputError, match=words):
        generate_all(vllm_engine, [replace(requests[0], **change)])


def test_an_unknown_fingerprint_is_refused_at_admission(vllm_engine, requests) -> None:
    from vllm.inputs.engine import tokens_input

    from src.models.vllm_tag import sampling_params

    stranger = replace(requests[1], interventions=spec(op("add", 3, 99, coefficient=3.0)))
    params = sampling_params(stranger, 5, vllm_engine.eos_ids, "v1")
    with pytest.raises(InputError, match="never registered"):
        vllm_engine._engine.add_request("stranger", tokens_input(list(stranger.token_ids)), params)
    assert generate_all(vllm_engine, [replace(requests[0], capture=None)])
