import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from src.common.engine_config import EngineConfigBase
from src.common.errors import CheckFailed, InputError
from src.models import loading, vllm_process, vllm_start

pytestmark = pytest.mark.vllm


def config(folder: Path, **settings: object) -> EngineConfigBase:
    return EngineConfigBase(**({"model_id": str(folder), "output_dir": Path("unused"), "device": "cpu"} | settings))


def test_the_cpu_gets_a_cache_that_its_memory_holds_and_no_compiler(tiny_folder: Path) -> None:
    settings = config(tiny_folder)
    arguments = vllm_start.arguments_of(settings, loading.resolve(settings), None, 32)
    assert 0 < arguments["kv_cache_memory_bytes"] <= min(4 * 2**30, psutil.virtual_memory().available / 2)
    assert arguments["enforce_eager"] and arguments["max_num_seqs"] == 32 and arguments["max_model_len"] == -1
    chosen = config(tiny_folder, kv_cache_gib=0.5, compiled=True, max_model_len=64, tensor_parallel_size=2)
    arguments = vllm_start.arguments_of(chosen, loading.resolve(chosen), None, 32)
    assert arguments["kv_cache_memory_bytes"] == 2**29 and not arguments["enforce_eager"]
    assert arguments["max_model_len"] == 64 and arguments["tensor_parallel_size"] == 2


def test_cuda_keeps_its_compiler_and_its_share_of_memory(tiny_folder: Path) -> None:
    settings = config(tiny_folder)
    on_cuda = replace(loading.resolve(settings), device=torch.device("cuda"))
    arguments = vllm_start.arguments_of(settings, on_cuda, None, 32)
    assert not arguments["enforce_eager"] and arguments["kv_cache_memory_bytes"] is None
    assert arguments["gpu_memory_utilization"] == 0.9
    eager = config(tiny_folder, enforce_eager=True, gpu_memory_utilization=0.5)
    arguments = vllm_start.arguments_of(eager, on_cuda, None, 32)
    assert arguments["enforce_eager"] and arguments["gpu_memory_utilization"] == 0.5


@pytest.mark.parametrize(
    ("settings", "device", "words"),
    [
        ({"quantization": "nf4"}, "cpu", "--quantization nf4"),
        ({"device": "cuda"}, "cuda", "built for cpu"),
    ],
)
def test_what_this_vllm_cannot_do_is_refused(tiny_folder: Path, settings: dict, device: str, words: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("vLLM is built for CUDA here")
    files = replace(loading.resolve(config(tiny_folder)), device=torch.device(device))
    with pytest.raises(InputError, match=words):
        vllm_start.check_device(config(tiny_folder, **settings), files)


def test_too_little_memory_is_said_before_anything_is_loaded(tiny_folder: Path) -> None:
    files = loading.resolve(config(tiny_folder))
    with pytest.raises(InputError, match=r"GiB of keys and values do not fit.*--kv_cache_gib"):
        vllm_start.check_memory(files, {"model": str(tiny_folder), "kv_cache_memory_bytes": 2**60}, 1)
    half = {"model": str(tiny_folder), "kv_cache_memory_bytes": int(0.6 * psutil.virtual_memory().available)}
    vllm_start.check_memory(files, half, 1)
    with pytest.raises(InputError, match="do not fit"):
        vllm_start.check_memory(files, half, 2)


def test_cpus_are_dealt_to_the_workers() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    shares = vllm_start.shares_of_cpus(len(cpus))
    assert sorted(int(cpu) for share in shares for cpu in share.split(",")) == cpus
    with pytest.raises(InputError, match=f"workers on {len(cpus)} CPUs"):
        vllm_start.shares_of_cpus(len(cpus) + 1)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("1 validation error for ModelConfig\n  Value error, Model architectures ['X'] are not supported"),
         r"Model architectures \['X'\] are not supported.*--backend hf"),
        (RuntimeError("No available memory for the cache blocks."), "--gpu_memory_utilization"),
        (RuntimeError(""), "--engine_log"),
    ],
)  # fmt: skip
def test_vllms_errors_become_words_with_a_remedy(error: Exception, words: str) -> None:
    with pytest.raises(InputError, match=words), vllm_start.errors_in_words("the-model"):
        raise error


def test_our_own_errors_stay_what_they_are() -> None:
    with pytest.raises(CheckFailed, match=r"^wrong$"), vllm_start.errors_in_words("the-model"):
        raise CheckFailed("wrong")


def test_noise_is_kept_from_the_terminal_and_what_follows_is_not(capfd, caplog) -> None:
    caplog.set_level(logging.DEBUG, "src.models.vllm_process")
    with pytest.raises(KeyboardInterrupt), vllm_process.quiet(engine_log=False):
        os.write(1, b"from C++ \xff\n")
        subprocess.run(["echo", "from a child"], check=True)
        raise KeyboardInterrupt
    os.write(2, b"after\n")
    captured = capfd.readouterr()
    assert "from" not in captured.out + captured.err and captured.err == "after\n"
    assert "from C++" in caplog.text and "from a child" in caplog.text
    with vllm_process.quiet(engine_log=True):
        os.write(1, b"shown\n")
    assert capfd.readouterr().out == "shown\n"


def test_a_package_is_hidden_and_comes_back_as_it_was() -> None:
    import llvmlite.binding

    with pytest.raises(KeyboardInterrupt), vllm_process.out_of_sight("llvmlite"):
        assert not [name for name in sys.modules if name.split(".")[0] == "llvmlite"]
        raise KeyboardInterrupt
    assert sys.modules["llvmlite.binding"] is llvmlite.binding


def test_longrope_is_refused_where_the_engines_part(tiny_folder: Path) -> None:
    from transformers import Phi3Config

    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    long = Phi3Config(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=512, original_max_position_embeddings=128,
        pad_token_id=0, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
    )  # fmt: skip
    vllm_start.check_rotary(long, 128)
    for context in (129, 512, None):
        with pytest.raises(InputError, match=r"LongRoPE.*--max_model_len 128"):
            vllm_start.check_rotary(long, context)
    vllm_start.check_rotary(loading.load_config(tiny_folder), 512)


@pytest.mark.parametrize(("dtype", "n_bytes"), [("float32", 4), ("bfloat16", 2), ("float8_e4m3fn", 1), ("bool", 1)])
def test_bytes_of_a_stored_number(tmp_path: Path, dtype: str, n_bytes: int) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3).to(getattr(torch, dtype))}, tmp_path / "model.safetensors")
    assert vllm_start.stored_bytes(tmp_path) == n_bytes
