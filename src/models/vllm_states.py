"""
The client's side of what requests change and keep in a vLLM engine: refused before they are in a step with others',
counted while they run, handed back or freed when they end.
"""

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from src.common.capture_spec import OUTPUT
from src.common.directions_file import HOOK_POINTS
from src.common.errors import InputError
from src.common.resolved_interventions import ResolvedOperation, ResolvedSpec
from src.models.types import GenerationRequest
from src.models.vllm_compiled import Declared
from src.models.vllm_fetch import Captures
from src.models.vllm_specs import Specs

NOT_KEPT = "a compiled model keeps no hidden states; --enforce_eager can"
Gates = tuple[tuple[float, ...], ...]
"""What each condition of a spec read, position by position."""


class States:
    """Interventions, captures and conditions of one engine's requests."""

    def __init__(
        self, call: Callable[..., Any], n_layers: int, d_model: int, captures: Captures, declared: Declared | None
    ) -> None:
        """call: the engine's `collective_rpc`. declared: what a compiled model can do to hidden states."""
        self._call = call
        self._n_layers = n_layers
        self._d_model = d_model
        self._lacking: dict[tuple[int, str], str] = {}
        self._gated: dict[str, tuple[str, int, int]] = {}
        self.declared = declared
        self.captures = captures
        self.specs = Specs(call, declared)

    def find_lacking(self) -> None:
        """Ask the workers where nothing can be changed or kept."""
        self._lacking = dict(ChainMap(*self._call("tiller_lacking")))

    def check(self, request: GenerationRequest) -> None:
        """Raises InputError for what can be neither changed nor kept, and what a compiled model has no room for."""
        if request.capture and self.declared:
            raise InputError(f"request {request.id!r}: {NOT_KEPT}")
        check_states(request, self._n_layers, self._d_model, self._lacking)
        if request.spec:
            self.specs.refuse(request.spec, request.boundary, _most_tokens(request))

    def lack(self, request: GenerationRequest) -> str | None:
        """Why a compiled engine has no room now for a request's interventions; None where there is."""
        return self.specs.lack(request.spec, request.boundary, _most_tokens(request)) if request.spec else None

    def take(self, request: GenerationRequest) -> None:
        """Make a request's interventions known to the workers. Raises InputError where there is no room for them."""
        if request.spec:
            self.specs.take(request.id, request.spec, request.boundary, _most_tokens(request))

    def begin(self, request: GenerationRequest, name: str) -> None:
        """A request was handed to vLLM under a name of its own."""
        if request.capture:
            self.captures.begin(request, name)
        if request.spec and request.spec.conditions:
            self._gated[request.id] = (name, len(request.token_ids), len(request.spec.conditions))

    def give_up(self, request: GenerationRequest) -> None:
        """A request for whose capture there was room is not handed to vLLM."""
        self.specs.leave(request.id)
        self.captures.give_back(request)

    def end(self, request_id: str, n_generated: int) -> tuple[dict[str, Tensor], Gates]:
        """What was kept of a request that ended after `n_generated` tokens, as `Captures.fetch`, and its conditions."""
        self.specs.leave(request_id)
        try:
            return self.captures.fetch(request_id, n_generated), self._gates(request_id, n_generated)
        finally:
            self._drop_gates([request_id])

    def leave(self, request_id: str) -> None:
        """A request is over; what its conditions read is not asked for, and what it kept stays until it is fetched."""
        self.specs.leave(request_id)
        self._drop_gates([request_id])

    def drop(self, request_ids: Sequence[str]) -> None:
        """Free everything of requests that nobody waits for."""
        for request_id in request_ids:
            self.specs.leave(request_id)
        self.captures.drop(request_ids)
        self._drop_gates(request_ids)

    def _drop_gates(self, request_ids: Sequence[str]) -> None:
        gone = [self._gated.pop(request_id)[0] for request_id in request_ids if request_id in self._gated]
        if gone:
            self._call("tiller_drop_gates", args=(gone,))

    def _gates(self, request_id: str, n_generated: int) -> Gates:
        if request_id not in self._gated:
            return ()
        name, n_prompt, n_conditions = self._gated.pop(request_id)
        found: dict[int, list[float]] = {}
        for part in self._call("tiller_gates", args=(name, n_prompt + n_generated - 1)):
            found |= part
        assert sorted(found) == list(range(n_conditions)), f"conditions {sorted(found)} of {n_conditions} were read"
        return tuple(tuple(found[number]) for number in range(n_conditions))


def check_states(
    request: GenerationRequest, n_layers: int, d_model: int, lacking: Mapping[tuple[int, str], str]
) -> None:
    """
    Raises InputError for a layer that the model lacks, a place in `lacking`, which says why, vectors of another width
    and a condition that is read too late.
    """
    each = (*request.spec.operations, *request.spec.conditions) if request.spec else ()
    kept = request.capture.places if request.capture else ()
    for layer, hook_point in sorted({(o.layer, o.hook_point) for o in each} | set(kept)):
        if not 0 <= layer < n_layers:
            raise InputError(f"request {request.id!r}: layer {layer}; the model's layers are 0 to {n_layers - 1}")
        if hook_point == OUTPUT and layer != n_layers - 1:
            raise InputError(f"request {request.id!r}: {OUTPUT} of layer {layer}; it is that of layer {n_layers - 1}")
        if (layer, hook_point) in lacking:
            raise InputError(f"request {request.id!r}: {hook_point} of layer {layer}: {lacking[layer, hook_point]}")
    for direction in (o.direction for o in each):
        if direction.shape != (d_model,):
            raise InputError(
                f"request {request.id!r}: directions of width {len(direction)}; the model's hidden states are "
                f"{d_model} wide"
            )
    if request.spec:
        _check_order(request.id, request.spec)


def _check_order(request_id: str, spec: ResolvedSpec) -> None:
    for operation in spec.operations:
        condition = operation.condition
        if condition and _order(condition.layer, condition.hook_point) > _order_of(operation):
            raise InputError(
                f"request {request_id!r}: a condition at {condition.hook_point} of layer {condition.layer}, after "
                f"{operation.hook_point} of layer {operation.layer}, where it is needed"
            )


def _order_of(operation: ResolvedOperation) -> tuple[int, int]:
    return _order(operation.layer, operation.hook_point)


def _order(layer: int, hook_point: str) -> tuple[int, int]:
    return layer, HOOK_POINTS.index(hook_point)


def _most_tokens(request: GenerationRequest) -> int:
    return len(request.token_ids) + request.max_tokens
