"""
Embeddings or steered chat over HTTP, for any OpenAI client. From the repository root:
uv run -m src.serve embeddings --model_id bundled:minilm
uv run -m src.serve chat --model_id bundled:smollm2-135m
"""

import os
from dataclasses import dataclass
from typing import ClassVar

from src.common.cli import run_command
from src.common.logs import start_logging
from src.common.settings import setting
from src.embedding.settings import EmbedderSettings
from src.serving.settings import ChatServerSettings, EmbeddingServerSettings

KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""PyTorch's and oneDNN's."""
KEPT_KERNELS = "64"


@dataclass(kw_only=True)
class EmbeddingServer(EmbeddingServerSettings, EmbedderSettings):
    """Vectors of texts and images"""

    backend: str = setting("auto", choices=("auto", "st", "openvino"))
    """auto: sentence-transformers (st) on CUDA; on the CPU OpenVINO where it is installed, else st."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_model()


@dataclass(kw_only=True)
class ChatServer(ChatServerSettings):
    """Answers of a chat model, steered where a request says so"""


@dataclass(kw_only=True)
class ServeConfig:
    """What is served"""

    SUB_COMMANDS: ClassVar[dict[str, type]] = {"embeddings": EmbeddingServer, "chat": ChatServer}


def main(config: EmbeddingServer | ChatServer) -> None:
    start_logging(config.log_path)
    if isinstance(config, ChatServer):
        from src.serving.chat_server import serve_chat

        serve_chat(config)
    else:
        serve_embeddings(config)


def serve_embeddings(config: EmbeddingServer) -> None:
    """Loads the model and serves it until a signal comes."""
    # Read when torch is loaded. Batches are of hundreds of sizes, and 2 MB of kernels for each stayed, up to 1,024.
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, KEPT_KERNELS)

    # 1. Everything that can be wrong without a model.
    from src.models.hub import check_reference

    check_reference(config.model_id)

    # 2. The address, before anything slow; who connects now is answered when the model is there.
    from src.serving.server import listen

    listener = listen(config)

    # 3. The model, and requests until a signal comes.
    from src.embedding.embedder import load_embedder
    from src.serving.embedding_server import serve

    serve(load_embedder(config), config, config.model_name or config.model_id, listener)


if __name__ == "__main__":
    run_command(main, ServeConfig)
