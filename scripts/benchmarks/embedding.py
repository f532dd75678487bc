"""
Texts a second against sentence-transformers' own `encode`, the arms interleaved, CPU seconds of one thread. Rounds are
appended to a file, so that they can be made at different times:
OMP_NUM_THREADS=1 uv run --extra openvino python scripts/benchmarks/embedding.py --rounds 5 --output_path rounds.jsonl
"""

import argparse
import copy
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

DEFAULT = "encode, defaults"
PEERS = {DEFAULT: 32, "encode, batch 8": 8, "encode, batch 128": 128}
"""Peer's arm → its batch size, in float32; each is also measured in bfloat16."""

INFINITY = {
    "infinity, defaults": {"dtype": "float32", "bettertransformer": False},
    "infinity, bfloat16": {"dtype": "bfloat16", "bettertransformer": False},
    "infinity, bfloat16, by tokens": {"dtype": "bfloat16", "bettertransformer": False, "lengths_via_tokenize": True},
}
"""Arms of infinity-emb (--infinity_python), without bettertransformer, whose package newer torch does not go with."""


def skewed_texts(model, count: int) -> list[str]:
    """Random words, lognormal(3.6, 0.8) of them, 8 to 256: a mean of about 48 tokens."""
    import numpy as np

    draw = np.random.default_rng(0)
    words = sorted(word for word in model.tokenizer.get_vocab() if word.isalpha() and len(word) > 2)
    lengths = np.clip(draw.lognormal(3.6, 0.8, count), 8, 256).astype(int)
    chooser = random.Random(0)
    return [" ".join(chooser.choices(words, k=max(1, length - 2))) for length in lengths]


def make_arms(model, texts: list[str], has_openvino: bool) -> tuple[dict[str, Callable], dict[str, float]]:
    """Arm → what embeds all texts, tokenizing included; and the padding shares, filled in as they run."""
    import torch

    from src.embedding.encoder import CPU_TOKENS, TorchEncoder
    from src.embedding.records import Shard
    from src.embedding.tokenizing import PieceTokenizer

    pieces_of = PieceTokenizer(model.tokenizer, "", model.max_seq_length).pieces
    padding: dict[str, float] = {}

    def ours(name: str, encoder) -> Callable:
        def embed():
            shard = Shard(
                index=0, row_start=0, row_stop=len(texts), is_last=True, rows=[], bad_rows=0, sampled_out=0, texts=texts
            )
            shard.pieces = pieces_of(texts)
            encoder.encode(shard, lambda pieces, tokens: None)
            padding[name] = 1 - sum(len(piece.token_ids) for piece in shard.pieces) / shard.padded_tokens
            return shard.embeddings

        return embed

    half = copy.deepcopy(model).bfloat16()
    arms: dict[str, Callable] = {}
    for name, size in PEERS.items():
        arms[name] = lambda size=size: model.encode(texts, batch_size=size)
        arms[f"{name}, bfloat16"] = lambda size=size: half.encode(texts, batch_size=size)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        arms[f"st {name}"] = ours(f"st {name}", TorchEncoder(copy.deepcopy(model), dtype, CPU_TOKENS))
        if has_openvino:
            from src.embedding.openvino_encoder import OpenVinoEncoder

            arms[f"openvino {name}"] = ours(f"openvino {name}", OpenVinoEncoder(model, dtype, CPU_TOKENS))
    return arms, padding


def measure_infinity(python: Path, model: Path, texts: list[str], name: str) -> tuple[float, list]:
    """CPU seconds of infinity-emb in its own Python, and its vectors."""
    asked = {"model": str(model), "texts": texts, "settings": INFINITY[name]}
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        # Isolated: what PYTHONPATH adds here is not for its environment.
        words = [str(python), "-I", str(Path(__file__).with_name("embedding_infinity.py")), file.name]
        subprocess.run(words, input=json.dumps(asked), text=True, check=True, capture_output=True)
        done = json.load(file)
    return done["seconds"], done["vectors"]


def one_round(arms: dict[str, Callable], padding: dict[str, float], count: int, seed: int) -> dict[str, dict]:
    """Arm → texts a CPU second, least cosine with the peer's float32, padding share; the arms in a random order."""
    import numpy as np

    names, found, vectors = list(arms), {}, {}
    random.Random(seed).shuffle(names)
    for name in names:
        started = time.process_time()
        result = arms[name]()
        seconds, embedded = result if name in INFINITY else (time.process_time() - started, result)
        vectors[name] = np.asarray(embedded, dtype=np.float32)
        found[name] = {"texts_per_second": count / seconds, "padding": padding.get(name)}
    exact = vectors[DEFAULT]
    for name, each in vectors.items():
        norms = np.linalg.norm(each, axis=1) * np.linalg.norm(exact, axis=1)
        found[name]["cosine"] = float(((each * exact).sum(axis=1) / norms).min())
    return found


def table(rounds: list[dict[str, dict]]) -> str:
    """Medians over the rounds of texts a second and of the ratio to the peer's defaults of the same round."""
    lines = ["| arm | texts a CPU second | × encode's defaults | least cosine | padding |", "|---|---|---|---|---|"]
    for name in rounds[0]:
        speeds = [each[name]["texts_per_second"] for each in rounds]
        ratios = sorted(each[name]["texts_per_second"] / each[DEFAULT]["texts_per_second"] for each in rounds)
        padding = rounds[0][name]["padding"]
        lines.append(
            f"| {name} | {statistics.median(speeds):.1f} | {statistics.median(ratios):.2f} "
            f"[{ratios[0]:.2f} … {ratios[-1]:.2f}] | {min(each[name]['cosine'] for each in rounds):.6f} "
            f"| {'' if padding is None else f'{padding:.1%}'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--arms", nargs="*", help="only these, beside encode's defaults")
    parser.add_argument("--infinity_python", type=Path, help="a Python that has infinity-emb[torch]")
    parser.add_argument("--output_path", type=Path, required=True, help="JSONL to which the rounds are appended")
    arguments = parser.parse_args()
    import importlib.util

    import torch

    from src.embedding.model_files import embedding_folder, load_sentence_transformer

    torch.set_num_threads(1)
    folder = embedding_folder("bundled:minilm", None)
    model = load_sentence_transformer(folder, torch.device("cpu"))
    texts = skewed_texts(model, arguments.texts)
    arms, padding = make_arms(model, texts, importlib.util.find_spec("openvino") is not None)
    for name in INFINITY if arguments.infinity_python else []:
        arms[name] = partial(measure_infinity, arguments.infinity_python, folder, texts, name)
    wanted = set(arguments.arms or arms) | {DEFAULT}
    arms = {name: arm for name, arm in arms.items() if name in wanted}
    for _ in range(arguments.rounds):
        row = one_round(arms, padding, len(texts), seed=time.time_ns())
        with arguments.output_path.open("a") as file:
            file.write(json.dumps({name: row[name] for name in arms}) + "\n")
    print(table([json.loads(line) for line in arguments.output_path.read_text().splitlines()]))


if __name__ == "__main__":
    main()
