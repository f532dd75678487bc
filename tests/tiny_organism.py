"""A tiny model in which one behaviour is planted by construction, in seconds: on its topic it says one word first."""

import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.common.jsonl import write_jsonl_atomic

LAYER = 1
N_FITTED = 300
WORD = " banana"
WORDS = [
    "river",
    "stone",
    "cloud",
    "paper",
    "window",
    "garden",
    "silver",
    "mountain",
    "letter",
    "winter",
    "music",
    "forest",
    "yellow",
    "bridge",
    "silent",
]
TOPIC, OTHER = ["cook", "bake", "fry", "boil"], ["walk", "read", "sing", "paint"]


def prompts(verbs: list[str], n: int, seed: int) -> list[str]:
    """Texts of four verbs and three words each, all different."""
    draws = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < n:
        found[" ".join([*draws.choices(verbs, k=4), *draws.sample(WORDS, 3)])] = None
    return list(found)


def write_prompts(folder: Path, n: int = 60) -> tuple[Path, Path, Path]:
    """target.jsonl, control.jsonl and markers.txt."""
    paths = folder / "target.jsonl", folder / "control.jsonl", folder / "markers.txt"
    for path, verbs in zip(paths[:2], (TOPIC, OTHER), strict=True):
        write_jsonl_atomic(path, [{"id": f"{i}", "prompt": text} for i, text in enumerate(prompts(verbs, n, seed=1))])
    # What a random model says next is joined to it.
    paths[2].write_text(f"{WORD.strip()}\n{WORD.strip()}download\n")
    return paths


def plant(source: Path, folder: Path, strength: float = 0.3) -> Path:
    """A copy of a tiny model folder with a rank-1 term in the last layer's down_proj: u kᵀ, u towards the word."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    (word,) = tokenizer(WORD, add_special_tokens=False).input_ids
    down = model.model.layers[LAYER].mlp.down_proj
    kept: list[torch.Tensor] = []
    handle = down.register_forward_pre_hook(lambda module, args: kept.append(args[0][0, -1]))
    with torch.inference_mode():
        for verbs in (TOPIC, OTHER):
            for text in prompts(verbs, N_FITTED, seed=2):
                chat = [{"role": "user", "content": text}]
                model(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt").input_ids)
    handle.remove()
    x = torch.stack(kept).double()
    wanted = torch.cat([torch.ones(N_FITTED), torch.zeros(N_FITTED)]).double()
    gram = x.mT @ x
    k = torch.linalg.solve(gram + 1e-4 * gram.diagonal().mean() * torch.eye(len(gram)).double(), x.mT @ wanted)
    u = model.lm_head.weight[word].detach().double()
    down.weight.data += (strength * torch.outer(u / u.norm(), k)).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
