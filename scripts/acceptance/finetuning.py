"""
The full figures of src.finetune: accuracy on held-out words before and after, adapter = merged (= vLLM with the
adapter), the label mask over all stock templates, resuming, several processes, a full disk. About 25 minutes on two
cores; `--num_tasks 64` and `--parts` make it shorter:
uv run --extra cpu python scripts/acceptance/finetuning.py --output_dir data/experiments/acceptance_finetuning
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODEL_ID = "bundled:smollm2-135m"
DATA = ROOT / "data/finetuning/capitalization.json"
PROMPT = "Capitalize the word: {input}"
TRAINING = (
    "--dataset_path", DATA, "--prompt", PROMPT, "--model_id", MODEL_ID, "--lr", "5e-4", "--batch_size", "16",
    "--validate_every", "10",
)  # fmt: skip
PARTS = ("accuracy", "same", "vllm", "templates", "resuming", "processes", "disk")


def words_of(name: str, *more: object) -> list[str]:
    return [sys.executable, "-m", f"src.{name}", *map(str, more)]


def accuracy(adapter: Path | None, limit: int | None) -> tuple[int, int]:
    """Words of the test split that are answered with exactly the right one, and how many there are."""
    from src.common.model_config import ModelConfigBase
    from src.models.chat_format import PersonaRenderer
    from src.models.language_model import LanguageModel
    from src.models.types import GenerationRequest

    rows = json.loads(DATA.read_text())["test"][:limit]
    model = LanguageModel.load(ModelConfigBase(model_id=MODEL_ID, adapter_path=adapter, output_dir=Path("unused")))
    renderer = PersonaRenderer(model.tokenizer, "system")
    requests = [
        GenerationRequest(
            id=row["output"],
            token_ids=renderer.render(PROMPT.replace("{input}", row["input"])).token_ids,
            max_tokens=12,
        )
        for row in rows
    ]
    right = []
    model.generate(requests, on_result=lambda result: right.append(result.text.strip() == result.id))
    return sum(right), len(right)


def log_probs(adapter: Path | None = None, folder: str = MODEL_ID, dtype: str = "float32"):
    """Behind every token of the test words, in four rows: (4, 24, vocabulary)."""
    import torch

    from src.common.model_config import ModelConfigBase
    from src.models.language_model import LanguageModel

    model = LanguageModel.load(ModelConfigBase(model_id=folder, adapter_path=adapter, output_dir=Path("unused")))
    with torch.inference_mode():
        net = model.model.to(getattr(torch, dtype))
        return torch.stack([net(ids[None]).logits[0].log_softmax(-1) for ids in probes(model.tokenizer)])


def same(adapter: Path) -> None:
    """
    How far the merged model is from model and adapter. The second and third token of a text without a template are
    where float32 itself is far from float64, so that all places are compared in float64 too.
    """
    for dtype in ("float32", "float64"):
        far = (log_probs(adapter, dtype=dtype) - log_probs(folder=str(adapter / "merged"), dtype=dtype)).abs()
        found = f"at most {far[:, -1].max():.2g} behind the rows, {far.max():.2g} anywhere"
        print(f"adapter and merged, {dtype}: log-probabilities differ by {found}", flush=True)


def probes(tokenizer):
    """Token ids (4, 24)."""
    text = " ".join(row["input"] for row in json.loads(DATA.read_text())["test"])
    import torch

    return torch.tensor(tokenizer(text)["input_ids"][: 4 * 24]).view(4, 24)


def on_vllm(adapter: Path) -> float:
    """The largest difference of any next token's log-probability between vLLM with the adapter and transformers."""
    from src.common.engine_config import EngineConfigBase
    from src.models.vllm_check import all_log_probabilities
    from src.models.vllm_engine import VLLMEngine

    config = EngineConfigBase(
        model_id=MODEL_ID, adapter_path=adapter, output_dir=Path("unused"), dtype="float32", device="cpu",
        max_model_len=256, kv_cache_gib=0.5,
    )  # fmt: skip
    expected = log_probs(adapter)
    largest = 0.0
    with VLLMEngine.load(config, batch_size=8) as engine:
        for row, ids in zip(expected, probes(engine.tokenizer), strict=True):
            found = all_log_probabilities(engine, ids.tolist(), 1).logprobs
            for token_id, value in zip(found.token_ids, found.logprobs, strict=True):
                largest = max(largest, abs(value - row[-1, token_id].item()))
    return largest


def trained(folder: Path, *more: object) -> Path:
    """A training of one epoch in a process of its own; returns its adapter's weights."""
    words = words_of("finetune", *TRAINING, "--epochs", 1, "--output_dir", folder, *more)
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / "epoch_0/adapter_model.safetensors"


def apart(first: Path, second: Path) -> float:
    """The largest difference of two adapters' weights."""
    from safetensors.torch import load_file

    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def interrupted(folder: Path, number: int, after: int, *more: object) -> Path:
    """The training in `folder`, sent a signal when step `after` is there, then gone on with."""
    words = words_of("finetune", *TRAINING, "--epochs", 1, "--output_dir", folder, *more)
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= after):
        time.sleep(0.05)
    os.kill(process.pid, number)
    code, is_done = process.wait(), (folder / "DONE").exists()
    print(f"  {signal.Signals(number).name} after step {after}: exit code {code}, DONE {is_done}")
    return trained(folder, *more)


