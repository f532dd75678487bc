"""The interventions that a vLLM engine's requests name: sent to the workers once, freed when many are unused."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from src.common.errors import InputError
from src.common.resolved_interventions import ResolvedCondition, ResolvedSpec
from src.models.vllm_compiled import REMEDY, Declared, place_of
from src.models.vllm_plan import Active, Program
from src.models.vllm_prefix import KEYS

UNUSED_KEPT = 256
"""Specs that no request names, kept for the next that does."""


class Occupied:
    """What running requests may take of a compiled engine's tables, counted before a request is handed to vLLM."""

    def __init__(self, declared: Declared) -> None:
        self._declared = declared
        self._treatments: dict[str, set[Active]] = {}
        self._conditions: dict[str, tuple[ResolvedCondition, ...]] = {}

    def lack(self, spec: ResolvedSpec, prompt_length: int, n_tokens: int) -> str | None:
        """Why there is no room now for a spec on `n_tokens` tokens; None where there is."""
        mine = self._treatments.get(spec.fingerprint, set()) | Program(spec).treatments(prompt_length, n_tokens)
        n_slots = sum(map(len, (self._treatments | {spec.fingerprint: mine}).values()))
        if n_slots > self._declared.slots:
            return f"{n_slots} interventions at once: compiled for {self._declared.slots}; {REMEDY}"
        specs = (self._conditions | {spec.fingerprint: spec.conditions}).values()
        asked = {condition.key: place_of(condition) for conditions in specs for condition in conditions}
        for place, n_conditions in Counter(asked.values()).items():
            if n_conditions > self._declared.conditions:
                return f"{n_conditions} conditions at {place}: compiled for {self._declared.conditions}; {REMEDY}"
        return None

    def take(self, spec: ResolvedSpec, prompt_length: int, n_tokens: int) -> None:
        """A request with this spec is about to run."""
        mine = Program(spec).treatments(prompt_length, n_tokens)
        self._treatments[spec.fingerprint] = self._treatments.get(spec.fingerprint, set()) | mine
        self._conditions[spec.fingerprint] = spec.conditions

    def leave(self, fingerprint: str) -> None:
        """No request names a spec any more."""
        self._treatments.pop(fingerprint, None)
        self._conditions.pop(fingerprint, None)


class Specs:
    """Which specs the workers know, and which requests name them."""

    def __init__(self, call: Callable[..., Any], declared: Declared | None = None) -> None:
        """call: the engine's `collective_rpc`. declared: what a compiled engine has room for."""
        self._call = call
        self._declared = declared
        self._occupied = Occupied(declared) if declared else None
        self._users: dict[str, set[str]] = {}
        """Fingerprint → requests; the specs used longest ago first."""
        self._named: dict[str, str] = {}

    def refuse(self, spec: ResolvedSpec, prompt_length: int, n_tokens: int) -> None:
        """Raises InputError for a spec that a compiled engine could not even run alone."""
        if self._declared:
            self._declared.refuse(spec)
            lack = Occupied(self._declared).lack(spec, prompt_length, n_tokens)
            if lack:
                raise InputError(lack)

    def lack(self, spec: ResolvedSpec, prompt_length: int, n_tokens: int) -> str | None:
        """Why a compiled engine has no room now for one more request; None where there is."""
        return self._occupied.lack(spec, prompt_length, n_tokens) if self._occupied else None

    def take(self, request_id: str, spec: ResolvedSpec, prompt_length: int, n_tokens: int) -> None:
        """A request of at most `n_tokens` tokens is about to name a spec. Raises InputError where there is no room."""
        lack = self.lack(spec, prompt_length, n_tokens)
        if lack:
            raise InputError(f"request {request_id!r}: {lack}, or fewer requests at once")
        fingerprint = spec.fingerprint
        if fingerprint not in self._users:
            self._make_room()
            KEYS.add(fingerprint, spec)
            self._call("tiller_register", args=(fingerprint, spec))
        if self._occupied:
            self._occupied.take(spec, prompt_length, n_tokens)
        self._users[fingerprint] = self._users.pop(fingerprint, set()) | {request_id}
        self._named[request_id] = fingerprint

    def leave(self, request_id: str) -> None:
        """A request is over; one that named nothing is none of ours."""
        fingerprint = self._named.pop(request_id, None)
        if fingerprint is not None:
            self._users[fingerprint].discard(request_id)
            if self._occupied and not self._users[fingerprint]:
                self._occupied.leave(fingerprint)

    def _make_room(self) -> None:
        unused = [fingerprint for fingerprint, users in self._users.items() if not users]
        if len(unused) >= UNUSED_KEPT:
            gone = unused[: len(unused) // 2]
            # Workers learn of a request's end with the next step only; whoever is not through stays.
            forgotten = self._call("tiller_forget", args=(gone,))
            for fingerprint in set.intersection(*map(set, forgotten)):
                del self._users[fingerprint]
