"""
The engine on vLLM: takes and gives what `LanguageModel` does, so that a command does not know which of them it holds.

vLLM runs inside this process (its workers are processes of their own only where several devices share a model), so
nothing survives it, and every request is in flight from the start.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from src.common.engine_config import EngineConfigBase
from src.common.errors import InputError
from src.models import loading, vllm_start
from src.models.engine import bounded_context, refuse_unsupported, require_vllm
from src.models.types import GenerationRequest, GenerationResult
from src.models.vllm_adapter import Adapter, check_adapter, prepare_adapter
from src.models.vllm_check import check_columns
from src.models.vllm_process import stop

LOGGER = logging.getLogger(__name__)
OnResult = Callable[[GenerationResult], None]
MIN_TEMPERATURE = 0.01
WAITING_PER_ROW = 4
"""Requests handed to the scheduler for each row it decodes at once; more would only take memory."""


class VLLMEngine:
    """A model in vLLM. Use it in a `with` block, or call `close`."""

    def __init__(
        self,
        engine: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        facts: dict[str, str | None],
        eos_ids: frozenset[int],
        context_length: int | None,
        adapter: Adapter | None = None,
    ) -> None:
        self._engine = engine
        self.tokenizer = tokenizer
        self.facts = facts
        """What provenance records: fingerprints, device, dtype, vLLM's version and runner."""
        self.eos_ids = eos_ids
        self.context_length = context_length
        self.room = engine.model_config.max_model_len
        """Tokens of prompt and answer for which there is memory; at most the context."""
        self._max_num_seqs = engine.vllm_config.scheduler_config.max_num_seqs
        self._lora = adapter.request() if adapter else None
        self._closed = False

    @classmethod
    def load(cls, config: EngineConfigBase, *, batch_size: int = 256, **engine_args: Any) -> "VLLMEngine":
        """
        Start vLLM with what a command's settings name, and check that its numbers are right.

        batch_size: rows decoded at once. engine_args: further arguments of vLLM's EngineArgs. Raises InputError when
        vLLM is not installed, knows no such model or finds too little memory, CheckFailed when the uncertainty that
        comes out of it is not that of a direct computation or the adapter does not act.
        """
        require_vllm()
        files = loading.resolve(config)
        tokenizer = loading.load_tokenizer(files.folder, config.trust_remote_code)
        model_config = loading.load_config(files.folder, config.trust_remote_code)
        context = bounded_context(config, loading.context_length(model_config))
        vllm_start.check_rotary(model_config, context)
        generation_config = loading.load_generation_config(files.folder)
        vllm_start.set_environment(config.engine_log)
        with vllm_start.errors_in_words(config.model_id), contextlib.ExitStack() as undo:
            adapter = prepare_adapter(files, config) if files.adapter else None
            engine, runner = vllm_start.start(config, files, adapter, batch_size, engine_args)
            undo.callback(stop, engine)
            applied = adapter if adapter and not adapter.merged else None
            loaded = cls(
                engine,
                tokenizer,
                facts=files.facts | vllm_start.facts(engine, runner, adapter),
                eos_ids=loading.eos_token_ids(model_config, generation_config, tokenizer),
                context_length=context,
                adapter=applied,
            )
            check_columns(loaded)
            if applied:
                check_adapter(loaded, applied)
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
        waiting = iter(requests)
        running: dict[str, int] = {}
        try:
            while True:
                self._top_up(running, waiting, top_k)
                if not running:
                    return
                self._step(running, on_result, on_tokens)
        finally:
            # After an interruption the engine must not go on with what nobody waits for.
            if running and not self._closed:
                self.abort(list(running))

    def check(self, requests: Sequence[GenerationRequest], top_k: int) -> None:
        """Raises InputError for a request that cannot be answered as it is asked."""
        vocabulary = self._engine.model_config.get_vocab_size()
        if not 1 <= top_k <= vocabulary:
            raise InputError(f"top-k mass of {top_k} tokens: expected 1 to the vocabulary's {vocabulary}")
        refuse_unsupported(requests, self.context_length, can_steer=False)
        for request in requests:
            stray = next((token for token in request.token_ids if not 0 <= token < vocabulary), None)
            if stray is not None:
                raise InputError(f"request {request.id!r}: token {stray} is outside the vocabulary of {vocabulary}")
            if 0 < request.temperature < MIN_TEMPERATURE and self.facts["runner"] == "v2":
                raise InputError(
                    f"request {request.id!r}: temperature {request.temperature}; vLLM on CUDA draws at none below "
                    f"{MIN_TEMPERATURE}; take 0, or --backend hf"
                )
            needed = len(request.token_ids) + self.fitted(request).max_tokens
            if needed > self.room:
                raise InputError(
                    f"request {request.id!r} may take {needed} tokens and there is memory for the keys and values of "
                    f"{self.room}; raise --kv_cache_gib (CUDA: --gpu_memory_utilization) or lower --max_tokens"
                )

    def fitted(self, request: GenerationRequest) -> GenerationRequest:
        """The request with no more tokens than the context has room for."""
        room = (self.context_length or self.room) - len(request.token_ids)
        return request if request.max_tokens <= room else replace(request, max_tokens=room)

    def add(self, request: GenerationRequest, top_k: int) -> None:
        """Hand one checked request to the scheduler."""
        from vllm.inputs.engine import tokens_input

        from src.models.vllm_worker import sampling_params

        params = sampling_params(self.fitted(request), top_k, self.eos_ids, str(self.facts["runner"]))
        prompt = tokens_input(list(request.token_ids))
        self._engine.add_request(request.id, prompt, params, lora_request=self._lora)

    def step(self) -> list[Any]:
        """One step of the engine: vLLM's outputs so far of the requests that it advanced."""
        return self._engine.step()

    def has_work(self) -> bool:
        """Whether a request is unfinished."""
        return self._engine.has_unfinished_requests()

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests."""
        self._engine.abort_request(list(request_ids))

    def result(self, output: Any) -> GenerationResult:
        """
        A finished output of vLLM in our terms. Raises InputError when its logits were not numbers.
        """
        completion = output.outputs[0]
        entropy, mass = columns(completion)
        tokens = list(completion.token_ids)
        assert len(entropy) == len(tokens), f"{output.request_id}: {len(entropy)} measures of {len(tokens)} tokens"
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended request {output.request_id!r} with {completion.finish_reason!r}")
        for index, value in enumerate(entropy):
            if value != value:
                raise InputError(
                    f"request {output.request_id!r}: the model's logits are not numbers at generated token {index} "
                    f"(dtype {self.facts['dtype']}); try --dtype float32, and check the weights"
                )
        ended = bool(tokens) and tokens[-1] in self.eos_ids
        if ended:
            tokens, entropy, mass = tokens[:-1], entropy[:-1], mass[:-1]
        return GenerationResult(
            id=output.request_id,
            token_ids=tuple(tokens),
            text=self.decode(tokens),
            entropy=tuple(entropy),
            top_k_mass=tuple(mass),
            finish_reason="stop" if ended else "length",
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of generated tokens, special tokens left out."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def close(self) -> None:
        """End vLLM: its workers, its shared memory and its share of this process's."""
        if not self._closed:
            self._closed = True
            stop(self._engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _top_up(self, running: dict[str, int], waiting: Iterator[GenerationRequest], top_k: int) -> None:
        for request in islice(waiting, max(0, WAITING_PER_ROW * self._max_num_seqs - len(running))):
            assert request.id not in running, f"two requests are called {request.id!r}"
            self.add(request, top_k)
            running[request.id] = 0

    def _step(self, running: dict[str, int], on_result: OnResult, on_tokens: Callable[[int], None]) -> None:
        added, finished = 0, []
        for output in self.step():
            n_tokens = len(output.outputs[0].token_ids)
            if output.finished:
                result = self.result(output)
                finished.append(result)
                n_tokens = len(result.token_ids)
            added += n_tokens - running[output.request_id]
            running[output.request_id] = n_tokens
        if added:
            on_tokens(added)
        for result in finished:
            del running[result.id]
            on_result(result)


def columns(completion: Any) -> tuple[list[float], list[float]]:
    """Entropy and top-k mass of each token, from the places of two log-probabilities behind the token's own."""
    values, starts = completion.logprobs.logprobs, completion.logprobs.start_indices
    return [values[start + 1] for start in starts], [values[start + 2] for start in starts]
