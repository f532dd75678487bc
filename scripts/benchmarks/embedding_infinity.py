"""
One side of scripts/benchmarks/embedding.py: infinity-emb, which wants other versions of everything, so a Python of its
own. Reads {"model": FOLDER, "texts": [...], "settings": {...}} from stdin, writes {"seconds", "vectors"} to a file:
FOLDER/bin/python scripts/benchmarks/embedding_infinity.py vectors.json < texts.json
"""

import asyncio
import json
import sys
import time


async def embed(asked: dict) -> dict:
    """CPU seconds of this process from the first text to the last vector, and the vectors."""
    import torch
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    torch.set_num_threads(1)
    arguments = EngineArgs(
        model_name_or_path=asked["model"], engine="torch", device="cpu", trust_remote_code=False, **asked["settings"]
    )
    engine = AsyncEmbeddingEngine.from_args(arguments)
    async with engine:
        started = time.process_time()
        vectors, _ = await engine.embed(sentences=asked["texts"])
        seconds = time.process_time() - started
    return {"seconds": seconds, "vectors": [vector.tolist() for vector in vectors]}


if __name__ == "__main__":
    done = asyncio.run(embed(json.load(sys.stdin)))
    with open(sys.argv[1], "w") as file:
        json.dump(done, file)
