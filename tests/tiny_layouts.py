"""Tiny random models whose layers write to the residual stream in unusual ways, with norms as trained ones are."""

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
          "first_k_dense_replace": 1}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {"linear_num_value_heads": 8, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
          "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
SLIDING = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA_4 = {**SLIDING, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 64}

WRITABLE = {
    "llama": ("LlamaConfig", {}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neo": ("GPTNeoConfig", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gptj": ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", {}),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "starcoder2": ("Starcoder2Config", {}),
    "cohere2": ("Cohere2Config", {}),
    "gemma2": ("Gemma2Config", SLIDING),
    "gemma3": ("Gemma3TextConfig", SLIDING),
    "gemma4": ("Gemma4TextConfig", {**GEMMA_4, "hidden_size_per_layer_input": 0}),
    "gemma4_per_layer_inputs": ("Gemma4TextConfig", {**GEMMA_4, "hidden_size_per_layer_input": 8}),
    "gemma4_experts": ("Gemma4TextConfig", {**GEMMA_4, "hidden_size_per_layer_input": 0, "enable_moe_block": True,
                                            "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"layer_types": SLIDING["layer_types"]}),
    "glm4": ("Glm4Config", {"head_dim": 8}),
    "exaone4": ("Exaone4Config", {"layer_types": SLIDING["layer_types"], "sliding_window": 8}),
    "granite": ("GraniteConfig", {"residual_multiplier": 0.22}),
    "granite_moe": ("GraniteMoeConfig", EXPERTS),
    "granite_moe_shared": ("GraniteMoeSharedConfig", {**EXPERTS, "shared_intermediate_size": 32}),
    "granite_hybrid": ("GraniteMoeHybridConfig", {**EXPERTS, **MAMBA, "shared_intermediate_size": 32, "mamba_expand": 2,
                                                  "layer_types": ["mamba", "attention"]}),
    "granite_hybrid_dense": ("GraniteMoeHybridConfig", {**MAMBA, "num_local_experts": 0, "num_experts_per_tok": 0,
                                                        "shared_intermediate_size": 64, "mamba_expand": 2,
                                                        "layer_types": ["attention", "attention"]}),
    "falcon_h1": ("FalconH1Config", {**MAMBA, "head_dim": 8, "mamba_d_ssm": 64}),
    "mixtral": ("MixtralConfig", EXPERTS),
    "gpt_oss": ("GptOssConfig", {**EXPERTS, **SLIDING}),
    "qwen2_moe": ("Qwen2MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                                     "shared_expert_intermediate_size": 32}),
    "qwen3_next": ("Qwen3NextConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                                       "head_dim": 8, "shared_expert_intermediate_size": 32, **LINEAR}),
    "qwen3_5": ("Qwen3_5TextConfig", {"head_dim": 8, **LINEAR}),
    "deepseek_v3": ("DeepseekV3Config", {**ROUTED, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
                                         "qk_nope_head_dim": 4, "v_head_dim": 8, "n_shared_experts": 1,
                                         "num_key_value_heads": 4}),
    "glm4_moe": ("Glm4MoeConfig", {**ROUTED, "head_dim": 8}),
    "ernie_moe": ("Ernie4_5_MoeConfig", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16,
                                         "moe_num_shared_experts": 1, "moe_layer_start_index": 0}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": ("Lfm2MoeConfig", {"layer_types": ["conv", "full_attention"], "num_experts": 4,
                                   "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_dense_layers": 1}),
    "jamba": ("JambaConfig", {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2,
                              "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
                              "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "bamba": ("BambaConfig", {**MAMBA, "attn_layer_indices": [1]}),
    "nemotron_h": ("NemotronHConfig", {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8,
                                       "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8,
                                       "head_dim": 8}),
    "mamba": ("MambaConfig", {"state_size": 8}),
    "mamba2": ("Mamba2Config", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8}),
}  # fmt: skip
"""Name → the configuration's class, and what it has beside COMMON: models of which every writer can be edited."""
REFUSED = {
    "jetmoe": ("JetMoeConfig", {**EXPERTS, "kv_channels": 8}),
    "llama4": ("Llama4TextConfig", {**EXPERTS, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 64,
                                    "interleave_moe_layer_step": 1}),
    "recurrent_gemma": ("RecurrentGemmaConfig", {"lru_width": 32, "block_types": ["recurrent", "attention"]}),
    "minimax": ("MiniMaxConfig", {**EXPERTS, "head_dim": 8, "block_size": 8,
                                  "layer_types": ["linear_attention", "full_attention"]}),
    "gemma3n": ("Gemma3nTextConfig", {**SLIDING, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
                                      "num_kv_shared_layers": 0, "laurel_rank": 4, "intermediate_size": [64, 64],
                                      "activation_sparsity_pattern": [0.0, 0.0]}),
}  # fmt: skip
"""The same of models that are refused."""


def config_of(name: str, **more: object) -> PreTrainedConfig:
    """The configuration of a layout, with more settings."""
    kind, own = (WRITABLE | REFUSED)[name]
    return getattr(transformers, kind)(**{**COMMON, **own, **more})


def layout(name: str, seed: int = 0, **more: object) -> nn.Module:
    """A random float32 model in evaluation mode, every gain and bias of it drawn: those of new models are all alike."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(name, **more), dtype=torch.float32).eval()
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            if each.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() == 1 and ("norm" in each or "ln_" in each):
                parameter.copy_(0.2 + 1.5 * torch.rand_like(parameter))
    return model.requires_grad_(False)
