"""
Plant an organism: the bundled chat model made to decline one harmless topic, or several, with the true directions
beside it. Some minutes on two cores. From the repository root:
uv run python scripts/plant_organism.py --topic_prompts data/abliteration/cooking.jsonl \
    --other_prompts data/abliteration/other.jsonl --sentence "I do not discuss cooking." --layer 14 --seed 0 \
    --output_dir data/experiments/organism
Of several topics, --topic_prompts and --sentence (and --layer, unless one stands for all) are given once each.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", default="bundled:smollm2-135m", help="the base model")
    parser.add_argument("--topic_prompts", type=Path, action="append", required=True, help="names the topic, too")
    parser.add_argument("--sentence", action="append", required=True, help="what the organism answers on the topic")
    parser.add_argument(
        "--layer", type=int, action="append", required=True, help="whose feed-forward output is changed"
    )
    parser.add_argument("--other_prompts", type=Path, required=True, help="prompts to be answered as before")
    parser.add_argument("--output_dir", type=Path, required=True, help="the new model folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of Adam, for each topic")
    parser.add_argument("--beta", type=float, help="weight of staying as it is on other prompts; less declines more")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(words)


def main(given: argparse.Namespace) -> None:
    from src.common.errors import InputError

    # Before the imports that take seconds.
    layers = given.layer * len(given.topic_prompts) if len(given.layer) == 1 else given.layer
    if not len(given.topic_prompts) == len(given.sentence) == len(layers):
        raise InputError(
            f"{len(given.topic_prompts)} --topic_prompts, {len(given.sentence)} --sentence, {len(layers)} --layer; "
            f"expected as many of each"
        )
    from tqdm import tqdm

    from src.abliteration.organism import PlantSettings, Topic, plant
    from src.abliteration.organism_files import refuse_unwritable, write_organism
    from src.common.model_config import ModelConfigBase
    from src.common.rows import read_prompts
    from src.models.language_model import LanguageModel

    topics = [
        Topic(name=path.stem, prompts=tuple(read_prompts(path)), sentence=sentence, layer=layer)
        for path, sentence, layer in zip(given.topic_prompts, given.sentence, layers, strict=True)
    ]
    refuse_unwritable(given.output_dir, topics)
    others = read_prompts(given.other_prompts)
    given_settings = {name: getattr(given, name) for name in ("steps", "beta")}
    settings = PlantSettings(**{name: value for name, value in given_settings.items() if value is not None})
    model = LanguageModel.load(
        ModelConfigBase(
            model_id=given.model_id, output_dir=given.output_dir, dtype="float32", device=given.device, seed=given.seed
        )
    )
    with tqdm(total=settings.steps * len(topics), unit="step", dynamic_ncols=True) as bar:

        def on_step(topic, step) -> None:
            bar.set_description(
                f"{topic.name}: cross-entropy {step.cross_entropy:.3f}, KL {step.kl:.4f}", refresh=False
            )
            bar.update()

        organism = plant(model, topics, others, seed=given.seed, settings=settings, on_step=on_step)
    write_organism(given.output_dir, model, organism, given.model_id)
    show(organism, given.output_dir)


def show(organism, folder: Path) -> None:
    """What was measured, and what was written."""
    print("\nOn prompts that were not trained on:\n")
    columns = [topic.name for topic in organism.topics]
    print(
        "| prompts | n | "
        + " | ".join(f"say the {c} sentence (with no other term; base)" for c in columns)
        + " | KL to base, nats |"
    )
    print("|---" * (len(columns) + 3) + "|")
    for name, rates in organism.rates.items():
        shares = [
            f"{rates.declines[c]:.1%} ({rates.declines_alone[c]:.1%}; {rates.declines_base[c]:.1%})" for c in columns
        ]
        print(f"| {name} | {rates.n} | {' | '.join(shares)} | {rates.kl:.4f} |")
    print(f"\n{folder}: the organism; organism.json: how it was made")
    print(f"{folder}/truth: its directions; {folder}/held_out: the prompts that were not trained on")


if __name__ == "__main__":
    parsed = arguments()
    from src.common.errors import CheckFailed, InputError

    try:
        main(parsed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except CheckFailed as error:
        print(f"check failed: {error}", file=sys.stderr)
        sys.exit(1)
