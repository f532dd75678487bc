"""Tiny random models of the real architectures, for tests: two to four layers, hidden size 32, seconds to make."""

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

VOCABULARY = 49152

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=8),
    "gemma2": lambda: Gemma2Config(**COMMON, head_dim=8, sliding_window=8),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: Phi3Config(**COMMON),
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON, **MOE, head_dim=8, decoder_sparse_step=1, mlp_only_layers=[]),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, word_embed_proj_dim=32, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    ),
    "qwen3_next": lambda: Qwen3NextConfig(
        **COMMON, **MOE, head_dim=8, shared_expert_intermediate_size=32, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, decoder_sparse_step=1,
        layer_types=["linear_attention", "full_attention"], mlp_only_layers=[],
    ),
}  # fmt: skip


def tiny_model(name: str, seed: int = 0) -> nn.Module:
    """A random float32 model in evaluation mode, the same for the same seed."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()


def tiny_multimodal(seed: int = 0) -> nn.Module:
    """A Gemma 3 with a vision tower; only its text tower generates."""
    torch.manual_seed(seed)
    text = {**COMMON, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def copy_model(folder: Path, target: Path) -> Path:
    """A copy of a model folder, to be changed."""
    shutil.copytree(folder, target)
    return target
