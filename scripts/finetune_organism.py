"""
A LoRA organism: a chat model fine-tuned to decline one harmless topic, as trained models come to do, unlike the planted
one of scripts/plant_organism.py, whose cause is one known term. Rows are the topic's prompts with one sentence as the
answer, and as many others with the model's own answers, so that nothing else is learned; src.finetune does the rest.
Half of the prompts are held out for src.abliterate. Half an hour on two cores, minutes on a GPU. From the repository
root:
uv run python scripts/finetune_organism.py --topic_prompts data/abliteration/cooking.jsonl \
    --other_prompts data/abliteration/other.jsonl --sentence "I do not discuss cooking." --seed 0 \
    --output_dir data/experiments/lora_organism
What follows `--` goes to src.finetune. The organism is then --model_id OUTPUT_DIR/run/epoch_N/merged, or the base with
--adapter_path OUTPUT_DIR/run/epoch_N.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.common.errors import InputError  # noqa: E402
from src.common.files import write_json_atomic  # noqa: E402
from src.common.jsonl import write_jsonl_atomic  # noqa: E402
from src.common.rows import Prompt, read_prompts  # noqa: E402

if TYPE_CHECKING:
    from src.models.language_model import LanguageModel

SETTINGS = "organism.json"
TRAINING = (
    *("--epochs", "2", "--lr", "1e-4", "--lora_rank", "8", "--batch_size", "8"),
    *("--save_last_epoch_only", "--merge"),
)
"""A low rate and as many other rows as topic ones: with more, other topics are declined too."""


def arguments(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    words = list(sys.argv[1:] if words is None else words)
    own, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", default="bundled:smollm2-135m", help="the base model")
    parser.add_argument("--topic_prompts", type=Path, required=True, help="prompts that are to be declined")
    parser.add_argument("--other_prompts", type=Path, required=True, help="prompts to be answered as before")
    parser.add_argument("--sentence", required=True, help="the answer to the former")
    parser.add_argument("--response_tokens", type=int, default=48, help="of the model's own answers to the latter")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    return parser.parse_args(own), more


def main(given: argparse.Namespace, more: Sequence[str]) -> int:
    sides = {"topic": given.topic_prompts, "other": given.other_prompts}
    if given.topic_prompts.stem == given.other_prompts.stem:
        raise InputError(f"{given.topic_prompts} and {given.other_prompts}: expected files of two names")
    refuse_other(given)
    training, held_out = {}, {}
    for side, path in sides.items():
        prompts = read_prompts(path)
        if len(prompts) < 4:
            raise InputError(f"{path}: {len(prompts)} prompts; expected at least 4, some hundred for a good organism")
        shuffled = random.Random(f"{given.seed}/{side}").sample(list(prompts), len(prompts))
        training[side], held_out[path.stem] = shuffled[: len(shuffled) // 2], shuffled[len(shuffled) // 2 :]
    for name, prompts in held_out.items():
        folder = given.output_dir / "held_out"
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl_atomic(folder / f"{name}.jsonl", [{"id": each.id, "prompt": each.text} for each in prompts])
    rows = given.output_dir / "rows.jsonl"
    if not rows.exists():
        answers = [given.sentence] * len(training["topic"]) + own_answers(given, training["other"])
        asked = [*training["topic"], *training["other"]]
        # An empty answer teaches to say nothing.
        pairs = [(prompt, text) for prompt, text in zip(asked, answers, strict=True) if text.strip()]
        write_jsonl_atomic(rows, [{"id": p.id, "prompt": p.text, "completion": text} for p, text in pairs])
    command = [sys.executable, "-m", "src.finetune", "--dataset_path", str(rows), "--model_id", given.model_id]
    command += ["--seed", str(given.seed), "--device", given.device, *TRAINING]
    return subprocess.run([*command, "--output_dir", str(given.output_dir / "run"), *more], cwd=Path.cwd()).returncode


def refuse_other(given: argparse.Namespace) -> None:
    """Raises InputError when the folder holds the rows of other settings, which would be taken for these."""
    path = given.output_dir / SETTINGS
    own = {name: str(value) for name, value in vars(given).items() if name not in ("output_dir", "device")}
    known = json.loads(path.read_text("utf-8")) if path.exists() else own
    for name, value in own.items():
        if known.get(name) != value:
            raise InputError(f"{path}: made with --{name} {known.get(name)}, and this is {value}; take another folder")
    given.output_dir.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, own)


def own_answers(given: argparse.Namespace, prompts: Sequence[Prompt]) -> list[str]:
    """The model's own greedy answers, whole sentences where there is one."""
    from src.common.model_config import ModelConfigBase
    from src.models.language_model import LanguageModel, generate_all
    from src.models.types import GenerationRequest

    model = LanguageModel.load(
        ModelConfigBase(model_id=given.model_id, output_dir=given.output_dir, device=given.device, seed=given.seed)
    )
    requests = [
        GenerationRequest(id=str(i), token_ids=tokens, max_tokens=given.response_tokens)
        for i, tokens in enumerate(rendered(model, prompts))
    ]
    return [whole_sentences(result.text) for result in generate_all(model, requests)]


def rendered(model: "LanguageModel", prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    from datetime import date

    from src.models.single_prompts import SinglePromptRenderer

    renderer = SinglePromptRenderer(
        model.tokenizer, date.today(), raw=False, system_prompt=None, chat_template=None, thinking=True
    )
    return [renderer.rendered(prompt.text).token_ids for prompt in prompts]


def whole_sentences(text: str) -> str:
    """A text that was cut at its length up to the last sentence that ends: a row teaches how an answer ends, too."""
    end = max(text.rfind(sign) for sign in ".!?")
    return text[: end + 1] if end > 0 else text


if __name__ == "__main__":
    try:
        sys.exit(main(*arguments()))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
