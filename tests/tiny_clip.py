"""A tiny random CLIP model with the bundled embedder's tokenizer, and pictures for it."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIDE, DIM = 32, 16


def save_tiny_clip(folder: Path) -> Path:
    """Two layers for texts and two for images of 32 × 32, saved as transformers does; the same every time."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

    from src.models.bundled import bundled_folder

    tokenizer = AutoTokenizer.from_pretrained(bundled_folder("bundled:minilm"))
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **layers, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {**layers, "image_size": SIDE, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def picture(seed: int, kind: str = "PNG", size: tuple[int, int] = (50, 70), mode: str = "RGB") -> bytes:
    """An image file of coloured noise, larger than the model's images."""
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, kind)
    return file.getvalue()
