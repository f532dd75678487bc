"""
The engine on vLLM: takes and gives what `LanguageModel` does, so that a command does not know which of them it holds.

vLLM runs inside this process (its workers are processes of their own only where several devices share a model), so
nothing survives it, and every request is in flight from the start.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from src.common.directions_file import read_directions
from src.common.engine_config import EngineConfigBase
from src.common.errors import InputError
from src.common.interventions import Entry
from src.common.resolved_interventions import ReadDirections, ResolvedSpec, resolve
from src.models import loading, vllm_start
from src.models.engine import bounded_context, refuse_unsupported, require_vllm
from src.models.types import GenerationRequest, GenerationResult
from src.models.vllm_adapter import Adapter, check_adapter, prepare_adapter, room_for, switchable_adapters
from src.models.vllm_check import check_columns
from src.models.vllm_compiled import KEY, Declared
from src.models.vllm_driving import drive
from src.models.vllm_fetch import Captures
from src.models.vllm_forcing import Forcing
from src.models.vllm_process import stop
from src.models.vllm_scheduling import Scheduling
from src.models.vllm_states import States
from src.models.vllm_stream_check import check_compiled, find_stream

LOGGER = logging.getLogger(__name__)
OnResult = Callable[[GenerationResult], None]
MIN_TEMPERATURE = 0.01
NOT_DECLARED = "the model was compiled without; --enforce_eager can"


class VLLMEngine(Scheduling, Forcing):
    """A model in vLLM. Use it in a `with` block, or call `close`."""

    batches_at_once = 16

    def __init__(
        self,
        engine: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        facts: dict[str, str | None],
        eos_ids: frozenset[int],
        context_length: int | None,
        adapter: Adapter | None = None,
        capture_budget_gb: float = 4.0,
        capture_ttl: float = 600.0,
        declared: Declared | None = None,
    ) -> None:
        super().__init__()
        self._engine = engine
        self.tokenizer = tokenizer
        self.facts = facts
        """What provenance records: fingerprints, device, dtype, vLLM's version and runner."""
        self.eos_ids = eos_ids
        self.context_length = context_length
        self.room = engine.model_config.max_model_len
        """Tokens of prompt and answer for which there is memory; at most the context."""
        self.rows_at_once = engine.vllm_config.scheduler_config.max_num_seqs
        """Requests that are decoded side by side."""
        self._lora = adapter.request() if adapter else None
        self._switchable: dict[Path, Adapter] = {}
        captures = Captures(
            engine.collective_rpc, self.d_model, engine.model_config.dtype, budget_gb=capture_budget_gb, ttl=capture_ttl
        )
        self._states = States(engine.collective_rpc, self.n_layers, self.d_model, captures, declared)
        self.no_steering: str | None = None
        """Why interventions and captures are not possible."""
        self.closed = False

    @classmethod
    def load(
        cls, config: EngineConfigBase, *, batch_size: int = 256, declared: Declared | None = None,
        adapters: Sequence[Path] = (), **engine_args: Any,
    ) -> "VLLMEngine":  # fmt: skip
        """
        Start vLLM with what a command's settings name, and check that its numbers are right.

        batch_size: rows decoded at once. declared: what a compiled model is to do to hidden states; in eager mode
        anything can be done. adapters: folders of those that `use_adapter` may name, beside none in `config`.
        engine_args: further arguments of vLLM's EngineArgs. Raises InputError when vLLM is not installed, knows no such
        model or finds too little memory, CheckFailed when the uncertainty that comes out of it is not that of a direct
        computation or an adapter does not act.
        """
        require_vllm()
        files = loading.resolve(config)
        tokenizer = loading.load_tokenizer(files.folder, config.trust_remote_code)
        model_config = loading.load_config(files.folder, config.trust_remote_code)
        context = bounded_context(config, loading.context_length(model_config))
        vllm_start.check_rotary(model_config, context)
        generation_config = loading.load_generation_config(files.folder)
        vllm_start.set_environment(config.engine_log)
        if declared:
            engine_args["additional_config"] = {KEY: declared.plain()}
        with vllm_start.errors_in_words(config.model_id), contextlib.ExitStack() as undo:
            adapter = prepare_adapter(files, config) if files.adapter else None
            switchable = switchable_adapters(files, adapters)
            assert not (adapter and switchable), "an engine has one adapter for good or several in turn"
            engine_args = (room_for(switchable) if switchable else {}) | engine_args
            engine, runner = vllm_start.start(config, files, adapter, batch_size, engine_args)
            undo.callback(stop, engine)
            applied = adapter if adapter and not adapter.merged else None
            is_eager = engine.model_config.enforce_eager
            loaded = cls(
                engine,
                tokenizer,
                facts=files.facts | vllm_start.facts(engine, runner, adapter),
                eos_ids=loading.eos_token_ids(model_config, generation_config, tokenizer),
                context_length=context,
                adapter=applied,
                capture_budget_gb=config.capture_budget_gb,
                capture_ttl=config.capture_ttl,
                declared=None if is_eager else declared,
            )
            check_columns(loaded)
            if applied:
                check_adapter(loaded, applied)
            loaded._switchable = {each.folder: each for each in switchable}
            for each in switchable:
                loaded.use_adapter(each.folder)
                check_adapter(loaded, each)
            if switchable:
                loaded.use_adapter(None)
            loaded._states.find_lacking()
            loaded.no_steering = find_stream(loaded) if is_eager or declared else NOT_DECLARED
            if loaded._states.declared and not loaded.no_steering:
                check_compiled(loaded)
            undo.pop_all()
        return loaded

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_result: OnResult,
        on_tokens: Callable[[int], None] = lambda n: None,
        batch_size: int = 256,
        top_k: int = 5,
    ) -> None:
        """
        Continue every request; `on_result` gets each result as soon as it is there, in no fixed order.

        on_tokens: called after each step with the number of tokens it added. batch_size: not used, the scheduler fills
        its batches from all requests. Raises InputError when a prompt fills the context, when there is no memory for a
        request, when top_k exceeds the vocabulary, and when the logits hold NaN.
        """
        self.check(requests, top_k)
        drive(self, deque(requests), top_k, lambda output: on_result(self.result(output)), on_tokens)

    def check(self, requests: Sequence[GenerationRequest], top_k: int) -> None:
        """Raises InputError for a request that cannot be answered as it is asked."""
        vocabulary = self._engine.model_config.get_vocab_size()
        if not 1 <= top_k <= vocabulary:
            raise InputError(f"top-k mass of {top_k} tokens: expected 1 to the vocabulary's {vocabulary}")
        refuse_unsupported(
            requests,
            self.context_length,
            no_interventions=self.no_steering,
            no_captures=self.no_steering,
        )
        for request in requests:
            stray = next((token for token in request.token_ids if not 0 <= token < vocabulary), None)
            if stray is not None:
                raise InputError(f"request {request.id!r}: token {stray} is outside the vocabulary of {vocabulary}")
            if 0 < request.temperature < MIN_TEMPERATURE and self.facts["runner"] == "v2":
                raise InputError(
                    f"request {request.id!r}: temperature {request.temperature}; vLLM on CUDA draws at none below "
                    f"{MIN_TEMPERATURE}; take 0, or --backend hf"
                )
            self._states.check(request)
            needed = len(request.token_ids) + self.fitted(request).max_tokens
            if needed > self.room:
                raise InputError(
                    f"request {request.id!r} may take {needed} tokens and there is memory for the keys and values of "
                    f"{self.room}; raise --kv_cache_gib (CUDA: --gpu_memory_utilization) or lower --max_tokens"
                )

    def use_adapter(self, folder: Path | None) -> None:
        """Requests from now on have the adapter in `folder`, one of those the engine was loaded with; None: none."""
        assert folder is None or folder in self._switchable, f"{folder} is none of {list(self._switchable)}"
        self._lora = self._switchable[folder].request() if folder else None
        self.facts = self.facts | {
            "adapter_fingerprint": loading.adapter_fingerprint(folder) if folder else None,
            "adapter_applied": "lora" if folder else None,
        }

    def resolve(
        self, entries: Sequence[Entry], allow_model_mismatch: bool = False, read: ReadDirections = read_directions
    ) -> ResolvedSpec:
        """The entries of an interventions spec made concrete for this model. Raises InputError as `resolve` there."""
        return resolve(
            entries,
            n_layers=self.n_layers,
            d_model=self.d_model,
            model_fingerprint=self.facts.get("model_fingerprint"),
            adapter_fingerprint=self.facts.get("adapter_fingerprint"),
            allow_model_mismatch=allow_model_mismatch,
            read=read,
        )

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return self._engine.model_config.hf_text_config.num_hidden_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self._engine.model_config.get_hidden_size()

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of generated tokens, special tokens left out."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def close(self) -> None:
        """End vLLM: its workers, its shared memory and its share of this process's."""
        if not self.closed:
            self.closed = True
            stop(self._engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
