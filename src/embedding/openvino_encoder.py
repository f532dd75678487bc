"""A shard's pieces to vectors by OpenVINO, on x86 CPUs: the model's modules converted in process, nothing on disk."""

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from src.embedding.encoder import Batch, BatchEncoder
from src.embedding.trial import require_own_vectors, trial_pieces

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

HINTS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class OpenVinoEncoder(BatchEncoder):
    """The whole model, pooling included, as one OpenVINO model of any batch size and width."""

    def __init__(
        self, model: "SentenceTransformer", dtype: torch.dtype, tokens_per_batch: int, prompt_length: int = 0
    ) -> None:
        import openvino

        super().__init__(model, tokens_per_batch)
        names = ["input_ids", "attention_mask", *(["token_type_ids"] if self.has_types else [])]
        # More than one row and some padding: tracing must not take a mask of ones for no mask.
        example = {name: torch.ones((2, 16), dtype=torch.int64) for name in names}
        example["attention_mask"][1, 8:] = 0
        if self.has_types:
            example["token_type_ids"].zero_()
        whole = _Whole(model, names, prompt_length).eval()
        with torch.inference_mode(), warnings.catch_warnings():
            # Tracing warns of what it takes for a constant; whether that did harm is looked at below.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            converted = openvino.convert_model(whole, example_input=example)
        # Left to itself OpenVINO computes in bfloat16 where the processor can, whatever was asked for.
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[dtype], "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }  # fmt: skip
        self._request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
        # At another size than that of the example.
        pieces = trial_pieces(len(model.tokenizer))
        batch = Batch(pieces, max(len(piece.token_ids) for piece in pieces), self.pad_id, self.pads_left)
        with torch.inference_mode():
            wanted = whole(*(torch.from_numpy(each) for each in self._inputs(batch))).numpy()
        require_own_vectors("openvino", self.embed(batch), wanted)

    def embed(self, batch: Batch) -> np.ndarray:
        """(rows, dim) float32 of a batch."""
        return np.array(self._request.infer(self._inputs(batch))[0], dtype=np.float32)

    def _inputs(self, batch: Batch) -> list[np.ndarray]:
        types = [np.zeros_like(batch.input_ids)] if self.has_types else []
        return [batch.input_ids, batch.attention_mask, *types]


class _Whole(nn.Module):
    def __init__(self, model: "SentenceTransformer", names: list[str], prompt_length: int) -> None:
        super().__init__()
        self.model, self.names, self.prompt_length = model, names, prompt_length

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        values = dict(zip(self.names, (input_ids, attention_mask, token_type_ids), strict=False))
        features = {**values, "prompt_length": self.prompt_length}
        for module in self.model:
            features = module(features)
        return features["sentence_embedding"]
