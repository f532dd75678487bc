"""What runs inside a vLLM worker: our sampler, and the interventions and captures of each request."""

import os
from collections.abc import Sequence
from typing import Any

from src.common.resolved_interventions import ResolvedSpec
from src.models.shared_segments import write_segment
from src.models.vllm_compiled import KEY, Declared
from src.models.vllm_forced_worker import Asked, Pair, divergences, log_probabilities
from src.models.vllm_sampler import SamplerV2, install_v1
from src.models.vllm_steering import CompiledSteering, WorkerSteering
from src.models.vllm_tag import asked_of

COMPILED = "tiller_compiled"
"""Where a model runner keeps the steering that its model was compiled with."""


class TillerWorker:
    """Methods that vLLM mixes into its worker (`worker_extension_cls`), called through `collective_rpc`."""

    model_runner: Any

    def tiller_shared_memory(self) -> str:
        """What is in the names of the shared memory that this worker's CPU collectives use, "" where they use none."""
        return os.environ.get("VLLM_DIST_IDENT", "")

    def tiller_install(self) -> str:
        """Puts our sampler and the steering in place; returns the model runner's generation, "v1" or "v2"."""
        runner = self.model_runner
        self.tiller_steering = getattr(runner, COMPILED, None) or WorkerSteering(runner)
        is_v2 = hasattr(runner, "req_states")
        if is_v2:
            runner.sampler = SamplerV2.around(runner.sampler)
            tell_positions_v2(runner, self.tiller_steering)
        else:
            make_room_between_stages(runner)
            install_v1(runner)
            tell_positions_v1(runner, self.tiller_steering)
        watch_steps(runner, self.tiller_steering)
        return "v2" if is_v2 else "v1"

    def tiller_register(self, fingerprint: str, spec: ResolvedSpec) -> None:
        """Keeps the vectors of a spec, to be named by requests."""
        self.tiller_steering.register(fingerprint, spec)

    def tiller_forget(self, fingerprints: Sequence[str]) -> list[str]:
        """Frees what specs take unless a request still names them; returns those that are freed."""
        return [fingerprint for fingerprint in fingerprints if self.tiller_steering.forget(fingerprint)]

    def tiller_take(self, request_id: str, n_positions: int, mean: bool) -> dict | None:
        """
        What this worker kept of a request, moved into a segment of shared memory: its descriptor. None on the ranks of
        a tensor-parallel group whose first keeps the same, and on those that kept nothing.
        """
        from vllm.distributed.parallel_state import get_tp_group

        tensors = self.tiller_steering.take(request_id, n_positions, mean)
        return write_segment(tensors) if tensors and get_tp_group().rank_in_group == 0 else None

    def tiller_divergences(self, pairs: Sequence[Pair], adapter: Any) -> list[list[float]] | None:
        """See `divergences`."""
        return divergences(self.model_runner, self.tiller_steering.captures, pairs, adapter)

    def tiller_log_probabilities(self, asked: Sequence[Asked], adapter: Any) -> list[list[list[float]]] | None:
        """See `log_probabilities`."""
        return log_probabilities(self.model_runner, self.tiller_steering.captures, asked, adapter)

    def tiller_gates(self, request_id: str, n_positions: int) -> dict[int, list[float]]:
        """What the conditions read on this rank for a request that has ended: number → one projection a position."""
        return self.tiller_steering.gates.take(request_id, n_positions)

    def tiller_drop_gates(self, request_ids: Sequence[str]) -> None:
        """Frees what the conditions of requests read."""
        for request_id in request_ids:
            self.tiller_steering.gates.drop(request_id)

    def tiller_drop(self, request_ids: Sequence[str]) -> None:
        """Frees what was kept of requests that nobody waits for."""
        for request_id in request_ids:
            self.tiller_steering.drop(request_id)

    def tiller_problem(self) -> str | None:
        """Why hidden states can be neither changed nor kept in this model."""
        return self.tiller_steering.problem

    def tiller_lacking(self) -> dict[tuple[int, str], str]:
        """See `WorkerSteering.lacking`."""
        return self.tiller_steering.lacking

    def tiller_rewrite(self, reading: str | None) -> int:
        """See `WorkerSteering.rewrite`."""
        return self.tiller_steering.rewrite(reading)

    def tiller_run_uncompiled(self, on: bool) -> None:
        """See `WorkerSteering.run_uncompiled`."""
        self.tiller_steering.run_uncompiled(on)

    def tiller_read_as(self, adds: bool) -> None:
        """Says whether the two tensors that layers pass on add up to the residual stream."""
        self.tiller_steering.parts = adds

    def tiller_state(self) -> dict[str, int]:
        """How much is held here: requests that are steered or kept, captures, specs, hooks."""
        return self.tiller_steering.counts()

    def tiller_adapter_modules(self) -> dict[str, list[str]]:
        """Names of the model's modules on which loaded adapters act, and of adapter weights that have no module."""
        manager = self.model_runner.lora_manager._adapter_manager
        weights = {name for adapter in manager._registered_adapters.values() for name in adapter.loras}
        return {"acting": sorted(weights & set(manager.modules)), "homeless": sorted(weights - set(manager.modules))}


