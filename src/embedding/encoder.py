"""A shard's pieces to vectors: sentence-transformers' modules, called on batches of our own."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from src.embedding.batching import WIDTHS, compiled_width, plan_batches, plan_compiled_batches, stepped_tokens
from src.embedding.precisions import agreement
from src.embedding.records import Piece, Shard
from src.embedding.unpadded import Row, by_text, first_positions, padded
from src.models.cpu_linear import packed_linears
from src.models.devices import DTYPES
from src.models.generation import needs_equal_lengths

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LOGGER = logging.getLogger(__name__)
Report = Callable[[int, int], None]
"""Called after each batch with the number of pieces and of their tokens."""
CPU_TOKENS, GPU_TOKENS = 1024, 32768
LEAST_ALIKE = {torch.float32: 0.99999, torch.bfloat16: 0.9995, torch.float16: 0.9995}
"""Cosine of a text's vectors with padding and without; one position further is less in the models that count them."""


class Encoder(Protocol):
    """What turns a shard's pieces into vectors."""

    dim: int

    def encode(self, shard: Shard, report: Report) -> None:
        """Sets the shard's embeddings, (n_pieces, dim) float32, and its number of computed tokens."""

    def close(self) -> None:
        """Gives back what the garbage collector would not."""


class Batch:
    """Token ids of pieces, padded to one width."""

    def __init__(self, pieces: Sequence[Piece], width: int, pad_id: int, pads_left: bool) -> None:
        self.input_ids = np.full((len(pieces), width), pad_id, dtype=np.int64)
        self.attention_mask = np.zeros((len(pieces), width), dtype=np.int64)
        for row, piece in enumerate(pieces):
            where = slice(width - len(piece.token_ids), width) if pads_left else slice(0, len(piece.token_ids))
            self.input_ids[row, where] = piece.token_ids
            self.attention_mask[row, where] = 1


