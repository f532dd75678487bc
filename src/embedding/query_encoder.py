"""A few texts → vectors by the model that made the shards, with its settings then, in float32 on the CPU."""

from collections.abc import Sequence

import numpy as np

from src.common.errors import InputError
from src.embedding.shards_reading import Embeddings

INSTEAD = "embed the queries with src.embed_dataset by the same model, and pass --query_embeddings_dir"


def encode_queries(texts: Sequence[str], embeddings: Embeddings, prompt: str | None = None) -> np.ndarray:
    """
    float32 (n, dim) of the shards' dimension: a Matryoshka model's vectors are cut as theirs were. prompt: what to put
    before each text instead of what was put before the rows.

    Raises InputError where the model cannot be had or makes vectors of another dimension, and for a text that is longer
    than the model reads.
    """
    import torch

    from src.embedding.model_files import embedding_fingerprint, embedding_folder, load_sentence_transformer

    settings, model_id = embeddings.settings, embeddings.model
    if settings.get("backend") == "openai":
        raise InputError(f"{embeddings.folder}: its vectors are of the served model {model_id}; {INSTEAD}")
    folder = embedding_folder(model_id, None)
    made_by = settings.get("model_fingerprint")
    if made_by and made_by != (here := embedding_fingerprint(folder)):
        raise InputError(f"{folder}: another model than the {model_id} that made {embeddings.folder} (fingerprint "
                         f"{here[:12]} here, {made_by[:12]} there); {INSTEAD}")  # fmt: skip
    model = load_sentence_transformer(folder, torch.device("cpu"))
    if settings.get("max_length"):
        model.max_seq_length = settings["max_length"]
    before = prompt if prompt is not None else settings.get("prompt") or ""
    _refuse_long([before + text for text in texts], model)
    vectors = model.encode(list(texts), prompt=before, convert_to_numpy=True, show_progress_bar=False)
    if settings.get("truncate_dim") == embeddings.dim:
        vectors = vectors[:, : embeddings.dim]
    if vectors.shape[1] != embeddings.dim:
        raise InputError(f"the model {model_id} makes vectors of {vectors.shape[1]} numbers, {embeddings.folder} holds "
                         f"{embeddings.dim}; expected the model that made them")  # fmt: skip
    return vectors.astype(np.float32)


def _refuse_long(texts: Sequence[str], model) -> None:
    for text in texts:
        n_tokens = len(model.tokenizer(text, truncation=False, verbose=False)["input_ids"])
        if model.max_seq_length and n_tokens > model.max_seq_length:
            limit = model.max_seq_length
            raise InputError(f"the query {text[:40]!r} has {n_tokens} tokens and the model reads {limit}; shorten it")
