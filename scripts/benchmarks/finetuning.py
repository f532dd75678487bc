"""
Tokens a second of src.finetune against plain TRL: same model, same rows, same LoRA, same learning rate, in one run:
OMP_NUM_THREADS=1 uv run python scripts/benchmarks/finetuning.py --output_dir data/experiments/benchmark_finetuning

Rows have skewed lengths (log-normal), as people's have. Plain TRL is its SFTTrainer on prompt-completion rows with its
own defaults, but for `use_cpu`, `bf16=False` (both compute in float32) and the learning rate. Each training runs in a
process of its own, which has its own peak memory; loading is timed apart. Tokens are those of the rows, without
padding; CPU seconds count beside wall seconds, since other work on the machine does not change them. The loss is that
of 100 other rows afterwards, computed by the same code for all.

--raw leaves the chat template out, and --layers N cuts the model off behind its first N layers: both make the whole
cheaper. Sides besides `ours` and `trl` show where a difference comes from: each has one more thing of ours.
"""

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODEL_ID = "bundled:smollm2-135m"
SUBJECTS = (
    "the sea", "bread", "winter", "a clock", "maps", "rivers", "birds", "paper", "stones", "music", "rain", "gardens",
    "trains", "wool",
)  # fmt: skip
CLAUSES = (
    "It begins early in the day", "people have known it for centuries", "one needs patience more than tools",
    "the old ways still work", "most of it is done by hand", "the weather decides a good deal",
    "children learn it by watching", "every region has its own word for it", "nothing is thrown away",
    "it can be done alone or with others", "the best time is late autumn", "a good light helps",
)  # fmt: skip
BATCH, RATE, RANK = 8, 2e-4, 16
GROUPED = {"train_sampling_strategy": "group_by_length"}
KEPT = GROUPED | {"gradient_checkpointing": False}
# Settings of TRL's that differ from its own, and whether frozen weights are multiplied by oneDNN.
SIDES = {
    "ours": ({}, False), "trl": ({}, False), "trl_bf16": ({"bf16": True}, False), "trl_grouped": (GROUPED, False),
    "trl_kept_onednn": ({"gradient_checkpointing": False}, True), "trl_grouped_kept": (KEPT, False),
    "trl_grouped_kept_onednn": (KEPT, True),
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What all trainings have in common."""

    model: Path
    n: int
    median: int
    raw: bool


def chats(n: int, seed: int, median: int) -> list[dict[str, str]]:
    """Rows of prompt and completion; the completions' lengths are log-normal (`median` words, at most 400)."""
    chance = random.Random(seed)
    rows = []
    for _ in range(n):
        subject = chance.choice(SUBJECTS)
        n_words = min(400, max(4, round(math.exp(chance.gauss(math.log(median), 1.0)))))
        words: list[str] = [f"About {subject}:"]
        while sum(len(each.split()) for each in words) < n_words:
            words.append(f"{chance.choice(CLAUSES)},")
        rows.append({"prompt": f"Tell me about {subject}.\n", "completion": " ".join(words).rstrip(",") + "."})
    return rows


def model_of(layers: int | None, folder: Path) -> Path:
    """The bundled model's folder, or one in `folder` with its first layers alone."""
    from src.models.bundled import bundled_folder

    whole, cut = bundled_folder(MODEL_ID), folder / f"first_{layers}_layers"
    if layers is None:
        return whole
    if not cut.is_dir():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from src.models.model_folder import appearing

        model = AutoModelForCausalLM.from_pretrained(whole)
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        with appearing(cut) as scratch:
            model.save_pretrained(scratch)
            AutoTokenizer.from_pretrained(whole).save_pretrained(scratch)
    return cut


def ours(setup: Setup, seed: int, folder: Path) -> tuple[float, float, Path]:
    """Seconds of training, CPU seconds, and the adapter."""
    from src.common.cli import parse_config
    from src.finetune import FinetuneConfig, main
    from src.training import training

    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chats(setup.n, 0, setup.median)))
    timed = {}
    plain = training.SftTrainer.train

    def train(self, *args, **kwargs):
        timed["started"] = clocks()
        try:
            return plain(self, *args, **kwargs)
        finally:
            timed["ended"] = clocks()

    training.SftTrainer.train = train
    words = [
        "--dataset_path", path, "--model_id", setup.model, "--output_dir", folder / "run", "--batch_size", BATCH,
        "--lr", RATE, "--lr_scheduler", "linear", "--lora_rank", RANK, "--seed", seed,
    ]  # fmt: skip
    main(parse_config(FinetuneConfig, [*map(str, words), *(["--raw_prompts"] if setup.raw else [])]))
    return *between(timed["started"], timed["ended"]), folder / "run" / "epoch_0"


