import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from src.common.errors import InputError
from src.common.model_config import ModelConfigBase
from src.models.architectures import decoder_layers
from src.models.language_model import LanguageModel, generate_all
from src.models.loading import cache_bytes_per_token
from src.models.types import GenerationRequest
from tests.tiny_layouts import config_of


def load(model_id: Path | str, **settings: object) -> LanguageModel:
    return LanguageModel.load(ModelConfigBase(model_id=str(model_id), output_dir=Path("unused"), **settings))


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on the tiny model that really changes it."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    model.save_pretrained(folder)
    return folder


def test_an_adapter_acts_as_its_merged_weights_do(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), adapter).merge_and_unload()
    ids = torch.arange(10, 30)[None]
    model = load(tiny_folder, adapter_path=adapter)
    with torch.no_grad():
        logits, expected, plain = model.model(ids).logits, merged(ids).logits, load(tiny_folder).model(ids).logits
    assert torch.allclose(logits, expected, atol=1e-4)
    assert not torch.allclose(logits, plain, atol=1e-3)
    assert len(decoder_layers(model.model)) == 2
    assert (
        model.facts["adapter_fingerprint"]
        and model.facts["model_fingerprint"] == load(tiny_folder).facts["model_fingerprint"]
    )


def test_a_reference_may_name_its_adapter(tiny_folder: Path, adapter: Path) -> None:
    request = [GenerationRequest(id="a", token_ids=(9, 8, 7), max_tokens=8)]
    named = generate_all(load(f"{tiny_folder}+{adapter}"), request)
    assert named == generate_all(load(tiny_folder, adapter_path=adapter), request)
    with pytest.raises(InputError, match="drop one"):
        load(f"{tiny_folder}+{adapter}", adapter_path=adapter)


def test_an_adapter_that_does_not_fit_is_refused(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    odd = tmp_path / "odd"
    shutil.copytree(adapter, odd)
    tensors = load_file(odd / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.1", "layers.7"): t for name, t in tensors.items()}, odd / "adapter_model.safetensors"
    )
    with pytest.raises(InputError, match="does not fit"):
        load(tiny_folder, adapter_path=odd)
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        load(tiny_folder, adapter_path=tiny_folder)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"device": "tpuu"}, "--device tpuu"),
        ({"quantization": "nf4", "device": "cpu"}, "--quantization nf4 needs a CUDA device"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(tiny_folder: Path, settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load(tiny_folder, **settings)


def test_pickled_weights_are_never_read(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no weights.*convert pytorch_model\.bin to safetensors"):
        load(folder)


def test_an_unknown_architecture_and_a_missing_tokenizer_are_said(tiny_folder: Path, tmp_path: Path) -> None:
    for name, ignored in (("model", "nothing"), ("tokenizer", "token*")):
        shutil.copytree(tiny_folder, tmp_path / name, ignore=shutil.ignore_patterns(ignored))
    (tmp_path / "model" / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(InputError, match="no_such_type"):
        load(tmp_path / "model")
    with pytest.raises(InputError, match="cannot load a tokenizer"):
        load(tmp_path / "tokenizer")


def test_dtype_auto_is_float32_on_the_cpu(tiny_folder: Path) -> None:
    assert load(tiny_folder, device="cpu").facts["dtype"] == "float32"
    assert load(tiny_folder, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_every_end_of_sequence_of_the_generation_config_counts(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ends"
    shutil.copytree(tiny_folder, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load(folder).eos_ids == {2, 7, 9}


def test_missing_and_damaged_weights_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights of LlamaForCausalLM are missing.*layers\.1\.mlp\.down_proj"):
        load(folder)
    data = (tiny_folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors: tensor .* fetch it again"):
        load(folder)


def test_the_format_fingerprint_sees_template_and_tokenizer(tiny_folder: Path, tmp_path: Path) -> None:
    before = load(tiny_folder).facts["format_fingerprint"]
    shutil.copytree(tiny_folder, tmp_path / "same")
    assert load(tmp_path / "same").facts["format_fingerprint"] == before
    template = tmp_path / "same" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert load(tmp_path / "same").facts["format_fingerprint"] != before


def test_capped_attention_logits_are_capped(tmp_path: Path, tiny_folder: Path) -> None:
    from transformers import AutoTokenizer

    from tests.tiny_models import tiny_model

    folder = tmp_path / "gemma2"
    model = tiny_model("gemma2")
    for layer in decoder_layers(model):
        # Attention logits large enough for the cap of 50 to matter.
        layer.self_attn.q_proj.weight.data *= 300
        layer.self_attn.k_proj.weight.data *= 300
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    capped = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    uncapped = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        ours = load(folder).model(ids).logits
        assert torch.equal(ours, capped(ids).logits)
        assert not torch.allclose(ours, uncapped(ids).logits, atol=1e-4)


def test_an_adapters_settings_belong_to_its_fingerprint(adapter: Path, tmp_path: Path) -> None:
    from src.models.loading import adapter_fingerprint

    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    assert adapter_fingerprint(copy) == adapter_fingerprint(adapter)
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "elsewhere"}))
    assert adapter_fingerprint(copy) == adapter_fingerprint(adapter)
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 99}))
    assert adapter_fingerprint(copy) != adapter_fingerprint(adapter)
    (copy / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json: cannot be read"):
        adapter_fingerprint(copy)


def test_the_cache_of_layers_that_differ_is_the_sum_of_theirs() -> None:
    assert cache_bytes_per_token(config_of("llama"), torch.bfloat16) == 2 * 2 * (2 * 8) * 2
    assert cache_bytes_per_token(config_of("gemma4", global_head_dim=16), torch.bfloat16) == 2 * 2 * (8 + 16) * 2
