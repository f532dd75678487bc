"""A saved model is the edited one, in a whole folder, and nothing but what was edited has changed."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from src.common.errors import CheckFailed, InputError
from src.common.model_config import ModelConfigBase
from src.models import loading
from src.models.architectures import attention_writers, decoder_layers, mlp_writers
from src.models.language_model import LanguageModel, generate_all
from src.models.model_folder import appearing, changed_tensors, stored_dtype
from src.models.saving import check_savable, check_saved, push, save_edited
from src.models.types import GenerationRequest
from tests.conftest import ROOT
from tests.hub_upload_server import TOKEN, hub_upload_server
from tests.tiny_models import COMMON, copy_model, tiny_model, tiny_multimodal

IDS = torch.arange(40, 60)


def config(folder: Path, **settings: object) -> ModelConfigBase:
    return ModelConfigBase(model_id=str(folder), output_dir=Path("unused"), device="cpu", **settings)


def edit(model: nn.Module) -> None:
    """Halves every writer's first row: the first dimension of what it adds to the residual stream."""
    for layer in decoder_layers(model):
        for writer in (*attention_writers(layer), *mlp_writers(layer)):
            changed = writer.weight.float().clone()
            changed[..., 0, :] *= 0.5
            writer.weight.copy_(changed)


def save(folder: Path, target: Path, change: Callable[[nn.Module], None] = edit, **settings: object) -> list[str]:
    settings = config(folder, **settings)
    return save_edited(loading.resolve(settings), settings, change, target)


@torch.inference_mode()
def logits(model: nn.Module) -> Tensor:
    return model(IDS[None]).logits[0].float()


@torch.inference_mode()
def edited_logits(model: nn.Module) -> Tensor:
    edit(model)
    return logits(model)


def with_tokenizer(model: nn.Module, folder: Path, bundled: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mixtral", "qwen3_moe", "qwen3_next", "multimodal"])
def test_the_saved_model_is_the_edited_one_and_only_writers_changed(
    tmp_path: Path, bundled_folder: Path, name: str
) -> None:
    model = tiny_multimodal() if name == "multimodal" else tiny_model(name)
    base = with_tokenizer(model, tmp_path / "base", bundled_folder)
    changed = save(base, tmp_path / "edited")
    auto = AutoModelForImageTextToText if name == "multimodal" else AutoModelForCausalLM
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "edited").eval()), edited_logits(model))
    assert not torch.equal(logits(auto.from_pretrained(base).eval()), logits(model))
    writers = ("o_proj.weight", "down_proj.weight", "w2.weight", "out_proj.weight", "down_proj")
    assert changed and all(each.endswith(writers) and "vision" not in each for each in changed), changed
    stored = [f for folder in (base, tmp_path / "edited") for f in folder.glob("*.safetensors")]
    before, after = (set(safe_open(file, framework="pt").keys()) for file in stored)
    assert before == after
    assert changed_tensors(base, tmp_path / "edited") == changed and changed_tensors(base, base) == []


def test_the_folder_is_whole_and_every_other_file_is_the_base_models(tiny_folder: Path, tmp_path: Path) -> None:
    base = copy_model(tiny_folder, tmp_path / "base")
    # Values that contradict one another: a published model may have them, and transformers would refuse to write them.
    (base / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7, "eos_token_id": [2, 0]}')
    (base / "README.md").write_text("of the base")
    (base / "LICENSE").write_text("terms")
    (base / "model.onnx").write_bytes(b"the base's weights")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    settings = config(base)
    save_edited(loading.resolve(settings), settings, edit, tmp_path / "edited", texts={"README.md": "of the edited"})
    rewritten = ("model.safetensors", "config.json", "README.md", "model.onnx")
    for file in base.rglob("*"):
        if file.is_file() and file.name not in rewritten:
            assert (tmp_path / "edited" / file.relative_to(base)).read_bytes() == file.read_bytes(), file.name
    assert (tmp_path / "edited" / "README.md").read_text() == "of the edited"
    assert not (tmp_path / "edited" / "model.onnx").exists()
    assert str(tmp_path) not in (tmp_path / "edited" / "config.json").read_text()
    loaded = LanguageModel.load(config(tmp_path / "edited"))
    assert loaded.eos_ids == LanguageModel.load(settings).eos_ids == {0, 2}
    assert loaded.tokenizer.chat_template == LanguageModel.load(settings).tokenizer.chat_template


