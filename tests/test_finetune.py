"""src.finetune: what it leaves, that it goes on as if never stopped, and what it says to bad input."""

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from src.common.cli import parse_config
from src.common.errors import InputError
from src.common.model_config import ModelConfigBase
from src.finetune import FinetuneConfig, main
from src.models.language_model import LanguageModel
from src.models.loading import resolve
from src.models.merging import write_merged
from src.training import trainers
from tests.conftest import ROOT, module_command

WORDS = "apple bread chair dance eagle flame grape house image juice knife lemon music night ocean paper queen"
ROWS = [{"input": word, "output": (word.upper() + " ") * (1 + i % 4)} for i, word in enumerate(WORDS.split())]
DROPOUT = ["--lora_dropout", "0.1", "--gradient_accumulation", "2"]
"""Random numbers and half-made steps: what resuming gets wrong first."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "words.json"
    path.write_text(json.dumps({"train": ROWS[:14], "validation": ROWS[14:]}))
    return path


def arguments(dataset: Path, model: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        "--dataset_path", str(dataset), "--model_id", str(model), "--output_dir", str(output_dir), "--batch_size", "2",
        "--lora_rank", "2", "--epochs", "2", "--lr", "0.01", *more,
    ]  # fmt: skip


def run_here(dataset: Path, model: Path, output_dir: Path, *more: str) -> Path:
    main(parse_config(FinetuneConfig, arguments(dataset, model, output_dir, *more)))
    return output_dir


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files_of(folder: Path) -> set[str]:
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith("logs/")}


def tensors_of(folder: Path, epoch: int = 1) -> dict[str, torch.Tensor]:
    return load_file(folder / f"epoch_{epoch}" / "adapter_model.safetensors")


def same_tensors(first: Path, second: Path, epoch: int = 1) -> bool:
    a, b = tensors_of(first, epoch), tensors_of(second, epoch)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


RUN_FILES = {
    "config.json", "provenance.json", "DONE", ".lock", "metrics.jsonl", "loss.html", "summary.json", "run_name.txt",
}  # fmt: skip
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "base_model.json"}


@pytest.fixture(scope="module")
def whole(dataset: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with dropout."""
    return run_here(dataset, tiny_folder, tmp_path_factory.mktemp("runs") / "whole", *DROPOUT)


def test_a_run_leaves_its_adapters_and_numbers(whole: Path) -> None:
    assert files_of(whole) == RUN_FILES | {f"epoch_{n}/{name}" for n in (0, 1) for name in ADAPTER_FILES}
    rows = rows_of(whole)
    # 14 rows in batches of 2, two of them a step: the last step of an epoch has one batch less.
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["validation_loss"] is not None for row in rows] == [False, False, False, True] * 2
    assert all(0 < row["loss"] < 20 and row["tokens_per_second"] > 0 and row["memory_mib"] > 0 for row in rows)
    assert rows[3]["tokens"] * 2 == rows[7]["tokens"]
    assert rows[7]["validation_loss"] < rows[3]["validation_loss"] and rows[0]["learning_rate"] == 0.01
    assert "plotly" in (whole / "loss.html").read_text().lower()
    assert json.loads((whole / "provenance.json").read_text())["sessions"][0]["train_sequences"] == 14