def resuming(folder: Path, n_words: int) -> None:
    """Interrupted in mid-epoch and gone on with, by either signal, beside a run that nothing stopped."""
    more = ["--num_tasks", n_words, "--checkpoint_every", 2]
    expected = trained(folder / "whole", *more)
    for number in (signal.SIGTERM, signal.SIGKILL):
        target = folder / signal.Signals(number).name
        found = interrupted(target, number, max(2, n_words // 32), *more)
        print(f"  adapter tensors apart by at most {apart(expected, found)}", flush=True)


def processes(folder: Path, n_words: int) -> None:
    """One process, two, and two with the model's own weights spread over them."""
    variants = {"one": [], "two": ["--num_processes", 2], "spread": ["--num_processes", 2, "--shard_weights"]}
    found = {}
    for name, more in variants.items():
        found[name] = trained(folder / name, "--num_tasks", n_words, *more)
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows]
        print(
            f"  {name}: losses {losses}, validation {rows[-1]['validation_loss']}, adapter apart from one process's by "
            f"at most {apart(found['one'], found[name]):.2g}", flush=True,
        )  # fmt: skip


def full_disk(folder: Path, n_words: int) -> None:
    """On a disk that holds one checkpoint and not a second one beside it, which is then made larger. Needs root."""
    more = ["--num_tasks", n_words, "--checkpoint_every", 1]
    expected = trained(folder / "roomy", *more)
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", disk], check=True)
    try:
        words = words_of("finetune", *TRAINING, "--epochs", 1, "--output_dir", disk / "run", *more)
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        kept = [path.name for path in (disk / "run/checkpoints").iterdir()]
        print(f"  exit code {done.returncode}, {kept} left: {done.stderr.strip().splitlines()[-1]}", flush=True)
        subprocess.run(["mount", "-o", "remount,size=400m", disk], check=True)
        print(f"  gone on with: adapter tensors apart by at most {apart(expected, trained(disk / 'run', *more))}")
    finally:
        subprocess.run(["umount", disk], check=True)


def templates() -> None:
    """Which of TRL's stock templates give answers and one end each, and what is said of the others."""
    from datetime import date

    from src.common.errors import InputError
    from src.models.bundled import bundled_folder
    from src.models.chat_format import PersonaRenderer
    from src.training.rendering import ChatFormat, Wrapping, examples
    from src.training.rows import Conversation
    from tests.chat_templates import template_files, tokenizer_for

    chat = ({"role": "user", "content": "What is rain?"}, {"role": "assistant", "content": "Water <|im_end|> falls."})
    outcomes: dict[str, list[str]] = {}
    for name, file in template_files().items():
        tokenizer = tokenizer_for(file, bundled_folder(MODEL_ID))
        # Which token ends an answer is the generation config's to say: here any may.
        form = ChatFormat(
            PersonaRenderer(tokenizer, "system", thinking=False, today=date(2026, 1, 2)), set(range(len(tokenizer)))
        )
        try:
            (made,) = examples(Conversation(name, chat), form, Wrapping())
            start, end = made.answers[0]
            text = tokenizer.decode(made.token_ids[start:end]).strip()
            outcome = "answer and one end" if text.startswith(chat[1]["content"]) else f"wrong: {text!r}"
        except InputError as error:
            outcome = f"refused: {str(error).split(': ', 1)[1][:90]}"
        outcomes.setdefault(outcome, []).append(name)
    for outcome, names in outcomes.items():
        print(f"  {len(names)} {outcome}: {', '.join(names)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--num_tasks", type=int, default=535, help="training words")
    parser.add_argument("--num_words", type=int, default=None, help="of the test split; all unless given")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    args = parser.parse_args()
    folder, last = args.output_dir, args.output_dir / "capitalize" / f"epoch_{args.epochs - 1}"
    if "accuracy" in args.parts:
        words = [*TRAINING, "--epochs", args.epochs, "--num_tasks", args.num_tasks, "--save_last_epoch_only", "--merge"]
        words += ["--output_dir", folder / "capitalize"]
        subprocess.run(words_of("finetune", *words), cwd=ROOT, check=True)
        for name, adapter in (("base", None), ("adapter", last)):
            print("{}: {} of {} held-out words".format(name, *accuracy(adapter, args.num_words)), flush=True)
        rows = [json.loads(line) for line in (folder / "capitalize/metrics.jsonl").read_text().splitlines()]
        print("validation loss:", {r["step"]: r["validation_loss"] for r in rows if r["validation_loss"] is not None})
    if "same" in args.parts:
        same(last)
    if "vllm" in args.parts:
        print(f"transformers and vLLM with the adapter: at most {on_vllm(last):.2g}", flush=True)
    if "templates" in args.parts:
        templates()
    if "resuming" in args.parts:
        resuming(folder, args.num_tasks)
    if "processes" in args.parts:
        processes(folder, args.num_tasks)
    if "disk" in args.parts:
        full_disk(folder, args.num_tasks)


if __name__ == "__main__":
    main()
