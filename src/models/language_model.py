"""One wrapper around a causal language model on transformers: loading, generating with uncertainty, decoding."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from src.common.directions_file import read_directions
from src.common.errors import InputError
from src.common.interventions import Entry
from src.common.model_config import ModelSettings
from src.common.resolved_interventions import ReadDirections, ResolvedSpec, resolve
from src.models import loading, teacher_forcing
from src.models.adapter_switching import AdapterSwitch
from src.models.architectures import decoder_layers
from src.models.cpu_linear import packed_linears
from src.models.devices import FREE_MEMORY_SHARE, free_memory, halved, is_out_of_memory
from src.models.engine import Engine, fitted, refuse_unsupported
from src.models.generation import Row, decode_batch, needs_equal_lengths
from src.models.hooks import Location
from src.models.log_probabilities import log_probabilities
from src.models.teacher_forcing import ForcedRow
from src.models.types import GenerationRequest, GenerationResult

STATE_IN_MODULES = ("recurrent_gemma", "rwkv", "xlstm", "minimax")
"""Model types whose rows cannot leave a batch: what they remember is not in transformers' common cache."""


class LanguageModel:
    """A model with its tokenizer. The engine on transformers: `generate` takes and gives what every engine does."""

    batches_at_once = 1

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, facts: dict[str, str | None] | None = None
    ):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.facts = facts or {}
        """What provenance records: fingerprints, device, dtype."""
        self.eos_ids = loading.eos_token_ids(model.config, getattr(model, "generation_config", None), tokenizer)
        self.context_length = loading.context_length(model.config)
        if model.config.model_type in STATE_IN_MODULES:
            raise InputError(f"{model.config.model_type} models keep their state outside the cache: not supported here")
        self._equal_lengths = needs_equal_lengths(model)
        self._switch = AdapterSwitch(model)

    @classmethod
    def load(cls, config: ModelSettings) -> "LanguageModel":
        """
        Load what a command's model settings name, weights, tokenizer and adapter.

        Raises InputError for a model or adapter that cannot be found, reached, read or run here.
        """
        return cls(*loading.load(config))

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return len(decoder_layers(self.model))

    @property
    def pad_id(self) -> int:
        """The token that fills up shorter rows; masked wherever it stands."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_result: Callable[[GenerationResult], None],
        on_tokens: Callable[[int], None] = lambda n: None,
        batch_size: int = 256,
        top_k: int = 5,
    ) -> None:
        """
        Continue every request under its own interventions; `on_result` gets each result as soon as it is there, in no
        fixed order.

        on_tokens: called after each step with the number of tokens it added. batch_size: rows at once, fewer where
        memory is short; a result does not depend on it. Raises InputError when a prompt fills the context, when
        top_k exceeds the vocabulary, when the logits hold NaN, and for interventions that do not fit the model.
        """
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        if not 1 <= top_k <= vocabulary:
            raise InputError(f"top-k mass of {top_k} tokens: expected 1 to the vocabulary's {vocabulary}")
        refuse_unsupported(requests, self.context_length, no_captures="transformers cannot; --backend vllm can")
        queue = [fitted(r, self.context_length) for r in sorted(requests, key=lambda r: -len(r.token_ids))]
        with torch.inference_mode(), packed_linears(self.model):
            pass_on = lambda row, reason: on_result(self.result(row, reason))  # noqa: E731
            self._drain(queue, batch_size, top_k, pass_on, on_tokens)

    def kl_per_token(self, rows: Sequence[ForcedRow]) -> list[Tensor]:
        """See `teacher_forcing.kl_per_token`."""
        return teacher_forcing.kl_per_token(self, rows)

    def mean_projections(self, rows: Sequence[ForcedRow], place: Location, direction: np.ndarray) -> list[float]:
        """See `teacher_forcing.mean_projections`."""
        return teacher_forcing.mean_projections(self, rows, place, direction)

    def generate_projected(
        self, requests: Sequence[GenerationRequest], place: Location, direction: np.ndarray, **settings: Any
    ) -> None:
        """See `teacher_forcing.generate_projected`."""
        teacher_forcing.generate_projected(self, requests, place, direction, **settings)

    def log_probabilities(self, rows: Sequence[ForcedRow]) -> list[Tensor]:
        """See `log_probabilities`."""
        return log_probabilities(self, rows)

    def use_adapter(self, folder: Path | None) -> None:
        """
        From now on the plain LoRA adapter in `folder` acts, None for none. For models loaded without an adapter. Raises
        InputError when it does not fit the model.
        """
        self._switch.use(folder)
        self.facts = self.facts | {"adapter_fingerprint": loading.adapter_fingerprint(folder) if folder else None}

    def resolve(
        self, entries: Sequence[Entry], allow_model_mismatch: bool = False, read: ReadDirections = read_directions
    ) -> ResolvedSpec:
        """The entries of an interventions spec made concrete for this model. Raises InputError as `resolve` there."""
        return resolve(
            entries,
            n_layers=self.n_layers,
            d_model=self.model.config.get_text_config(decoder=True).hidden_size,
            model_fingerprint=self.facts.get("model_fingerprint"),
            adapter_fingerprint=self.facts.get("adapter_fingerprint"),
            allow_model_mismatch=allow_model_mismatch,
            read=read,
        )

    def close(self) -> None:
        """Nothing to end; every engine has it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of generated tokens, special tokens left out."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _drain(
        self,
        queue: list[GenerationRequest],
        batch_size: int,
        top_k: int,
        on_row: Callable[[Row, str], None],
        on_tokens: Callable[[int], None],
    ) -> None:
        while queue:
            batch = self._next_batch(queue, batch_size)
            done: set[str] = set()

            def finish(row: Row, reason: str, done: set[str] = done) -> None:
                done.add(row.request.id)
                on_row(row, reason)

            failed = False
            try:
                decode_batch(
                    self.model,
                    batch,
                    eos_ids=self.eos_ids,
                    pad_id=self.pad_id,
                    k=top_k,
                    on_row=finish,
                    on_tokens=on_tokens,
                )
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failed = True
            if failed:
                # Outside the handler, where the traceback no longer holds the batch's tensors.
                batch_size = self._halved(batch)
            queue = [r for r in batch if r.id not in done] + queue[len(batch) :]

    def _next_batch(self, queue: list[GenerationRequest], batch_size: int) -> list[GenerationRequest]:
        batch = queue[: min(batch_size, rows_that_fit(self, queue))]
        if self._equal_lengths:
            batch = [r for r in batch if len(r.token_ids) == len(batch[0].token_ids)]
        return batch

    def _halved(self, batch: list[GenerationRequest]) -> int:
        if len(batch) == 1:
            raise InputError(
                f"out of memory with a single row of {len(batch[0].token_ids)} prompt tokens and up to "
                f"{batch[0].max_tokens} more; lower --max_tokens or take a smaller model, dtype or another device"
            )
        return halved(len(batch), "rows", self.device)

    def result(self, row: Row, finish_reason: str) -> GenerationResult:
        """What a row has given, with its text."""
        return GenerationResult(
            id=row.request.id,
            token_ids=tuple(row.tokens),
            text=self.decode(row.tokens),
            entropy=tuple(row.entropy),
            top_k_mass=tuple(row.top_k_mass),
            finish_reason=finish_reason,
            gates=row.gates,
        )


def rows_that_fit(model: LanguageModel, requests: Sequence[GenerationRequest]) -> int:
    """How many rows as long as the longest of the requests there is memory for, at least 1."""
    longest = max(len(r.token_ids) for r in requests) + max(r.max_tokens for r in requests)
    row_bytes = loading.cache_bytes_per_token(model.model.config, model.model.dtype) * longest
    return max(1, int(FREE_MEMORY_SHARE * free_memory(model.device) // max(1, row_bytes)))


def generate_all(engine: Engine, requests: Sequence[GenerationRequest], **settings: int) -> list[GenerationResult]:
    """`engine.generate` with the results gathered, in the requests' order."""
    results: dict[str, GenerationResult] = {}
    engine.generate(requests, on_result=lambda result: results.__setitem__(result.id, result), **settings)
    return [results[request.id] for request in requests]