@pytest.mark.parametrize("touched", ["layers", "embedding", "head", "both"])
def test_tied_matrices_stay_one_unless_the_edit_parts_them(tmp_path: Path, bundled_folder: Path, touched: str) -> None:
    def change(model: nn.Module) -> None:
        head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert head is not embeddings
        if touched == "layers":
            edit(model)
        if touched in ("embedding", "both"):
            embeddings[:, 3] *= 0.5
        if touched in ("head", "both"):
            head[:, 3] *= 0.5

    torch.manual_seed(0)
    tied = LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=True)).eval()
    base = with_tokenizer(tied, tmp_path / "base", bundled_folder)
    torch.manual_seed(0)
    two = LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=False)).eval()
    two.load_state_dict(tied.state_dict())
    with torch.no_grad():
        change(two)
    changed = save(base, tmp_path / "edited", change)
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "edited").eval()
    assert torch.equal(logits(saved), logits(two))
    stays_tied = touched in ("layers", "both")
    assert saved.config.tie_word_embeddings == stays_tied
    assert (saved.lm_head.weight is saved.model.embed_tokens.weight) == stays_tied
    assert ("lm_head.weight" in changed) == (not stays_tied)


def test_the_stored_dtype_is_kept_and_the_edit_rounded_once(tiny_folder: Path, tmp_path: Path) -> None:
    base = copy_model(tiny_folder, tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    model.save_pretrained(base)
    assert stored_dtype(base) == torch.bfloat16 and stored_dtype(tiny_folder) == torch.float32

    def change(model: nn.Module) -> None:
        weight = model.model.layers[0].mlp.down_proj.weight
        weight.copy_(weight.float() * 1.7)

    assert save(base, tmp_path / "edited", change, dtype="float32") == ["model.layers.0.mlp.down_proj.weight"]
    with safe_open(tmp_path / "edited" / "model.safetensors", framework="pt") as tensors:
        found = tensors.get_tensor("model.layers.0.mlp.down_proj.weight")
    before = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(found, (before.float() * 1.7).bfloat16())
    assert json.loads((tmp_path / "edited" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_is_merged_before_the_edit(tiny_folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_folder), LoraConfig(r=4, target_modules=["o_proj"]))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    save(tiny_folder, tmp_path / "edited", adapter_path=tmp_path / "adapter")
    found = logits(LlamaForCausalLM.from_pretrained(tmp_path / "edited").eval())
    torch.testing.assert_close(found, edited_logits(model.eval().merge_and_unload()), atol=1e-5, rtol=0)
    assert (found - edited_logits(LlamaForCausalLM.from_pretrained(tiny_folder).eval())).abs().max() > 1e-3


def test_generation_is_that_of_the_model_edited_in_memory(bundled_folder: Path, tmp_path: Path) -> None:
    def change(model: nn.Module) -> None:
        for layer in decoder_layers(model):
            weight = layer.mlp.down_proj.weight
            weight.copy_(weight * 1.05)

    save(bundled_folder, tmp_path / "edited", change)
    memory = LanguageModel.load(config(bundled_folder))
    prompt = tuple(memory.tokenizer("The capital of France is").input_ids)
    requests = [GenerationRequest(id="a", token_ids=prompt, max_tokens=8)]
    plain = generate_all(memory, requests)[0]
    with torch.no_grad():
        change(memory.model)
    expected, found = (
        generate_all(memory, requests),
        generate_all(LanguageModel.load(config(tmp_path / "edited")), requests),
    )
    assert found == expected and found[0].entropy != plain.entropy


def test_nothing_is_left_of_a_save_that_fails_and_nothing_is_overwritten(tiny_folder: Path, tmp_path: Path) -> None:
    def broken(model: nn.Module) -> None:
        raise RuntimeError("on the way")

    def infinite(model: nn.Module) -> None:
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf

    with pytest.raises(RuntimeError, match="on the way"):
        save(tiny_folder, tmp_path / "edited", broken)
    with pytest.raises(CheckFailed, match=r"not finite in model\.layers\.1\.mlp\.down_proj\.weight"):
        save(tiny_folder, tmp_path / "edited", infinite)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "edited").mkdir()
    save(tiny_folder, tmp_path / "edited")
    with pytest.raises(InputError, match="is there already and not empty"):
        save(tiny_folder, tmp_path / "edited")
    with pytest.raises(OSError), appearing(tmp_path / "edited"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]


def test_weights_that_are_stored_quantized_are_refused_before_anything_is_loaded(
    tiny_folder: Path, tmp_path: Path
) -> None:
    base = copy_model(tiny_folder, tmp_path / "base")
    settings = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (base / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"stored quantized \(gptq\).*take the model that it was made from"):
        check_savable(loading.resolve(config(base)), tmp_path / "edited")


def log_probs_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def log_probs(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(ids[None]).logits[0].float().log_softmax(-1)

    return log_probs


def test_a_saved_model_that_is_another_is_found_out(tiny_folder: Path, tmp_path: Path) -> None:
    save(tiny_folder, tmp_path / "edited")
    model = LlamaForCausalLM.from_pretrained(tiny_folder).eval()
    prompts = [tuple(range(10, 30)), (7, 8)]
    settings = config(tiny_folder)
    with pytest.raises(CheckFailed, match="log-probabilities differ by up to"):
        check_saved(tmp_path / "edited", settings, log_probs_of(model), prompts, torch.float32)
    with torch.no_grad():
        edit(model)
    found = check_saved(tmp_path / "edited", settings, log_probs_of(model), prompts, torch.float32)
    assert found.largest < 1e-5 and 0 <= found.mean_kl < 1e-6
    # In half precision the bar is the distribution's.
    half = check_saved(tmp_path / "edited", settings, log_probs_of(model.bfloat16()), prompts, torch.bfloat16)
    assert 0 < half.mean_kl < 0.01 and half.largest > found.largest
    for weight in model.parameters():
        weight.data *= 3
    with pytest.raises(CheckFailed, match="mean KL per token"):
        check_saved(tmp_path / "edited", settings, log_probs_of(model), prompts, torch.bfloat16)


def test_a_push_is_whole_and_private_unless_it_is_asked_to_be_public(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "README.md", "model.safetensors"):
        (folder / name).write_text(f"{name}'s content")
    with hub_upload_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        assert push(folder, "someone/edited", public=False) == f"{hub.address}/someone/edited"
        assert hub["someone/edited"]["private"]
        files = hub["someone/edited"]["files"]
        assert files == {file.name: file.read_bytes() for file in folder.iterdir()}
        # Of an earlier, larger model: a load could take these for the weights.
        files["model-00001-of-00002.safetensors"] = files["model.safetensors.index.json"] = b"old"
        (folder / "README.md").write_text("second")
        push(folder, "someone/edited", public=False)
        assert files == {file.name: file.read_bytes() for file in folder.iterdir()}

        push(folder, "someone/open", public=True)
        assert not hub["someone/open"]["private"]
        before = dict(hub["someone/open"]["files"])
        (folder / "README.md").write_text("secret")
        with pytest.raises(InputError, match=r"--push_to_hub someone/open: this repository is there already, and publ"):
            push(folder, "someone/open", public=False)
        assert hub["someone/open"]["files"] == before

        monkeypatch.setenv("HF_TOKEN", "hf_may_read")
        with pytest.raises(InputError, match=r"--push_to_hub someone/else: the hub did not take it .*HF_TOKEN"):
            push(folder, "someone/else", public=False)
        assert "someone/else" not in hub


def test_a_hub_that_is_not_there_and_a_name_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"--push_to_hub a/b/c: not a hub id"):
        push(tmp_path, "a/b/c", public=False)
    with pytest.raises(InputError, match=r"did not take it \(ConnectError"):
        push(tmp_path, "someone/edited", public=False)


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_answers_as_transformers_does(small_folder: Path, tmp_path: Path) -> None:
    from tests.test_vllm_engine import assert_equal
    from tests.vllm_process import results_of, run_jobs

    save(small_folder, tmp_path / "edited")
    requests = [GenerationRequest(id=str(i), token_ids=tuple(range(50, 58 + i)), max_tokens=8) for i in range(3)]
    job = {"config": {"model_id": str(tmp_path / "edited"), "dtype": "float32"}, "requests": [*map(asdict, requests)]}
    answered = results_of(run_jobs([job], ROOT)[0])
    assert_equal(answered, generate_all(LanguageModel.load(config(tmp_path / "edited")), requests))
    assert answered != generate_all(LanguageModel.load(config(small_folder)), requests)
