"""One request in vLLM's scheduler: the room it needs, its steps, its end."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from src.models.types import GenerationRequest, GenerationResult
from src.models.vllm_outputs import written_by
from src.models.vllm_states import States


class Scheduling:
    """The part of `VLLMEngine` that takes single requests through the scheduler, step by step."""

    facts: dict[str, str | None]
    eos_ids: frozenset[int]
    room: int
    context_length: int | None
    _engine: Any
    _lora: Any
    _states: States

    def __init__(self) -> None:
        self._broken: str | None = None
        """What ended a step half way."""

    def fitted(self, request: GenerationRequest) -> GenerationRequest:
        """The request with no more tokens than the context has room for; one of given tokens as it is."""
        if request.prompt_length is not None:
            return request
        room = (self.context_length or self.room) - len(request.token_ids)
        return request if request.max_tokens <= room else replace(request, max_tokens=room)

    def reserve(
        self, request: GenerationRequest, *, wait: bool = True, cancelled: Callable[[], bool] = lambda: False
    ) -> bool:
        """`Captures.reserve`, to be called before `add`."""
        return self._states.captures.reserve(self.fitted(request), wait=wait, cancelled=cancelled)

    def has_no_room(self, request: GenerationRequest) -> str | None:
        """`States.lack`: why a request with these interventions is to wait."""
        return self._states.lack(self.fitted(request))

    def give_back(self, request: GenerationRequest) -> None:
        """Undo `reserve` for a request that is not added."""
        self._states.captures.give_back(self.fitted(request))

    def add(self, request: GenerationRequest, top_k: int) -> None:
        """
        Hand one checked request, with room for its capture, to the scheduler. Raises InputError where a compiled engine
        has no room for its interventions now, RuntimeError after a step that was broken off; the room for its capture
        is given back then.
        """
        from vllm.inputs.engine import tokens_input

        from src.models.vllm_tag import sampling_params

        fitted = self.fitted(request)
        with contextlib.ExitStack() as undo:
            undo.callback(self._states.give_up, fitted)
            self._refuse_broken()
            self._states.take(fitted)
            params = sampling_params(fitted, top_k, self.eos_ids, str(self.facts["runner"]))
            prompt = tokens_input(list(request.token_ids))
            name = self._engine.add_request(request.id, prompt, params, lora_request=self._lora)
            undo.pop_all()
        self._states.begin(fitted, name)

    def step(self) -> list[Any]:
        """
        One step of the engine: vLLM's outputs so far of the requests that it advanced. After an error in it, or an
        interruption, the engine takes no more requests.
        """
        self._refuse_broken()
        try:
            return self._engine.step()
        except BaseException as error:
            # The prefix cache has the blocks that the step was to fill: whoever found them would get wrong numbers.
            self._broken = f"{type(error).__name__}: {error}"
            raise

    def has_work(self) -> bool:
        """Whether a request is unfinished."""
        return self._engine.has_unfinished_requests()

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests, and what was kept of them."""
        if self._broken:
            # Workers of other processes may be in the middle of the step still, and nothing is to come.
            return
        self._engine.abort_request(list(request_ids))
        self._states.drop(request_ids)

    def result(self, output: Any) -> GenerationResult:
        """
        A finished output of vLLM in our terms. Raises InputError when its logits were not numbers.
        """
        captures, gates = self._states.end(output.request_id, len(output.outputs[0].token_ids))
        written = written_by(output, self.eos_ids, str(self.facts["dtype"]))
        return GenerationResult(
            id=output.request_id, text=self.decode(written.token_ids), captures=captures, gates=gates, **vars(written)
        )

    def _refuse_broken(self) -> None:
        if self._broken:
            raise RuntimeError(f"vLLM was broken off within a step ({self._broken}); load the model again")
