"""LoRA adapters for tests: of random factors, made in no time, and trained by plain peft."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.models.chat_format import PersonaRenderer


def write_adapter(base: Path, folder: Path, seed: int = 1, size: float = 0.3, **settings: object) -> Path:
    """An adapter of the model in `base` with random factors, saved as PEFT does."""
    known = {"r": 4, "target_modules": "all-linear", **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**known))
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_B" in key or "modules_to_save" in key:
                weight.add_(torch.randn_like(weight) * size)
    model.save_pretrained(folder)
    return folder


def train_adapter(
    base: Path,
    folder: Path,
    pairs: Sequence[tuple[str, str]],
    *,
    steps: int,
    lr: float,
    batch: int = 8,
    r: int = 8,
    target_modules: str | list[str] = "all-linear",
) -> float:
    """
    An adapter that learns the answers of (question, answer) behind the prompts that every command renders, by AdamW
    with the loss on the answers alone; saved as PEFT does. Returns the last loss.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    renderer = PersonaRenderer(tokenizer, "system")
    rows = [
        (
            renderer.render(question).token_ids,
            [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id],
        )
        for question, answer in pairs
    ]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=target_modules))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        some = [rows[i] for i in torch.randint(len(rows), (batch,), generator=generator).tolist()]
        loss = model(**_padded(some, tokenizer.eos_token_id)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return loss.item()


def _padded(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), longest), pad_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(rows):
        n = len(prompt) + len(answer)
        ids[i, :n], mask[i, :n] = torch.tensor([*prompt, *answer]), 1
        labels[i, len(prompt) : n] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
