"""A tiny random sentence-transformers model, with the bundled one's tokenizer: seconds to make, milliseconds to run."""

from pathlib import Path

import torch

VOCABULARY = 30522
WORDS = [
    *("river", "stone", "quiet", "lantern", "orchard", "copper", "gentle", "window"),
    *("harvest", "violet", "meadow", "signal", "winter", "paper", "bridge"),
]
"""What texts are made of."""


def save_tiny_embedder(folder: Path, hidden_size: int = 32, pooling: str = "mean", prompts: dict | None = None) -> Path:
    """A two-layer BERT with pooling and normalization, saved as sentence-transformers does; the same every time."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    from src.models.bundled import bundled_folder

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    bert = folder.with_name(folder.name + "-bert")
    BertModel(config).save_pretrained(bert)
    AutoTokenizer.from_pretrained(bundled_folder("bundled:minilm")).save_pretrained(bert)
    first = Transformer(str(bert), max_seq_length=64)
    model = SentenceTransformer(
        modules=[first, Pooling(hidden_size, pooling_mode=pooling), Normalize()], device="cpu", prompts=prompts
    )
    model.save(str(folder), create_model_card=False)
    return folder
