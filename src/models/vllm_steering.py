"""
What a vLLM worker does to the hidden states of each request, and which of them it keeps: hooks on the layers that some
request needs, told before every step which tokens they are for. In eager mode; without such requests no hook is set.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from src.common.capture_spec import OUTPUT
from src.common.errors import InputError
from src.common.resolved_interventions import ResolvedCondition, ResolvedSpec
from src.models.hooks import Location
from src.models.vllm_capture import CaptureStore
from src.models.vllm_compiled import REMEDY, CompiledTables, Declared, place_of
from src.models.vllm_gates import GateStore
from src.models.vllm_hidden import Hidden, hook, lacking, local_layers, rewriting, traced_hook
from src.models.vllm_plan import Asked, Gated, SlotBook, build_plan
from src.models.vllm_tables import Step, Tables
from src.ops.interventions import projection

HELD = "tiller_held_"
"""Before the number of a condition, among what pipeline stages pass on."""


class WorkerSteering:
    """The interventions and captures of one worker."""

    def __init__(self, runner: Any) -> None:
        self.problem: str | None = None
        """Why hidden states can be neither changed nor kept in this model."""
        try:
            self.layers = local_layers(runner.get_model())
        except InputError as error:
            self.layers, self.problem = {}, str(error)
        self.lacking = lacking(self.layers)
        """(layer, hook point) of this rank where nothing can be changed or kept → why."""
        self.parts = True
        """Whether hidden states come in two parts to be added; found out at the start."""
        self.asked: dict[str, Asked] = {}
        self.captures = CaptureStore()
        self.gates = GateStore()
        d_model = runner.model_config.get_hidden_size()
        self.tables = Tables(d_model, runner.device)
        self.book = SlotBook(self.tables.fill)
        self._device = runner.device
        self._hooks: dict[Location, torch.utils.hooks.RemovableHandle] = {}
        self._rewriting: list[torch.utils.hooks.RemovableHandle] = []
        self._rewritten: list[int] = []
        self._model = runner.get_model()
        modules = self._model.modules()
        self._compiled = [module for module in modules if getattr(module, "do_not_compile", None) is False]
        self._step: Step | None = None
        self._before: Any = None
        """What the pipeline stage before this one passed on in this step, vLLM's IntermediateTensors."""
        self._needed: set[Location] = set()
        self._ran: set[Location] = set()

    def register(self, fingerprint: str, spec: ResolvedSpec) -> None:
        """Make a spec known, to be named by requests."""
        self.book.add(fingerprint, spec)

    def forget(self, fingerprint: str) -> bool:
        """Free what a spec takes; False, and nothing done, while a request names it."""
        if any(asked.fingerprint == fingerprint for asked in self.asked.values()):
            return False
        for slot in self.book.remove(fingerprint):
            self.tables.clear(slot)
        return True

    def rewrite(self, reading: str | None) -> int:
        """
        Until called with None, every layer's output is rewritten: "sum" puts the sum of its two tensors into the second
        and zeros into the first, "first" puts zeros into the second. One of them changes nothing. Returns how many
        times a layer's output was, since the last call.
        """
        for handle in self._rewriting:
            handle.remove()
        self.run_uncompiled(reading is not None)
        hook_of = lambda: rewriting(reading, partial(self._rewritten.append, 1))  # noqa: E731
        self._rewriting = [layer.register_forward_hook(hook_of()) for layer in self.layers.values()] if reading else []
        count = len(self._rewritten)
        self._rewritten.clear()
        return count

    def run_uncompiled(self, on: bool) -> None:
        """Whether a compiled model is to run as it was written, hooks and all."""
        for module in self._compiled:
            module.do_not_compile = on

    def begin(self, request_id: str, asked: Asked) -> None:
        """A request comes in, for the first time or again after it was preempted."""
        self.asked[request_id] = asked

    def end(self, request_ids: Sequence[str]) -> None:
        """Requests are over."""
        for request_id in request_ids:
            self.asked.pop(request_id, None)

    def take(self, request_id: str, n_positions: int, mean: bool) -> dict[str, Tensor]:
        """`CaptureStore.take`, after which nothing more of the request is kept."""
        self._stop_keeping(request_id)
        return self.captures.take(request_id, n_positions, mean)

    def drop(self, request_id: str) -> None:
        """Free what was kept of a request that nobody waits for."""
        self._stop_keeping(request_id)
        self.captures.drop(request_id)

    def counts(self) -> dict[str, int]:
        """How much is held here."""
        return {
            "requests": len(self.asked),
            "captures": len({*self.captures.request_ids, *self.gates.request_ids}),
            "specs": len(self.book),
            "hooks": len(self._hooks),
        }

    def plan_step(self, request_ids: Sequence[str], n_scheduled: Sequence[int], n_computed: Sequence[int]) -> None:
        """Say what the next forward call computes: tokens of each request in the order of the batch's rows."""
        if not self.asked:
            return
        plan = build_plan(request_ids, n_scheduled, n_computed, self.asked, self.book)
        needed = self.tables.places(plan.present) | {place for kept in plan.kept for place in kept.capture.places}
        needed |= {place for gated in plan.gated for place in map(place_of, self.book.conditions(gated.fingerprint))}
        self._needed = {place for place in needed if place.layer in self.layers}
        for place in self._needed - self._hooks.keys():
            module = self._model if place.hook_point == OUTPUT else self.layers[place.layer]
            self._hooks[place] = hook(module, place, self.parts, partial(self._see, place))
        self._step = Step(plan, self._device) if plan.present or plan.kept or plan.gated else None
        if self._step and plan.gated and self._before is not None:
            tensors = self._before.tensors
            for name in [name for name in tensors if name.startswith(HELD)]:
                self._step.held[int(name.removeprefix(HELD))] = tensors.pop(name).bool()

    def take_over(self, before: Any) -> None:
        """A step begins with what the pipeline stage before passed on, None on the first."""
        self._before = before

    def pass_on(self, tensors: dict[str, Tensor]) -> None:
        """Add which conditions hold to what the next stage gets: the operations under them may be there."""
        held = self._step.held if self._step else {}
        tensors.update({f"{HELD}{number}": each.to(torch.uint8) for number, each in held.items()})

    def check_step(self) -> None:
        """Raises RuntimeError when a hook did not run in the forward call that was planned."""
        missed = self._needed - self._ran
        if missed:
            raise RuntimeError(f"the hooks at {', '.join(map(str, sorted(missed)))} did not run in a step of vLLM")

    def clear_step(self) -> None:
        """Forget the step, so that warm-up calls see none."""
        self._step = self._before = None
        self._needed.clear()
        self._ran.clear()

    def _read_gates(self, place: Location, step: Step, hidden: Hidden) -> None:
        for gated in step.plan.gated:
            for number, condition in enumerate(self.book.conditions(gated.fingerprint)):
                if place_of(condition) == place:
                    direction = torch.from_numpy(condition.direction.copy()).to(self._device)
                    p = projection(hidden[gated.start : gated.end], direction)
                    self.gates.add(gated.request_id, number, gated.position, p)

    def _stop_keeping(self, request_id: str) -> None:
        # A step that was begun before the request's end was known may still come.
        if request_id in self.asked:
            self.asked[request_id] = replace(self.asked[request_id], capture=None)

    def _see(self, place: Location, hidden: Hidden) -> None:
        step = self._step
        if step is None or place not in self._needed:
            return
        if place in self._ran:
            raise RuntimeError(f"the hook at {place} ran twice in one step of vLLM")
        self._ran.add(place)
        if len(hidden) < step.plan.n_tokens:
            raise RuntimeError(f"{len(hidden)} hidden states at {place} for {step.plan.n_tokens} tokens")
        self._read_gates(place, step, hidden)
        self.tables.act(place, step, hidden.__getitem__, hidden.__setitem__)
        self.captures.keep(place, step.plan.kept, hidden)


