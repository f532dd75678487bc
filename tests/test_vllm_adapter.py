import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from src.common.engine_config import EngineConfigBase
from src.common.errors import InputError
from src.models import loading
from src.models.language_model import LanguageModel, generate_all
from src.models.merging import merged_copy
from src.models.types import GenerationRequest
from tests.conftest import ROOT
from tests.test_vllm_engine import assert_equal
from tests.tiny_models import COMMON, copy_model
from tests.vllm_process import results_of, run_jobs

ADAPTERS = {
    "lora": {"r": 4, "target_modules": "all-linear"},
    "rank_pattern": {"r": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 12}},
    "rslora": {"r": 4, "target_modules": ["o_proj"], "use_rslora": True},
    "dora": {"r": 4, "target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "head": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
}
MERGED = ("dora", "head")


@pytest.fixture(scope="module")
def base(small_folder: Path) -> Path:
    return small_folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that really change the model, and one that does not."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, settings in ADAPTERS.items():
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**settings, init_lora_weights=True))
        torch.manual_seed(1)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_B" in key or "modules_to_save" in key:
                    weight.add_(torch.randn_like(weight) * 0.3)
        model.save_pretrained(folder / name)
    untrained = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
    untrained.save_pretrained(folder / "untrained")
    return {path.name: path for path in folder.iterdir()}


def requests() -> list[GenerationRequest]:
    return [GenerationRequest(id=str(i), token_ids=tuple(range(50, 58 + i)), max_tokens=10) for i in range(4)]


def config(base: Path, adapter: Path, **settings: object) -> EngineConfigBase:
    return EngineConfigBase(
        model_id=str(base), adapter_path=adapter, output_dir=Path("unused"), device="cpu", **settings
    )


@pytest.mark.vllm
@pytest.mark.slow
def test_adapters_act_as_on_transformers_or_are_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    misfit = copy_model(adapters["lora"], tmp_path / "misfit")
    for file in misfit.glob("adapter_model.safetensors"):
        from safetensors.torch import load_file, save_file

        save_file({k.replace("layers.1.", "layers.7."): v for k, v in load_file(file).items()}, file)
    jobs = {name: {"adapter_path": str(path)} for name, path in adapters.items()} | {
        "misfit": {"adapter_path": str(misfit)}, "inert": {"adapter_path": str(adapters["lora"])},
        "stages": {"adapter_path": str(adapters["lora"]), "pipeline_parallel_size": 2},
    }  # fmt: skip
    answers = run_jobs(
        [
            {"config": {"model_id": str(base), "dtype": "float32"} | job, "requests": [asdict(r) for r in requests()],
             "patch": "adapter" if name == "inert" else None}
            for name, job in jobs.items()
        ],
        ROOT,
    )  # fmt: skip
    gave = dict(zip(jobs, answers, strict=True))
    plain = generate_all(LanguageModel.load(EngineConfigBase(model_id=str(base), output_dir=Path("x"))), requests())
    for name in ADAPTERS:
        expected = generate_all(LanguageModel.load(config(base, adapters[name])), requests())
        assert_equal(results_of(gave[name]), expected)
        assert expected[0].entropy != plain[0].entropy
        assert gave[name]["facts"]["adapter_applied"] == ("merged" if name in MERGED else "lora")
    assert_equal(results_of(gave["untrained"]), plain)
    assert results_of(gave["stages"]) and gave["stages"]["facts"]["adapter_applied"] == "lora"
    assert gave["misfit"]["error"][0] == "InputError" and "does not fit" in gave["misfit"]["error"][1]
    assert gave["inert"]["error"][0] == "CheckFailed" and "does not act" in gave["inert"]["error"][1]


@pytest.mark.vllm
def test_what_vllms_own_lora_cannot_do_is_known_beforehand(base: Path, adapters: dict[str, Path], tmp_path) -> None:
    from src.models.vllm_adapter import is_zero, lora_rank

    for name, path in adapters.items():
        rank, obstacle = lora_rank(loading.resolve(config(base, path)))
        assert (obstacle is not None) == (name in MERGED), (name, obstacle)
        assert rank == {"rank_pattern": 16}.get(name, 8) or name in MERGED
        assert is_zero(path) == (name == "untrained")
    huge = copy_model(adapters["lora"], tmp_path / "huge")
    settings = json.loads((huge / "adapter_config.json").read_text()) | {"r": 600}
    (huge / "adapter_config.json").write_text(json.dumps(settings))
    assert "600" in lora_rank(loading.resolve(config(base, huge)))[1]


def test_a_merged_copy_is_the_model_with_its_adapter(
    base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILLER_CACHE_DIR", str(tmp_path / "cache"))
    settings = config(base, adapters["dora"])
    files = loading.resolve(settings)
    folder = merged_copy(files, settings)
    merged = LanguageModel.load(EngineConfigBase(model_id=str(folder), output_dir=Path("unused"), device="cpu"))
    assert_equal(generate_all(merged, requests()), generate_all(LanguageModel.load(settings), requests()))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert merged_copy(files, settings) == folder and (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert merged_copy(loading.resolve(config(base, adapters["lora"])), config(base, adapters["lora"])) != folder
    # Other settings of the same weights are another model.
    louder = copy_model(adapters["dora"], tmp_path / "louder")
    stated = json.loads((louder / "adapter_config.json").read_text())
    (louder / "adapter_config.json").write_text(json.dumps(stated | {"lora_alpha": 8 * stated["lora_alpha"]}))
    other = merged_copy(loading.resolve(config(base, louder)), settings)
    again = LanguageModel.load(EngineConfigBase(model_id=str(other), output_dir=Path("unused"), device="cpu"))
    assert_equal(generate_all(again, requests()), generate_all(LanguageModel.load(config(base, louder)), requests()))
    assert other != folder


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_shared_matrix_is_merged_on_one_side_only(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setenv("TILLER_CACHE_DIR", str(tmp_path / "cache"))
    folder = copy_model(tiny_folder, tmp_path / "tied")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**COMMON, head_dim=32, tie_word_embeddings=True)).save_pretrained(folder)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=[target]))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_" in key:
                weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(tmp_path / "adapter")
    settings = config(folder, tmp_path / "adapter")
    merged = merged_copy(loading.resolve(settings), settings)
    copy = LanguageModel.load(EngineConfigBase(model_id=str(merged), output_dir=Path("unused"), device="cpu"))
    assert_equal(generate_all(copy, requests()), generate_all(LanguageModel.load(settings), requests()))


@pytest.mark.parametrize("change", ["narrow", "missing"])
def test_an_adapter_of_another_model_is_refused(adapters: dict[str, Path], base: Path, tmp_path: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    from src.models.vllm_adapter import check_fit

    check_fit(loading.resolve(config(base, adapters["lora"])))
    odd = copy_model(adapters["lora"], tmp_path / "odd")
    tensors = load_file(odd / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors[name] = tensors[name][:, :16].contiguous()
    save_file({k: v for k, v in tensors.items() if change == "narrow" or k != name}, odd / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"1 of its tensors.*layers\.1\.self_attn\.q_proj\.lora_A"):
        check_fit(loading.resolve(config(base, odd)))