def make_room_between_stages(runner: Any) -> None:
    """vLLM makes the buffer of a later pipeline stage while it warms up, which the CPU in eager mode leaves out."""
    from vllm.distributed.parallel_state import get_pp_group

    if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def watch_steps(runner: Any, steering: WorkerSteering) -> None:
    """Tells the steering which requests come and go, and makes it check every step."""
    from vllm.sequence import IntermediateTensors

    plain = runner.execute_model

    def execute_model(scheduler_output: Any, intermediate_tensors: Any = None, *args: Any, **settings: Any) -> Any:
        # Warm-up calls pass no requests of anybody.
        steering.end(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            asked = asked_of(new.sampling_params)
            if asked:
                steering.begin(new.req_id, asked)
        steering.take_over(intermediate_tensors)
        try:
            output = plain(scheduler_output, intermediate_tensors, *args, **settings)
            steering.check_step()
            if isinstance(output, IntermediateTensors):
                steering.pass_on(output.tensors)
            return output
        finally:
            steering.clear_step()

    runner.execute_model = execute_model


def tell_positions_v1(runner: Any, steering: WorkerSteering) -> None:
    """Once a V1 runner has put its batch in order, say which rows are whose."""
    plain = runner._prepare_inputs

    def prepare(scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = plain(scheduler_output, num_scheduled_tokens)
        batch = runner.input_batch
        n = batch.num_reqs
        steering.plan_step(batch.req_ids[:n], num_scheduled_tokens, batch.num_computed_tokens_cpu[:n])
        return prepared

    runner._prepare_inputs = prepare


def tell_positions_v2(runner: Any, steering: WorkerSteering) -> None:
    """The same for a V2 runner."""
    plain = runner.prepare_inputs

    def prepare(*args: Any, **settings: Any) -> Any:
        batch = plain(*args, **settings)
        steering.plan_step(batch.req_ids, batch.num_scheduled_tokens, batch.num_computed_tokens_np)
        return batch

    runner.prepare_inputs = prepare


def steer_before_compiling() -> None:
    """
    Make workers set the hooks of a declaration as soon as the weights are loaded. vLLM imports this module in every
    worker before it makes the worker; once the model is compiled, hooks would be without effect.
    """
    from vllm.v1.worker.gpu_worker import Worker

    plain = Worker.load_model
    if getattr(plain, COMPILED, False):
        return

    def load_model(self: Any, *args: Any, **settings: Any) -> None:
        plain(self, *args, **settings)
        declared = (self.vllm_config.additional_config or {}).get(KEY)
        # In eager mode nothing need be declared, and hooks can be set at any time.
        if declared and not self.vllm_config.model_config.enforce_eager:
            setattr(self.model_runner, COMPILED, CompiledSteering(self.model_runner, Declared.read(declared)))

    setattr(load_model, COMPILED, True)
    Worker.load_model = load_model


steer_before_compiling()
