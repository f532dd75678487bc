"""Requests taken through a vLLM engine to their end."""

from collections import deque
from collections.abc import Callable
from typing import Any

from src.models.types import GenerationRequest

FORCED = "forced:"
"""Before the id of a request that runs given tokens."""
WAITING_PER_ROW = 4
"""Requests handed to the scheduler for each row it decodes at once; more would only take memory."""


def drive(
    loaded: Any, waiting: deque[GenerationRequest], top_k: int, on_output: Callable[[Any], None],
    on_tokens: Callable[[int], None] = lambda n: None,
) -> None:  # fmt: skip
    """
    Run requests, and those that `on_output` adds to them, to their end on a VLLMEngine.

    on_output: gets each finished output of vLLM. on_tokens: called after each step with the number of tokens that it
    added to answers; given tokens are none.
    """
    running: dict[str, int] = {}
    try:
        while True:
            _top_up(loaded, running, waiting, top_k)
            if not running:
                return
            added, finished = 0, []
            for output in loaded.step():
                n_tokens = _answered(output, loaded.eos_ids)
                added += n_tokens - running[output.request_id]
                running[output.request_id] = n_tokens
                finished += [output] if output.finished else []
            if added:
                on_tokens(added)
            for output in finished:
                del running[output.request_id]
                on_output(output)
    finally:
        # After an interruption the engine must not go on with what nobody waits for.
        if running and not loaded.closed:
            loaded.abort(list(running))


def _top_up(loaded: Any, running: dict[str, int], waiting: deque[GenerationRequest], top_k: int) -> None:
    while waiting and len(running) < WAITING_PER_ROW * loaded.rows_at_once:
        request = waiting[0]
        assert request.id not in running, f"two requests are called {request.id!r}"
        # What others occupy of a compiled engine's tables is free once they are through.
        if running and loaded.has_no_room(request):
            return
        # While others run, what they kept may yet be taken.
        if not loaded.reserve(request, wait=not running):
            return
        loaded.add(waiting.popleft(), top_k)
        running[request.id] = 0


def _answered(output: Any, eos_ids: frozenset[int]) -> int:
    """Tokens of the answer so far, the one that ends it not counted."""
    tokens = output.outputs[0].token_ids
    if output.request_id.startswith(FORCED) or not tokens:
        return 0
    return len(tokens) - (output.finished and tokens[-1] in eos_ids)