def plain_trl(name: str, setup: Setup, seed: int, folder: Path) -> tuple[float, float, Path]:
    """As `ours`."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from src.models.cpu_linear import frozen_linears

    rows, tokenizer = chats(setup.n, 0, setup.median), AutoTokenizer.from_pretrained(setup.model)
    if setup.raw:
        rows = [row | {"prompt": tokenizer.bos_token + row["prompt"]} for row in rows]
    else:
        roles = {"prompt": "user", "completion": "assistant"}
        rows = [{key: [{"role": roles[key], "content": text}] for key, text in row.items()} for row in rows]
    changed, with_onednn = SIDES[name]
    settings = {"use_cpu": True, "bf16": False, "learning_rate": RATE, "report_to": "none", "seed": seed} | changed
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(setup.model),
        args=SFTConfig(
            output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=BATCH, save_strategy="no",
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    if setup.raw:  # Else the template's newline behind the end of the answer is one more of theirs.
        expected = [list(each.token_ids) for each in sequences(setup, tokenizer, setup.n, 0)]
        assert list(trainer.train_dataset["input_ids"]) == expected, "not the same tokens"
    with frozen_linears(trainer.model) if with_onednn else nullcontext():
        started = clocks()
        trainer.train()
        ended = clocks()
    trainer.model.save_pretrained(folder / "adapter")
    return *between(started, ended), folder / "adapter"


def clocks() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def between(first: tuple[float, float], last: tuple[float, float]) -> tuple[float, float]:
    return last[0] - first[0], last[1] - first[1]


def sequences(setup: Setup, tokenizer: Any, n: int, seed: int) -> list[Any]:
    """Rows as tokens, as src.finetune has them."""
    from datetime import date

    from src.models.chat_format import PersonaRenderer
    from src.models.single_prompts import SinglePromptRenderer
    from src.training.rendering import ChatFormat, RawFormat, Wrapping, examples
    from src.training.rows import conversation

    form = ChatFormat(PersonaRenderer(tokenizer, "system"), {tokenizer.eos_token_id})
    if setup.raw:
        raw = SinglePromptRenderer(
            tokenizer, date(2026, 1, 2), raw=True, system_prompt=None, chat_template=None, thinking=True
        )
        form = RawFormat(raw, tokenizer.eos_token_id)
    rows = chats(n, seed, setup.median)
    return [made for row in rows for made in examples(conversation("-", row, 0), form, Wrapping())]


def measured_loss(adapter: Path | None, setup: Setup, n: int) -> float:
    """Mean −ln p of the completions and ends of `n` other rows."""
    import torch

    from src.common.model_config import ModelConfigBase
    from src.models.language_model import LanguageModel

    config = ModelConfigBase(model_id=str(setup.model), adapter_path=adapter, output_dir=Path("unused"))
    model = LanguageModel.load(config)
    total, count = 0.0, 0
    for each in sequences(setup, model.tokenizer, n, 1):
        ids, (start, end) = torch.tensor(each.token_ids), each.answers[0]
        with torch.inference_mode():
            logits = model.model(ids[None]).logits[0].log_softmax(-1)
        total -= logits[torch.arange(start - 1, end - 1), ids[start:end]].sum().item()
        count += end - start
    return total / count


def side(name: str, setup: Setup, seed: int, folder: Path) -> None:
    """One training in this process; leaves its figures as JSON."""
    from src.common.provenance import peak_memory_mib
    from src.models.loading import load_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    wall, cpu, adapter = ours(setup, seed, folder) if name == "ours" else plain_trl(name, setup, seed, folder)
    peak = peak_memory_mib()["process"]
    n_tokens = sum(len(each.token_ids) for each in sequences(setup, load_tokenizer(setup.model), setup.n, 0))
    found = {"side": name, "seed": seed, "wall_s": wall, "cpu_s": cpu, "peak_mib": peak, "tokens": n_tokens}
    (folder / "figures.json").write_text(json.dumps(found | {"adapter": str(adapter)}))


def show(setup: Setup, n_held_out: int, runs: list[tuple[str, int, Path]]) -> None:
    """The table, and what it says of the loss."""
    print(f"{setup.n} rows; before: loss {measured_loss(None, setup, n_held_out):.4f}\n")
    print("| side | seed | tokens/s | tokens/CPU-s | peak MiB | loss after |\n|---|---|---|---|---|---|")
    losses: dict[str, list[float]] = {}
    for name, seed, folder in runs:
        if (folder / "figures.json").exists():
            found = json.loads((folder / "figures.json").read_text())
            loss = measured_loss(Path(found["adapter"]), setup, n_held_out)
            losses.setdefault(name, []).append(loss)
            rates = [found["tokens"] / found[key] for key in ("wall_s", "cpu_s")]
            print(f"| {name} | {seed} | {rates[0]:.1f} | {rates[1]:.1f} | {found['peak_mib']:.0f} | {loss:.4f} |")
    for name, values in losses.items():
        print(f"{name}: loss {min(values):.4f} to {max(values):.4f}, mean {sum(values) / len(values):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--n_chats", type=int, default=400)
    parser.add_argument("--median_words", type=int, default=30)
    parser.add_argument("--layers", type=int, help="only the model's first N layers")
    parser.add_argument("--raw", action="store_true", help="prompt and completion without a chat template")
    parser.add_argument("--n_held_out", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["trl", "ours"])
    parser.add_argument("--here", action="store_true", help="the first side and seed alone, in this process")
    parser.add_argument("--only_table", action="store_true", help="the figures that are there")
    args = parser.parse_args()
    setup = Setup(model_of(args.layers, args.output_dir), args.n_chats, args.median_words, args.raw)
    runs = [(name, seed, args.output_dir / f"{name}_{seed}") for seed in args.seeds for name in args.sides]
    if args.here:
        side(*runs[0][:1], setup, *runs[0][1:])
        return
    for name, seed, folder in runs:
        if not args.only_table and not (folder / "figures.json").exists():
            # A later flag wins over an earlier one.
            words = [*sys.argv[1:], "--here", "--seeds", str(seed), "--sides", name]
            subprocess.run([sys.executable, __file__, *words], check=True)
    show(setup, args.n_held_out, runs)


if __name__ == "__main__":
    main()