class CompiledSteering(WorkerSteering):
    """
    The interventions of one worker whose model is compiled with them: made once its weights are there and before
    anything is traced.
    """

    def __init__(self, runner: Any, declared: Declared) -> None:
        from vllm.distributed.parallel_state import get_pp_group

        super().__init__(runner)
        if self.problem:
            raise InputError(self.problem)
        if declared.reading and get_pp_group().world_size > 1:
            raise InputError(f"conditions in a compiled model of several pipeline stages; {REMEDY}")
        d_model = runner.model_config.get_hidden_size()
        # A step may be padded beyond its tokens.
        self._channels: list[tuple[Gated, list[tuple[int, int]]]] = []
        self.tables = CompiledTables(declared, d_model, 2 * runner.max_num_tokens, runner.device)
        self.book = SlotBook(self.tables.fill)
        for place in self.tables.hooked:
            if place in self.lacking:
                raise InputError(f"{place}: {self.lacking[place]}")
            if place.layer in self.layers:
                traced_hook(self.layers[place.layer], place, partial(self.tables.in_graph, place))

    def plan_step(self, request_ids: Sequence[str], n_scheduled: Sequence[int], n_computed: Sequence[int]) -> None:
        """Put what the next forward call computes into the tables."""
        if not self.asked:
            return
        plan = build_plan(request_ids, n_scheduled, n_computed, self.asked, self.book)
        if plan.kept:
            raise RuntimeError("a compiled model keeps no hidden states")
        channels = [
            (gated, [(i, self.tables.channel(c, gated.fingerprint)) for i, c in self._local(gated)])
            for gated in plan.gated
        ]
        self.tables.load(plan)
        self._channels = channels

    def check_step(self) -> None:
        """Take what the conditions read out of the tables."""
        for gated, channels in self._channels:
            for number, channel in channels:
                p = self.tables.values[channel, gated.start : gated.end].clone()
                self.gates.add(gated.request_id, number, gated.position, p)

    def end(self, request_ids: Sequence[str]) -> None:
        """Requests are over; what only they took of the tables, which do not grow, is free for others."""
        gone = {self.asked[request_id].fingerprint for request_id in request_ids if request_id in self.asked}
        super().end(request_ids)
        for fingerprint in gone - {None, *(asked.fingerprint for asked in self.asked.values())}:
            for slot in self.book.release(fingerprint):
                self.tables.clear(slot)
            self.tables.leave(fingerprint)

    def _local(self, gated: Gated) -> list[tuple[int, ResolvedCondition]]:
        numbered = enumerate(self.book.conditions(gated.fingerprint))
        return [(i, condition) for i, condition in numbered if condition.layer in self.layers]

    def clear_step(self) -> None:
        """Forget the step."""
        self._channels = []
        if self.asked:
            self.tables.load(None)
