"""
What vLLM's model makes of given tokens: the measures of `teacher_forcing`, out of the engine that generated.

Prompt and response go in as one prompt, with the boundary where it was. Projections are means reduced in the workers;
for divergences both passes' last hidden states stay in the workers, and their logits are compared there.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.common.capture_spec import OUTPUT, Capture
from src.common.errors import InputError
from src.common.resolved_interventions import ResolvedSpec
from src.models.hooks import Location
from src.models.log_probabilities import checked_log_probabilities, response_tokens, runs_of
from src.models.teacher_forcing import (
    ForcedRow,
    OnProjected,
    answered,
    checked_divergence,
    n_response,
    not_finite,
)
from src.models.token_sequences import TokenSequence
from src.models.types import GenerationRequest, GenerationResult
from src.models.vllm_driving import FORCED, drive
from src.models.vllm_states import States

MAX_HELD_BYTES = 256 << 20
"""Last hidden states that wait in the workers to be compared."""
TOP_K = 1


class Forcing:
    """The part of `VLLMEngine` that runs given tokens."""

    n_layers: int
    d_model: int
    room: int
    context_length: int | None
    no_steering: str | None
    _engine: Any
    _lora: Any
    _states: States

    def kl_per_token(self, rows: Sequence[ForcedRow]) -> list[Tensor]:
        """
        `teacher_forcing.kl_per_token` by vLLM. Both passes of a row go through the same kernels but in places of their
        own, so that a spec that changes nothing gives 0 up to rounding.
        """
        self._refuse_forcing()
        found: list[Tensor | None] = [None] * len(rows)
        for i, (sequence, spec) in enumerate(rows):
            n_tokens = n_response(sequence)
            if spec is None or not spec.operations:
                found[i] = torch.zeros(n_tokens, dtype=torch.float64)
        waiting = [i for i, each in enumerate(found) if each is None]
        for batch in _batches(rows, waiting, self._held_at_once(rows, waiting)):
            for i, values in self._compared(rows, batch):
                found[i] = checked_divergence(torch.tensor(values, dtype=torch.float64), rows[i][0].id)
        return found

    def log_probabilities(self, rows: Sequence[ForcedRow]) -> list[Tensor]:
        """`log_probabilities` by vLLM: the outputs stay in the workers, and become logits there."""
        self._refuse_forcing()
        found: list[Tensor | None] = [None] * len(rows)
        batch: list[list[int]] = []
        held, limit = 0, self._held_positions()
        for members in runs_of(rows):
            n_tokens = n_response(rows[members[0]][0])
            self._refuse_too_long(n_tokens, limit)
            if held + n_tokens > limit:
                self._note_log_probabilities(rows, batch, found)
                batch, held = [], 0
            batch.append(members)
            held += n_tokens
        if batch:
            self._note_log_probabilities(rows, batch, found)
        return found

    def _note_log_probabilities(
        self, rows: Sequence[ForcedRow], batch: Sequence[Sequence[int]], found: list[Tensor | None]
    ) -> None:
        requests = [self._last_states(f"{FORCED}{members[0]}", *rows[members[0]]) for members in batch]
        self._check_forced(requests)
        asked = {f"{FORCED}{m[0]}": [response_tokens(rows[i][0]) for i in m] for m in batch}
        ranks = self._run_kept(
            requests, lambda names: ("tiller_log_probabilities", [(names[r], t) for r, t in asked.items()])
        )
        for members, answers in zip(batch, ranks, strict=True):
            for i, values in zip(members, answers, strict=True):
                found[i] = checked_log_probabilities(torch.tensor(values, dtype=torch.float64), rows[i][0].id)

    def mean_projections(self, rows: Sequence[ForcedRow], place: Location, direction: np.ndarray) -> list[float]:
        """`teacher_forcing.mean_projections` by vLLM: the mean of the hidden states is projected, in float64."""
        self._refuse_forcing()
        found: dict[str, float] = {}
        for sequence, _ in rows:
            n_response(sequence)
        requests = [
            _projected(f"{FORCED}{i}", sequence, spec, place) for i, (sequence, spec) in enumerate(rows)
        ]  # fmt: skip

        def note(output: Any) -> None:
            name = rows[int(output.request_id.removeprefix(FORCED))][0].id
            found[output.request_id] = self._mean(output, place, direction, name)

        self._check_forced(requests)
        drive(self, deque(requests), TOP_K, note)
        return [found[request.id] for request in requests]

    def generate_projected(
        self, requests: Sequence[GenerationRequest], place: Location, direction: np.ndarray, *, on_result: OnProjected,
        on_tokens: Callable[[int], None], batch_size: int, top_k: int,
    ) -> None:  # fmt: skip
        """
        `teacher_forcing.generate_projected` by vLLM, in one stream: an answer is run again, among those that are still
        being written, as soon as it is there. batch_size: not used. An answer ends a token before the context does:
        vLLM runs no prompt that fills it.
        """
        self._refuse_forcing()
        limit = min(self.context_length or self.room, self.room) - 1
        asked = {request.id: _shortened(request, limit) for request in requests}
        self.check(list(asked.values()), top_k)
        waiting = deque(asked.values())
        open_results: dict[str, GenerationResult] = {}

        def note(output: Any) -> None:
            if output.request_id.startswith(FORCED):
                result = open_results.pop(output.request_id.removeprefix(FORCED))
                on_result(result, self._mean(output, place, direction, result.id))
                return
            result = self.result(output)
            if not result.token_ids:
                on_result(result, None)
                return
            # Copies: what waits here must not keep room from the request that it waits for.
            captures = {name: tensor.clone() for name, tensor in result.captures.items()}
            open_results[result.id] = replace(result, captures=captures)
            request = asked[result.id]
            waiting.appendleft(_projected(f"{FORCED}{result.id}", answered(request, result), request.spec, place))

        drive(self, waiting, top_k, note, on_tokens)

    def _compared(self, rows: Sequence[ForcedRow], batch: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[float]]]:
        """(row, divergence of each token) of some rows; those of one list have the same tokens."""
        requests = []
        for number, members in enumerate(batch):
            sequence = rows[members[0]][0]
            requests.append(self._last_states(f"{FORCED}plain-{number}", sequence, None))
            requests += [self._last_states(f"{FORCED}{i}", sequence, rows[i][1]) for i in members]
        self._check_forced(requests)

        def pairs(names: dict[str, str]) -> tuple[str, list]:
            return "tiller_divergences", [
                (names[f"{FORCED}plain-{number}"], names[f"{FORCED}{i}"], n_response(rows[i][0]))
                for number, members in enumerate(batch)
                for i in members
            ]

        values = self._run_kept(requests, pairs)
        yield from zip([i for members in batch for i in members], values, strict=True)

    def _run_kept(
        self, requests: Sequence[GenerationRequest], call: Callable[[dict[str, str]], tuple[str, list]]
    ) -> Any:
        """
        Run requests whose outputs stay in the workers, and what a worker's method makes of them. call: from the names
        by which the workers know the requests to the method and its argument.
        """
        names: dict[str, str] = {}

        def note(output: Any) -> None:
            self._states.leave(output.request_id)
            names[output.request_id] = self._states.captures.name(output.request_id)

        try:
            drive(self, deque(requests), TOP_K, note)
            method, argument = call(names)
            ranks = self._engine.collective_rpc(method, args=(argument, self._lora))
        finally:
            self._states.captures.drop([request.id for request in requests])
        return next(each for each in ranks if each is not None)

    def _last_states(self, name: str, sequence: TokenSequence, spec: ResolvedSpec | None) -> GenerationRequest:
        # The last token only predicts what comes after the response; a response up to the context's end has room so.
        tokens, start = sequence.token_ids[:-1], sequence.prompt_length - 1
        capture = Capture(places=((self.n_layers - 1, OUTPUT),), start=start, end=len(tokens))
        return _forced(name, tokens, sequence.prompt_length, spec, capture)

    def _held_at_once(self, rows: Sequence[ForcedRow], waiting: Sequence[int]) -> int:
        """Response tokens whose states may wait. Raises InputError when those of one pair are too many."""
        limit = self._held_positions()
        self._refuse_too_long(2 * max((n_response(rows[i][0]) for i in waiting), default=0), limit)
        return limit

    @property
    def _bytes_per_position(self) -> int:
        return self.d_model * self._engine.model_config.dtype.itemsize

    def _held_positions(self) -> int:
        return min(MAX_HELD_BYTES, self._states.captures.budget.limit_bytes) // self._bytes_per_position

    def _refuse_too_long(self, needed: int, limit: int) -> None:
        if needed > limit:
            raise InputError(
                f"--capture_budget_gb: it takes {needed * self._bytes_per_position / 1e9:.3g} GB of hidden states; "
                f"raise it, or lower --max_tokens"
            )

    def _mean(self, output: Any, place: Location, direction: np.ndarray, name: str) -> float:
        self._states.leave(output.request_id)
        (mean,) = self._states.captures.fetch(output.request_id, 1).values()
        value = float(mean[0].double().numpy() @ np.asarray(direction, dtype=np.float64))
        # As in transformers' pass, where projections are float32.
        if not abs(value) <= np.finfo(np.float32).max:
            raise InputError(not_finite(name, "hidden states"))
        return value

    def _check_forced(self, requests: Sequence[GenerationRequest]) -> None:
        for request in requests:
            self._states.check(request)
            if len(request.token_ids) >= self.room:
                raise InputError(
                    f"sequence {request.id.removeprefix(FORCED)!r}: vLLM runs {self.room - 1} given tokens at most, "
                    f"and it has {len(request.token_ids)}; lower --max_tokens, or take --backend hf"
                )

    def _refuse_forcing(self) -> None:
        if self.no_steering:
            raise InputError(f"vLLM can keep no hidden states to measure: {self.no_steering}")


def _forced(
    name: str, tokens: tuple[int, ...], prompt_length: int, spec: ResolvedSpec | None, capture: Capture
) -> GenerationRequest:
    return GenerationRequest(
        id=name, token_ids=tokens, max_tokens=1, prompt_length=prompt_length, interventions=spec or (), capture=capture
    )


def _projected(name: str, sequence: TokenSequence, spec: ResolvedSpec | None, place: Location) -> GenerationRequest:
    start, end = sequence.prompt_length, len(sequence.token_ids)
    capture = Capture(places=(tuple(place),), start=start, end=end, mean=True)
    return _forced(name, sequence.token_ids, start, spec, capture)


def _shortened(request: GenerationRequest, limit: int) -> GenerationRequest:
    """The request with room behind its answer. Raises InputError when there is none for a single token."""
    room = limit - len(request.token_ids)
    if room < 1:
        raise InputError(
            f"request {request.id!r}: its prompt has {len(request.token_ids)} tokens, and answers that are measured on "
            f"vLLM need a prompt of at most {limit - 1}; shorten the prompt, or take --backend hf"
        )
    return request if request.max_tokens <= room else replace(request, max_tokens=room)


def _batches(rows: Sequence[ForcedRow], waiting: Sequence[int], limit: int) -> Iterator[list[list[int]]]:
    """
    Lists of rows with the same tokens, several at a time: so many that each list's response tokens, once for the
    unsteered pass and once a row, make at most `limit`.
    """
    groups: dict[tuple, list[int]] = {}
    for i in waiting:
        groups.setdefault((rows[i][0].token_ids, rows[i][0].prompt_length), []).append(i)
    batch: list[list[int]] = []
    held = 0
    for members in groups.values():
        n_tokens = n_response(rows[members[0]][0])
        most = max(1, limit // n_tokens - 1)
        for start in range(0, len(members), most):
            some = members[start : start + most]
            needed = n_tokens * (len(some) + 1)
            if batch and held + needed > limit:
                yield batch
                batch, held = [], 0
            batch.append(some)
            held += needed
    if batch:
        yield batch