class BatchEncoder:
    """The part that encoders with a tokenizer share: cut into batches, embed each, back to the pieces' order."""

    def __init__(self, model: "SentenceTransformer", tokens_per_batch: int, is_compiled: bool = False) -> None:
        self.dim = model.get_embedding_dimension()
        self.tokens_per_batch, self.is_compiled = tokens_per_batch, is_compiled
        tokenizer = model.tokenizer
        self.vocabulary_size = len(tokenizer)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.pads_left = tokenizer.padding_side == "left"
        self.has_types = "token_type_ids" in tokenizer.model_input_names

    def encode(self, shard: Shard, report: Report) -> None:
        """Sets the shard's embeddings and its number of computed tokens."""
        embeddings = np.empty((len(shard.pieces), self.dim), dtype=np.float32)
        lengths = np.array([len(piece.token_ids) for piece in shard.pieces], dtype=np.int64)
        plan = plan_compiled_batches if self.is_compiled else plan_batches
        shard.padded_tokens = 0
        for batch in plan(lengths, self.tokens_per_batch):
            width = int(lengths[batch].max())
            width = compiled_width(width) if self.is_compiled else width
            pieces = [shard.pieces[i] for i in batch]
            # Compiled code is of one shape: a batch with too few rows is filled up with its first.
            filled = max(1, self.tokens_per_batch // width) - len(pieces) if self.is_compiled else 0
            padded = Batch(pieces + pieces[:1] * filled, width, self.pad_id, self.pads_left)
            embeddings[batch] = self.embed(padded)[: len(pieces)]
            shard.padded_tokens += padded.input_ids.size
            report(len(batch), int(lengths[batch].sum()))
        shard.embeddings = embeddings

    def computing(self) -> AbstractContextManager[None]:
        """Within it, in one thread, `embed` may be called any number of times."""
        return nullcontext()

    def embed(self, batch: Batch) -> np.ndarray:
        """(rows, dim) float32 of a batch."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to give back."""


class TorchEncoder(BatchEncoder):
    """The model's own modules on a device: the transformer in the chosen number format, what follows in float32."""

    def __init__(
        self,
        model: "SentenceTransformer",
        dtype: torch.dtype,
        tokens_per_batch: int,
        prompt_length: int = 0,
        is_compiled: bool = False,
    ) -> None:
        super().__init__(model, tokens_per_batch, is_compiled)
        self.device, self.dtype, self._prompt_length = model.device, dtype, prompt_length
        self._transformer, *self._rest = model
        self._transformer.to(dtype)
        self._compiled: set[int] = set()
        self._first_position: int | None = None
        if is_compiled:
            # The default of 8 sizes would let the others run uncompiled.
            torch._dynamo.config.recompile_limit = 2 * len(WIDTHS)
            self._transformer.model.compile(dynamic=False)

    def encode(self, shard: Shard, report: Report) -> None:
        """Sets the shard's embeddings and its number of computed tokens."""
        with self.computing():
            if self.is_compiled:
                self._warm_up({compiled_width(len(piece.token_ids)) for piece in shard.pieces})
            super().encode(shard, report)

    @contextmanager
    def computing(self) -> Iterator[None]:
        with torch.inference_mode(), ExitStack() as stack:
            if not self.is_compiled and self.dtype == torch.float32 and self.device.type == "cpu":
                stack.enter_context(packed_linears(self._transformer))
            yield

    def _warm_up(self, widths: set[int]) -> None:
        """Compiles for the sizes that are to come, with batches as large as theirs."""
        new = sorted(widths - self._compiled)
        if new:
            LOGGER.info("Compiling for batches %s tokens wide", ", ".join(map(str, new)))
        for width in new:
            piece = Piece(0, 0, np.full(width, self.pad_id, dtype=np.int32), truncated=False)
            rows = max(1, self.tokens_per_batch // width)
            self.embed(Batch([piece] * rows, width, self.pad_id, self.pads_left))
        self._compiled |= widths

    def embed(self, batch: Batch) -> np.ndarray:
        features = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        return self._pooled(self._transformer(self._on_device(features)))

    def leave_padding_out(self, pieces: Sequence[Piece]) -> bool:
        """
        Whether `embed_unpadded` may be called, which this finds out by comparing the pieces' vectors with those of
        `embed`: on a CPU, for models whose tokens meet in plain attention alone. Call it within `computing`.
        """
        model: Any = self._transformer.model
        # Parts with configurations of their own may each attend in another way.
        if self.device.type != "cpu" or self.is_compiled or model.config.sub_configs or needs_equal_lengths(model):
            return False
        # The vector of a text that is all prompt would be zero whatever the model did.
        prompt_length, self._prompt_length = self._prompt_length, 0
        alike = {first: self._alike(pieces, first) for first in first_positions(model)}
        self._prompt_length = prompt_length
        best = max(alike, key=alike.__getitem__)
        self._first_position = best if alike[best] >= LEAST_ALIKE[self.dtype] else None
        return self._first_position is not None

    def _alike(self, pieces: Sequence[Piece], first_position: int) -> float:
        """The least cosine of the pieces' vectors with padding and without, in a row as long as rows become."""
        self._first_position = first_position
        n_tokens = sum(len(each.token_ids) for each in pieces) + 3
        # Whatever a model makes of a row that it was not made for: it keeps its padding.
        try:
            wanted = self.embed(Batch(pieces, max(len(each.token_ids) for each in pieces), self.pad_id, self.pads_left))
            found = self.embed_unpadded(pieces, max(n_tokens, stepped_tokens(self.tokens_per_batch)))
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
            return -1.0
        return min(agreement(*each, "float32") for each in zip(found, wanted, strict=True))

    def embed_unpadded(self, pieces: Sequence[Piece], n_tokens: int) -> np.ndarray:
        """(pieces, dim) float32, computed as one row of `n_tokens`, which is at least as long as all together."""
        lengths = np.array([len(each.token_ids) for each in pieces])
        order = np.argsort(-lengths, kind="stable")
        row = Row.of([pieces[i].token_ids for i in order], n_tokens, self.pad_id, self._first_position)
        with by_text(self._transformer.model, row):
            found = self._transformer(self._on_device({"input_ids": row.input_ids, "position_ids": row.position_ids}))
        states, start = found["token_embeddings"][0], 0
        vectors = np.empty((len(pieces), self.dim), dtype=np.float32)
        # What follows is made for padded batches: a long text and many short ones are not padded to one width.
        for some in plan_batches(lengths, max(n_tokens, self.tokens_per_batch)):
            n = int(lengths[some].sum())
            vectors[some] = self._pooled_states([pieces[i] for i in some], states[start : start + n])
            start += n
        return vectors

    def _pooled_states(self, pieces: Sequence[Piece], states: torch.Tensor) -> np.ndarray:
        batch = Batch(pieces, max(len(each.token_ids) for each in pieces), self.pad_id, self.pads_left)
        features = self._on_device({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask})
        features["token_embeddings"] = padded(states, batch.attention_mask)
        return self._pooled(features)

    def _on_device(self, features: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        if self.has_types:
            features = {**features, "token_type_ids": np.zeros_like(features["input_ids"])}
        return {name: torch.from_numpy(value).to(self.device) for name, value in features.items()}

    def _pooled(self, features: dict[str, torch.Tensor]) -> np.ndarray:
        features["token_embeddings"] = features["token_embeddings"].float()
        features["prompt_length"] = self._prompt_length
        for module in self._rest:
            features = module(features)
        return features["sentence_embedding"].float().cpu().numpy()


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16: on CPUs by their flags, on others by what torch says."""
    if device.type != "cpu":
        return device.type == "mps" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def encoder_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it, else float32; another name is taken as it is."""
    if name == "auto":
        return torch.bfloat16 if computes_bfloat16(device) else torch.float32
    return DTYPES[name]
