"""Embeddings by vLLM's pooling runner: token ids in, a vector a text out, packed without padding by its scheduler."""

import atexit
import gc
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch

from src.models import vllm_start
from src.models.vllm_process import kept_as_they_are, nothing_left_behind, out_of_sight, quiet, stop

LOGGER = logging.getLogger(__name__)
POOLING = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST"}
"""Ways from a text's tokens to one vector, by the names of sentence-transformers and of vLLM."""
TEXTS_AT_ONCE = 256
WAITING = 4 * TEXTS_AT_ONCE
"""Texts handed to the scheduler at once; more would only take memory."""


class VLLMEmbedder:
    """A pooling model in vLLM, alone in its process. `close` it at the end."""

    def __init__(self, engine, pooling: str) -> None:
        self._engine, self._pooling = engine, pooling

    @classmethod
    def load(
        cls, folder: Path, pooling: str, dtype: torch.dtype, device: torch.device, max_length: int | None,
        tokens_per_step: int,
    ) -> "VLLMEmbedder":  # fmt: skip
        """
        Start vLLM with the model in a folder. pooling: a name of POOLING. tokens_per_step: at most, unless a text has
        more. Raises InputError where vLLM was built for another device, does not know the model, or has too little
        memory.
        """
        vllm_start.set_environment(engine_log=False)
        # Python's own end would look through all of vLLM's objects for cycles.
        atexit.register(gc.freeze)
        began = time.monotonic()
        LOGGER.info("Starting vLLM, which takes a minute or so …")
        with (
            vllm_start.errors_in_words(str(folder), instead="--backend st", log="the run's log"),
            quiet(engine_log=False),
            kept_as_they_are(),
            out_of_sight("llvmlite"),
        ):
            vllm_start.require_platform(device, str(device), instead="--backend st")
            arguments = _arguments(folder, pooling, dtype, device, max_length, tokens_per_step)
            with nothing_left_behind():
                engine = vllm_start.make_engine(arguments)
        LOGGER.info("vLLM is ready after %.0f s", time.monotonic() - began)
        return cls(engine, pooling)

    def embed(self, token_ids: Sequence[np.ndarray], on_text: Callable[[int], None] = lambda n: None) -> np.ndarray:
        """
        token_ids: of each text, special tokens included. Returns float32 (n, d_model): pooled and neither projected nor
        scaled. on_text: called with the number of each text that is through, from 0, in any order.
        """
        vectors: list[np.ndarray | None] = [None] * len(token_ids)
        begun = through = 0
        while through < len(token_ids):
            while begun < len(token_ids) and begun - through < WAITING:
                self._add(str(begun), token_ids[begun])
                begun += 1
            for output in self._engine.step():
                number = int(output.request_id)
                vectors[number] = output.outputs.data.float().cpu().numpy()
                through += 1
                on_text(number)
        assert all(vector is not None for vector in vectors), "vLLM answered a request twice"
        return np.stack(vectors) if vectors else np.empty((0, 0), dtype=np.float32)

    def close(self) -> None:
        """End vLLM and give back its memory."""
        stop(self._engine)

    def _add(self, name: str, token_ids: np.ndarray) -> None:
        from vllm import PoolingParams
        from vllm.inputs.engine import tokens_input

        params = PoolingParams(task="embed", use_activation=False)
        self._engine.add_request(name, tokens_input(token_ids.tolist()), params)


def _arguments(
    folder: Path, pooling: str, dtype: torch.dtype, device: torch.device, max_length: int | None, tokens_per_step: int
) -> dict:
    from vllm.config import PoolerConfig

    on_cpu = device.type == "cpu"
    kv_cache_gib = min(vllm_start.KV_CACHE_GIB, vllm_start.FREE_SHARE * psutil.virtual_memory().available / 2**30)
    return {
        "model": str(folder),
        "runner": "pooling",
        # Pooled alone: what follows in the model is applied by its own modules, in float32.
        "pooler_config": PoolerConfig(seq_pooling_type=POOLING[pooling], use_activation=False),
        "skip_tokenizer_init": True,
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_length,
        "max_num_batched_tokens": max(tokens_per_step, max_length or 0),
        "max_num_seqs": min(TEXTS_AT_ONCE, tokens_per_step),
        # A text's vector must not depend on which texts came before it.
        "enable_prefix_caching": False,
        "enforce_eager": on_cpu,
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30) if on_cpu else None,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "worker_extension_cls": vllm_start.WORKER,
    }