def test_the_validation_loss_is_the_mean_over_all_learned_tokens(whole: Path, dataset: Path, tiny_folder: Path) -> None:
    from transformers import AutoTokenizer

    model = LanguageModel.load(
        ModelConfigBase(model_id=str(tiny_folder), adapter_path=whole / "epoch_1", output_dir=Path("unused"))
    )
    tokenizer, total, count = AutoTokenizer.from_pretrained(tiny_folder), 0.0, 0
    for row in ROWS[14:]:
        chat = [{"role": "user", "content": row["input"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        answer = tokenizer(row["output"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total -= sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
        count += len(answer)
    assert rows_of(whole)[-1]["validation_loss"] == pytest.approx(total / count, abs=2e-4)


def test_the_same_command_again_changes_nothing(whole: Path, dataset: Path, tiny_folder: Path) -> None:
    before = {
        name: (whole / name).read_bytes() for name in files_of(whole) - {"provenance.json", "DONE", "config.json"}
    }
    run_here(dataset, tiny_folder, whole, *DROPOUT)
    assert {name: (whole / name).read_bytes() for name in before} == before and (whole / "DONE").exists()


def test_validating_and_checkpointing_change_nothing(
    whole: Path, dataset: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    often = run_here(
        dataset, tiny_folder, tmp_path / "often", *DROPOUT, "--validate_every", "1", "--checkpoint_every", "1"
    )
    assert same_tensors(whole, often, 0) and same_tensors(whole, often)
    assert [row["loss"] for row in rows_of(whole)] == [row["loss"] for row in rows_of(often)]
    assert all(row["validation_loss"] is not None for row in rows_of(often))


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until metrics.jsonl has the step, or the process has ended."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_bytes().splitlines()) >= step:
            return
        time.sleep(0.01)
    assert process.poll() is None, f"it ended with {process.returncode} before step {step}"


def start(dataset: Path, model: Path, folder: Path, *more: str) -> subprocess.Popen:
    words = module_command("finetune", arguments(dataset, model, folder, *more))
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Long enough that a signal comes in the middle of an epoch on any machine.
N_EPOCHS = 30
LONG = [*DROPOUT, "--epochs", str(N_EPOCHS), "--checkpoint_every", "3", "--save_last_epoch_only"]


def run_apart(dataset: Path, model: Path, folder: Path, *more: str) -> Path:
    """In a process of its own, with the settings of torch that the interrupted one has."""
    process = start(dataset, model, folder, *more)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return folder


@pytest.fixture(scope="module")
def reference(dataset: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run that is long enough to be interrupted."""
    return run_apart(dataset, tiny_folder, tmp_path_factory.mktemp("runs") / "reference", *LONG)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_interrupted_and_resumed_is_uninterrupted(
    number: int, reference: Path, dataset: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    process = start(dataset, tiny_folder, folder, *LONG)
    wait_for_step(folder, 6, process)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=600)
    assert process.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL), said
    done = len(rows_of(folder))
    assert 6 <= done < len(rows_of(reference)) and not (folder / "DONE").exists()
    if number == signal.SIGTERM:
        # One checkpoint, of the step at which it stopped.
        assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    run_apart(dataset, tiny_folder, folder, *LONG)
    assert same_tensors(reference, folder, N_EPOCHS - 1)
    assert [row["loss"] for row in rows_of(reference)] == [row["loss"] for row in rows_of(folder)]
    assert [row["validation_loss"] for row in rows_of(reference)] == [row["validation_loss"] for row in rows_of(folder)]
    assert not (folder / "checkpoints").exists() and files_of(reference) == files_of(folder)


SAVING = {
    "--epochs_to_save none": set(),
    "--epochs_to_save 0": {f"epoch_0/{name}" for name in ADAPTER_FILES},
    "--save_last_epoch_only": {f"epoch_1/{name}" for name in ADAPTER_FILES},
}


@pytest.mark.parametrize("options", SAVING)
def test_saving_options_leave_exactly_what_they_say(
    options: str, dataset: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = run_here(dataset, tiny_folder, tmp_path / "run", *options.split())
    assert files_of(folder) == RUN_FILES | SAVING[options]


def logits_of(model_id: Path, adapter: Path | None = None) -> torch.Tensor:
    model = LanguageModel.load(ModelConfigBase(model_id=str(model_id), adapter_path=adapter, output_dir=Path("unused")))
    with torch.inference_mode():
        return model.model(torch.arange(10, 30)[None]).logits[0].log_softmax(-1)


def test_merged_weights_stand_beside_the_adapter_or_the_other_way_round(
    dataset: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    beside = run_here(dataset, tiny_folder, tmp_path / "beside", "--merge", "--save_last_epoch_only")
    stashed = run_here(
        dataset, tiny_folder, tmp_path / "stashed", "--merge", "--save_last_epoch_only", "--stash_adapter_weights"
    )
    model_files = {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    own = {f"epoch_1/{name}" for name in ADAPTER_FILES}
    assert files_of(beside) == RUN_FILES | own | {f"epoch_1/merged/{name}" for name in model_files}
    assert files_of(stashed) == RUN_FILES | {f"epoch_1/{name}" for name in model_files} | {
        name.replace("/", "/adapter/") for name in own
    }
    expected = logits_of(tiny_folder, beside / "epoch_1")
    assert (expected - logits_of(tiny_folder)).abs().max() > 1e-3
    for found in (
        logits_of(beside / "epoch_1" / "merged"),
        logits_of(stashed / "epoch_1"),
        logits_of(tiny_folder, stashed / "epoch_1" / "adapter"),
    ):
        assert (found - expected).abs().max() < 1e-4
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), beside / "epoch_1")
    with torch.inference_mode():
        found = plain(torch.arange(10, 30)[None]).logits[0].log_softmax(-1)
    assert (found - expected).abs().max() < 1e-5


def test_an_adapter_of_a_model_in_4_bits_is_merged_into_the_whole_one(
    whole: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    # Training in 4 bits needs CUDA; merging what came of it does not.
    config = ModelConfigBase(model_id=str(tiny_folder), adapter_path=whole / "epoch_1", output_dir=Path("unused"))
    (tmp_path / "merged").mkdir()
    write_merged(resolve(config), replace(config, quantization="nf4"), tmp_path / "merged")
    assert (logits_of(tmp_path / "merged") - logits_of(tiny_folder, whole / "epoch_1")).abs().max() < 1e-4


def test_an_adapter_is_refused_on_other_weights(whole: Path, tiny_folder: Path, small_folder: Path) -> None:
    with pytest.raises(InputError, match="was trained on"):
        logits_of(small_folder, whole / "epoch_1")
    settings = json.loads((whole / "epoch_1" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_folder) and settings["lora_alpha"] == 4


def test_a_persona_run_takes_the_adapter(whole: Path, tiny_folder: Path, tmp_path: Path) -> None:
    from src.run_personas import RunPersonasConfig
    from src.run_personas import main as run_personas

    words = [
        "--prompts_json", "data/personas/prompts.json", "--personae_json", "data/personas/personae.json", "--num_tasks",
        "1", "--num_personae", "1", "--max_tokens", "3", "--model_id", str(tiny_folder), "--adapter_path",
        str(whole / "epoch_1"), "--output_dir", str(tmp_path / "personas"),
    ]  # fmt: skip
    run_personas(parse_config(RunPersonasConfig, words))
    assert json.loads((tmp_path / "personas" / "provenance.json").read_text())["adapter_fingerprint"]


def test_packs_and_batches_give_the_same_losses(dataset: Path, tiny_folder: Path, tmp_path: Path) -> None:
    # One step an epoch, so that both have the same rows in it.
    one = ["--batch_size", "14", "--train_on", "all"]
    padded = run_here(dataset, tiny_folder, tmp_path / "padded", *one)
    packed = run_here(dataset, tiny_folder, tmp_path / "packed", *one, "--packing", "--max_seq_len", "256")
    for first, second in zip(rows_of(padded), rows_of(packed), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-4)
        assert first["tokens"] == second["tokens"]


def test_accumulated_steps_are_as_one_batch(dataset: Path, tiny_folder: Path, tmp_path: Path) -> None:
    one = run_here(dataset, tiny_folder, tmp_path / "one", "--batch_size", "14")
    several = run_here(dataset, tiny_folder, tmp_path / "several", "--batch_size", "4", "--gradient_accumulation", "4")
    for name, tensor in tensors_of(one).items():
        assert torch.allclose(tensor, tensors_of(several)[name], atol=2e-4), name


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_the_learning_rate_rises_and_falls_as_asked_for(
    schedule: str, dataset: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = run_here(dataset, tiny_folder, tmp_path / "run", "--lr_scheduler", schedule, "--warmup_steps", "4")
    fall = {
        "linear": lambda share: 1 - share,
        "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
        "constant_with_warmup": lambda share: 1,
    }[schedule]
    wanted = [0.01 * (step / 4 if step < 4 else fall((step - 4) / 10)) for step in range(14)]
    assert [row["learning_rate"] for row in rows_of(folder)] == pytest.approx(wanted)


ONE_EPOCH = ["--epochs", "1", "--num_tasks", "4"]


@pytest.fixture(scope="module")
def plain(dataset: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps without anything special."""
    return run_here(dataset, tiny_folder, tmp_path_factory.mktemp("runs") / "plain", *ONE_EPOCH)


ACTING = (
    "--seed 7", "--weight_decay 0.5", "--max_grad_norm 0.001", "--lora_alpha 9", "--train_on all",
    "--system_prompt Short.", "--persona Hamlet", "--max_seq_len 33 --truncate",
)  # fmt: skip


@pytest.mark.parametrize("options", ACTING)
def test_every_setting_acts(options: str, plain: Path, dataset: Path, tiny_folder: Path, tmp_path: Path) -> None:
    folder = run_here(dataset, tiny_folder, tmp_path / "run", *ONE_EPOCH, *options.split())
    assert not same_tensors(plain, folder, 0)


def test_recomputing_activations_changes_nothing(
    plain: Path, dataset: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Passes so small that each is computed twice where that is on.
    monkeypatch.setattr(trainers, "PASS_TOKENS", 1)
    twice = run_here(dataset, tiny_folder, tmp_path / "twice", *ONE_EPOCH)
    once = run_here(dataset, tiny_folder, tmp_path / "once", *ONE_EPOCH, "--gradient_checkpointing", "false")
    assert same_tensors(twice, once, 0)
    for name, tensor in tensors_of(plain, 0).items():
        assert torch.allclose(tensor, tensors_of(twice, 0)[name], atol=2e-4), name


BAD = {
    "--lora_rank 0": "--lora_rank 0: expected at least 1",
    "--target_modules q_proj nothing": "--target_modules nothing: not in this model's layers, which have down_proj",
    "--max_seq_len 20": r"words.json:1 \(.* tokens\).*longer than --max_seq_len 20",
    "--prompt word": "expected {input} in it",
    "--epochs_to_save 2": "the epochs are 0 to 1",
    "--stash_adapter_weights": "goes with --merge",
    "--packing": "--packing needs --max_seq_len",
    "--max_seq_len 9999": "the model's context is 512",
    "--lr_scheduler constant --warmup_steps 1": "take constant_with_warmup",
    "--report_to wandb": "wandb is not installed",
    "--objective dpo": "prompt, chosen and rejected",
    "--preventative_direction nowhere": "expected FILE:LAYERS:COEFFICIENT",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_settings_are_one_line(options: str, dataset: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=BAD[options]):
        run_here(dataset, tiny_folder, tmp_path / "run", *options.split())


def test_a_malformed_row_and_an_empty_split_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:2: keys 'prompt'"):
        run_here(path, tiny_folder, tmp_path / "run")
    empty = tmp_path / "rows.json"
    empty.write_text(json.dumps({"train": ROWS, "validation": []}))
    with pytest.raises(InputError, match="'validation' is empty"):
        run_here(empty, tiny_folder, tmp_path / "run")


def test_a_long_warm_up_is_said(dataset: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    run_here(dataset, tiny_folder, tmp_path / "run", "--batch_size", "14", "--warmup_steps", "1", "--run_name", "mine")
    assert "--warmup_steps 1 is more than a third of the 2 steps" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["run_name"] == "mine"


def test_another_configuration_is_refused(whole: Path, dataset: Path, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=r"lr was 0.01, is now 0.5"):
        run_here(dataset, tiny_folder, whole, *DROPOUT, "--lr", "0.5")


def test_variants_of_lora_train_and_load(dataset: Path, tiny_folder: Path, tmp_path: Path) -> None:
    folder = run_here(
        dataset, tiny_folder, tmp_path / "run", "--use_dora", "--use_rslora", "--lora_alpha", "3", "--target_modules",
        "q_proj", "down_proj", "--save_last_epoch_only",
    )  # fmt: skip
    settings = json.loads((folder / "epoch_1" / "adapter_config.json").read_text())
    assert (settings["use_dora"], settings["use_rslora"], settings["lora_alpha"]) == (True, True, 3)
    assert settings["target_modules"] == ["down_proj", "q_proj"]
    assert logits_of(tiny_folder, folder / "epoch_1").isfinite().all()


def test_preferences_are_learned(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": word, "chosen": word.upper(), "rejected": f"{word}, {word}."} for word in WORDS.split()[:8]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "folder").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "folder" / f"{split}.jsonl").write_text(path.read_text())
    folder = run_here(tmp_path / "folder", tiny_folder, tmp_path / "run", "--objective", "dpo", "--epochs", "3")
    rows = rows_of(folder)
    # Before the first step both answers are as likely as without an adapter: −ln ½.
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert rows[-1]["validation_loss"] < 0.67
    assert json.loads((folder / "summary.json").read_text())["validation_sequences_trained_on"] == 8
    assert "8 of 8 validation sequences are also trained on" in capsys.readouterr().err
    assert logits_of(tiny_folder, folder / "epoch_2").isfinite().all()
    # The settings that TRL's trainer has defaults of its own for.
    for number, more in enumerate((["--lora_dropout", "0.5"], ["--dpo_beta", "2"])):
        words = ["--objective", "dpo", "--epochs", "3", *more]
        assert not same_tensors(folder, run_here(path, tiny_folder, tmp_path / str(number), *words), 0)


@pytest.mark.slow
def test_the_command_says_what_it_wrote(dataset: Path, tiny_folder: Path, tmp_path: Path, run_module: Callable) -> None:
    done = run_module("finetune", *arguments(dataset, tiny_folder, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'run' / 'epoch_1'}" in done.stdout and "src.view" in done.stdout
