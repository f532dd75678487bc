"""A shard's pieces to vectors by vLLM: its scheduler packs tokens without padding, the model's own modules follow."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from src.common.errors import InputError
from src.embedding.encoder import Report, TorchEncoder
from src.embedding.records import Shard
from src.embedding.trial import require_own_vectors, trial_pieces
from src.models.vllm_embedder import POOLING, VLLMEmbedder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class VLLMEncoder:
    """The transformer and its pooling in vLLM; vectors are scaled to length 1 by the model's own module, in float32."""

    def __init__(
        self,
        model: "SentenceTransformer",
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        tokens_per_batch: int,
        max_length: int | None,
        prompt_length: int = 0,
    ) -> None:
        """
        model: of the folder, on the CPU, in float32. Raises InputError for a model whose tokens become one vector in a
        way that vLLM does not have, as VLLMEmbedder.load, and where the vectors are not the model's own.
        """
        pooling, self._rest = _pooling_and_rest(model, prompt_length)
        self.dim = model.get_embedding_dimension()
        trial = Shard(index=0, row_start=0, row_stop=0, is_last=True, rows=[], bad_rows=0, sampled_out=0)
        trial.pieces = trial_pieces(len(model.tokenizer))
        TorchEncoder(model, torch.float32, tokens_per_batch, prompt_length).encode(trial, lambda pieces, tokens: None)
        wanted = trial.embeddings
        self._embedder = VLLMEmbedder.load(folder, pooling, dtype, device, max_length, tokens_per_batch)
        try:
            self.encode(trial, lambda pieces, tokens: None)
            require_own_vectors("vllm", trial.embeddings, wanted)
        except BaseException:
            self.close()
            raise

    def encode(self, shard: Shard, report: Report) -> None:
        """Sets the shard's embeddings and its number of computed tokens."""
        lengths = np.array([len(piece.token_ids) for piece in shard.pieces], dtype=np.int64)
        embeddings = np.empty((len(lengths), self.dim), dtype=np.float32)
        # Longest first: what does not fit in memory fails at once.
        order = np.argsort(-lengths, kind="stable")
        if len(order):
            token_ids = [shard.pieces[i].token_ids for i in order]
            embeddings[order] = self._embed(token_ids, lambda number: report(1, len(token_ids[number])))
        shard.embeddings, shard.padded_tokens = embeddings, int(lengths.sum())

    def close(self) -> None:
        """End vLLM and give back its memory."""
        self._embedder.close()

    def _embed(self, token_ids: Sequence[np.ndarray], on_text: Callable[[int], None]) -> np.ndarray:
        features = {"sentence_embedding": torch.from_numpy(self._embedder.embed(token_ids, on_text))}
        with torch.inference_mode():
            for module in self._rest:
                features = module(features)
        return features["sentence_embedding"].numpy()


def _pooling_and_rest(model: "SentenceTransformer", prompt_length: int) -> tuple[str, list[torch.nn.Module]]:
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    _, *others = model
    pooling, rest = (others[0], others[1:]) if others else (None, [])
    kinds = ", ".join(type(module).__name__ for module in others) or "nothing"
    expected = f"vLLM has {', '.join(POOLING)} pooling and length 1 after it; take --backend st"
    if not isinstance(pooling, Pooling) or not all(isinstance(module, Normalize) for module in rest):
        raise InputError(f"--backend vllm: the model's transformer is followed by {kinds}; {expected}")
    if pooling.pooling_mode not in POOLING:
        raise InputError(f"--backend vllm: the model pools by {pooling.pooling_mode}; {expected}")
    if prompt_length and not pooling.include_prompt:
        raise InputError("--backend vllm: the model leaves the prompt out of its pooling, vLLM cannot; take st")
    return pooling.pooling_mode, rest
