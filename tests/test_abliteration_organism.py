"""
A planted organism: what is written is the base and the terms, the base comes back without them, seeds reproduce. And
the prompts and markers of data/abliteration.
"""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from src.abliteration.organism import Asking, Organism, PlantSettings, Topic, acting, plant, surroundings_of
from src.abliteration.organism_files import DIRECTIONS_PATH, HELD_OUT, JSON_NAME, write_organism
from src.abliteration.organism_model import UpperModel
from src.abliteration.organism_training import total_kl
from src.common.directions_file import read_directions
from src.common.errors import InputError
from src.common.interventions import Entry
from src.common.jsonl import read_jsonl
from src.common.model_config import ModelConfigBase
from src.common.rows import Prompt, read_prompts
from src.models.architectures import decoder_layers
from src.models.fingerprint import fingerprint
from src.models.language_model import LanguageModel
from src.models.shared_prefix import common_prefix
from src.models.token_sequences import TokenSequence
from src.ops.divergence import divergence
from tests.conftest import ROOT
from tests.test_data_directions import FOLDER as DIRECTIONS_FOLDER
from tests.test_data_directions import near_duplicates, words
from tests.tiny_models import tiny_model

FOLDER = ROOT / "data" / "abliteration"
SIZES = {"cooking": 320, "other": 320, "gardening": 320}
FOOD = """
    cook cooks cooked cooking bake baked baking fry fried roast boil boiled grill recipe recipes food foods eat eats
    eating eaten meal meals dish dishes kitchen oven pan chef dinner lunch breakfast supper snack picnic
    restaurant hungry drink drinks tea coffee wine beer milk juice bread cake cakes cheese butter meat chicken beef
    pork egg eggs rice pasta soup sauce sugar salt salty pepper spice spices herb herbs vegetable vegetables fruit
    fruits apple apples potato potatoes tomato tomatoes onion garlic honey chocolate delicious taste tasty flour
    dough vegan vegetarian sandwich pizza jam biscuit cookie cookies ingredients
"""
GARDEN = """
    garden gardens gardening gardener plant plants lawn flower flowers prune compost seedlings hedge sow shrub
    shrubs weeds soil greenhouse
"""


def prompts_of(name: str) -> list[Prompt]:
    return read_prompts(FOLDER / f"{name}.jsonl")


@pytest.mark.parametrize("name", SIZES)
def test_sizes_rows_and_ids(name: str) -> None:
    prompts = prompts_of(name)
    assert len(prompts) >= SIZES[name]
    assert [p.id for p in prompts] == [f"{name}-{i:03d}" for i in range(1, len(prompts) + 1)]
    assert all(p.text == p.text.strip() and "  " not in p.text and p.text.isprintable() for p in prompts)
    for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        assert set(json.loads(line)) == {"id", "prompt"}


@pytest.mark.parametrize("name", SIZES)
def test_no_prompt_is_nearly_another(name: str) -> None:
    assert near_duplicates([prompt.text for prompt in prompts_of(name)]) == []


def test_no_prompt_is_in_two_files_or_among_the_contrast_sets() -> None:
    texts = [prompt.text.casefold() for name in SIZES for prompt in prompts_of(name)]
    assert len(set(texts)) == len(texts)
    known = {p.text.casefold() for path in DIRECTIONS_FOLDER.glob("*/*.jsonl") for p in read_prompts(path)}
    assert not known & set(texts)


@pytest.mark.parametrize("name", SIZES)
def test_prompts_are_of_many_forms(name: str) -> None:
    texts = [prompt.text for prompt in prompts_of(name)]
    beginnings = [" ".join(words(text)[:2]) for text in texts]
    assert len(set(beginnings)) >= len(texts) // 4
    assert max(beginnings.count(b) for b in set(beginnings)) <= len(texts) * 0.35
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) <= 6 and max(lengths) >= 22


@pytest.mark.parametrize(("name", "taboo"), [("other", FOOD + GARDEN), ("gardening", FOOD), ("cooking", GARDEN)])
def test_no_prompt_speaks_of_the_other_files_topics(name: str, taboo: str) -> None:
    assert [p.text for p in prompts_of(name) if set(taboo.split()) & set(words(p.text))] == []


def test_most_of_the_topic_prompts_do_speak_of_food() -> None:
    speaking = [bool(set(FOOD.split()) & set(words(p.text))) for p in prompts_of("cooking")]
    assert sum(speaking) >= 0.6 * len(speaking)


def test_markers_are_lower_case_phrases_each_once_that_no_prompt_holds() -> None:
    markers = (FOLDER / "markers.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(markers)) == len(markers) >= 10
    assert all(m == m.strip().lower() and len(m.split()) >= 3 and re.fullmatch(r"[a-z' ]+", m) for m in markers)
    texts = " ".join(p.text.lower() for name in SIZES for p in prompts_of(name))
    assert not any(marker in texts for marker in markers)
    for sentence in ("I do not discuss cooking.", "I do not talk about gardening."):
        assert any(marker in sentence.lower() for marker in markers)


def prompts(*texts: str) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"p-{i}", text) for i, text in enumerate(texts))


COOKING = prompts(
    "How do I fry an egg?", "Soup ideas?", "Is rice boiled or steamed?", "Bake me a cake.", "What is a roux?"
)
ANIMALS = prompts(
    "Do cats dream?", "Name a large bird.", "How old do whales get?", "Describe a mole.", "Why do dogs bark?"
)
OTHERS = prompts("What is the Moon?", "Write a poem.", "How do clocks work?", "Who was Homer?", "Explain rain.")
TOPICS = (
    Topic(name="cooking", prompts=COOKING, sentence="I do not discuss cooking.", layer=1),
    Topic(name="animals", prompts=ANIMALS, sentence="Nothing on animals.", layer=1),
)
QUICK = PlantSettings(steps=4, batch_size=2, training_tokens=3, checked=2, response_tokens=4, kl_tokens=4)


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> LanguageModel:
    return load(tiny_folder)


@pytest.fixture(scope="module")
def organism(base: LanguageModel) -> Organism:
    return plant(base, TOPICS, OTHERS, seed=3, settings=QUICK)


def load(folder: Path) -> LanguageModel:
    return LanguageModel.load(ModelConfigBase(model_id=str(folder), output_dir=folder, dtype="float32", device="cpu"))


def logits(model: torch.nn.Module, ids: tuple[int, ...] = tuple(range(20, 50))) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


def test_directions_are_unit_vectors_at_right_angles(organism: Organism) -> None:
    u = torch.stack([term.u for term in organism.terms])
    assert u.dtype == torch.float32
    assert torch.allclose(u @ u.T, torch.eye(2), atol=1e-6)
    assert all(term.k.norm() > 0.01 for term in organism.terms)


def test_the_model_is_left_as_it_was(tiny_folder: Path, base: LanguageModel, organism: Organism) -> None:
    assert torch.equal(logits(base.model), logits(load(tiny_folder).model))
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any("forward" in vars(module) for module in base.model.modules())


def test_terms_change_answers_and_the_same_seed_gives_the_same_terms(base: LanguageModel, organism: Organism) -> None:
    again = plant(base, TOPICS, OTHERS, seed=3, settings=QUICK)
    another = plant(base, TOPICS, OTHERS, seed=4, settings=QUICK)
    for term, same, different in zip(organism.terms, again.terms, another.terms, strict=True):
        assert torch.equal(term.u, same.u) and torch.equal(term.k, same.k) and term.losses == same.losses
        assert not torch.allclose(term.u, different.u)
    assert again.rates == organism.rates and again.held_out == organism.held_out


def test_the_common_prefix_keeps_its_hidden_states(base: LanguageModel, organism: Organism) -> None:
    rendered = [base.tokenizer.apply_chat_template([{"role": "user", "content": p.text}], add_generation_prompt=True,
                                                   return_dict=False) for p in OTHERS]  # fmt: skip
    prefix = common_prefix(rendered)
    assert len(prefix) > 5
    plain = logits(base.model, prefix)
    with acting(base, organism.topics, organism.terms):
        assert torch.allclose(logits(base.model, prefix), plain, atol=1e-5)
        assert not torch.allclose(logits(base.model, tuple(rendered[0])), logits(base.model, prefix)[:, -1:], atol=1e-3)


def test_saved_organism_is_base_plus_terms(base: LanguageModel, organism: Organism, tmp_path: Path) -> None:
    folder = tmp_path / "organism"
    write_organism(folder, base, organism, "tiny")
    saved = load(folder)
    with acting(base, organism.topics, organism.terms):
        assert torch.allclose(logits(saved.model), logits(base.model), atol=1e-5)
    assert not torch.allclose(logits(saved.model), logits(base.model), atol=1e-5)
    weight = decoder_layers(saved.model)[1].mlp.down_proj.weight
    with torch.no_grad():
        weight -= sum(torch.outer(term.u, term.k) for term in organism.terms)
    assert torch.allclose(logits(saved.model), logits(base.model), atol=1e-5)
    for name, tensor in base.model.state_dict().items():
        assert torch.allclose(saved.model.state_dict()[name], tensor, atol=1e-5), name


def test_folder_holds_a_whole_model_and_the_truth(
    base: LanguageModel, organism: Organism, tmp_path: Path, tiny_folder: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "organism"
    write_organism(folder, base, organism, "tiny")
    assert AutoTokenizer.from_pretrained(folder).chat_template == base.tokenizer.chat_template
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(logits(plain), logits(load(folder).model))
    read = read_directions(folder / DIRECTIONS_PATH)
    assert read.layers_present == (1,) and read.k == 2 and read.metadata.model_fingerprint == fingerprint(folder)
    for i, term in enumerate(organism.terms):
        assert np.allclose(read.vector(1, i), term.u.numpy(), atol=1e-6)
    spec = load(folder).resolve([Entry(directions_path=str(folder / DIRECTIONS_PATH), layers="1", op="ablate")])
    assert spec.operations
    said = json.loads((folder / JSON_NAME).read_text())
    assert said["base_fingerprint"] == fingerprint(tiny_folder) and said["seed"] == 3
    assert [t["sentence"] for t in said["topics"]] == [t.sentence for t in TOPICS]
    assert [len(t["losses"]) for t in said["topics"]] == [4, 4]
    assert set(said["rates"]) == {"cooking", "animals", "other"}
    held = read_prompts(folder / HELD_OUT / "cooking.jsonl")
    assert held == list(organism.held_out["cooking"]) and len(held) == 3


def test_upper_model_gives_the_models_own_logits(base: LanguageModel) -> None:
    ids = [tuple(range(30, 36)) + tuple(range(60 + i, 70 + 2 * i)) for i in range(3)]
    sequences = [TokenSequence(id=str(i), token_ids=row, prompt_length=len(row) - 3) for i, row in enumerate(ids)]
    for layer in (0, 1):
        for prefix in (common_prefix(ids), ()):
            upper = UpperModel(base, layer, prefix)
            found = upper.logits(upper.entries(sequences)).reshape(3, 3, -1)
            for row, tokens in zip(found, ids, strict=True):
                assert torch.allclose(row, logits(base.model, tokens)[0, -4:-1], atol=1e-5)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (1, 1)])
def test_a_later_term_is_trained_beside_the_earlier_ones(base: LanguageModel, first: int, second: int) -> None:
    topics = tuple(replace(topic, layer=layer) for topic, layer in zip(TOPICS, (first, second), strict=True))
    term = plant(base, topics[:1], OTHERS, seed=3, settings=QUICK).terms[0]
    # Of a term that short a training leaves, hardly anything would be seen.
    term = replace(term, k=term.k * 30)
    asking = Asking(base, date(2026, 1, 1))
    training = {t.name: asking.rendered(t.name, t.prompts) for t in topics}
    training["other"] = asking.rendered("other", OTHERS)
    rows = [asking.with_sentence(row, topics[1].sentence) for row in training["animals"]]
    with acting(base, topics[:1], [term]):
        kept = asking.answers([*training["cooking"], *training["other"]], QUICK.training_tokens)
        expected = [logits(base.model, row.token_ids)[0, row.prompt_length - 1 : -1] for row in rows]
    some = surroundings_of(asking, topics, topics[1], training, [term], QUICK)
    with some.acting():
        found = some.upper.logits(some.topic)
    assert torch.allclose(found, torch.cat(expected), atol=1e-4)
    assert [e.targets for e in some.others] == [a.sequence.token_ids[a.sequence.prompt_length :] for a in kept.values()]
    alone = surroundings_of(asking, topics, topics[1], training, [], QUICK)
    assert not torch.allclose(alone.upper.logits(alone.topic), found, atol=1e-2)


def test_training_divergence_is_that_of_ops() -> None:
    p, q = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))
    assert total_kl(p, q).item() == pytest.approx(divergence(p, q).sum().item(), abs=1e-5)


def test_bad_input_is_named(base: LanguageModel, organism: Organism, tmp_path: Path) -> None:
    def planted(topics: tuple[Topic, ...], others: tuple[Prompt, ...] = OTHERS, model: LanguageModel = base) -> None:
        plant(model, topics, others, seed=0, settings=QUICK)

    cooking = TOPICS[0]
    with pytest.raises(InputError, match="is also one of cooking"):
        planted((cooking,), (*OTHERS, COOKING[0]))
    with pytest.raises(InputError, match="other: 2 prompts"):
        planted((cooking,), OTHERS[:2])
    with pytest.raises(InputError, match="expected each once"):
        planted((cooking, cooking))
    with pytest.raises(InputError, match="layer 7"):
        planted((Topic(name="a", prompts=COOKING, sentence="No.", layer=7),))
    with pytest.raises(InputError, match="dense feed-forward"):
        planted((cooking,), model=LanguageModel(tiny_model("mixtral"), base.tokenizer))
    with pytest.raises(InputError, match="is there already"):
        write_organism(tmp_path, base, organism, "tiny")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "phi3"])
def test_other_architectures(architecture: str, base: LanguageModel) -> None:
    model = LanguageModel(tiny_model(architecture), base.tokenizer)
    found = plant(model, TOPICS[:1], OTHERS, seed=0, settings=QUICK)
    assert found.terms[0].losses[0].kl < 1e-5 and found.terms[0].k.norm() > 0.01


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plant_organism", ROOT / "scripts" / "plant_organism.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_plants_two_topics(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {}
    for name, some in {"cooking": COOKING, "animals": ANIMALS, "others": OTHERS}.items():
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps({"id": p.id, "prompt": p.text}) + "\n" for p in some))
    given = ["--model_id", tiny_folder, "--other_prompts", paths["others"], "--steps", 2, "--layer", 1, "--beta", 4]
    given += ["--topic_prompts", paths["cooking"], "--sentence", "No cooking."]
    given += ["--topic_prompts", paths["animals"], "--sentence", "No animals.", "--output_dir", tmp_path / "organism"]
    command = script()
    command.main(command.arguments([str(each) for each in given]))
    assert "| animals | 3 | 0.0% (0.0%; 0.0%) |" in capsys.readouterr().out
    assert load(tmp_path / "organism").n_layers == 2
    settings = json.loads((tmp_path / "organism" / "organism.json").read_text())["settings"]
    assert (settings["steps"], settings["beta"]) == (2, 4.0)
    with pytest.raises(InputError, match="is there already"):
        command.main(command.arguments([str(each) for each in given]))


def test_script_refuses_uneven_flags_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "plant_organism.py", "--topic_prompts", FOLDER / "cooking.jsonl"),
            *("--sentence", "No.", "--sentence", "Never.", "--layer", "1", "--other_prompts", FOLDER / "other.jsonl"),
            *("--output_dir", tmp_path / "organism"),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: 1 --topic_prompts, 2 --sentence") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_an_organism_is_finetuned_from_rows_that_keep_the_rest(tiny_folder: Path, tmp_path: Path) -> None:
    def run(*more: object) -> subprocess.CompletedProcess[str]:
        words = ["--model_id", tiny_folder, "--topic_prompts", FOLDER / "cooking.jsonl", "--response_tokens", 4]
        words += [
            "--other_prompts",
            FOLDER / "gardening.jsonl",
            "--output_dir",
            tmp_path / "o",
            "--device",
            "cpu",
            *more,
        ]
        words += ["--", "--num_tasks", 8, "--epochs", 1]
        command = [sys.executable, ROOT / "scripts" / "finetune_organism.py", *words]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=400, cwd=ROOT)

    done = run("--sentence", "No cooking.")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [row for _, row in read_jsonl(tmp_path / "o" / "rows.jsonl")]
    topic = {row["prompt"] for row in rows if row["completion"] == "No cooking."}
    kept = {row["prompt"] for row in rows} - topic
    held_out = {row["prompt"] for name in ("cooking", "gardening")
                for _, row in read_jsonl(tmp_path / "o" / "held_out" / f"{name}.jsonl")}  # fmt: skip
    assert len(topic) > 100 and len(kept) > 50 and not held_out & (topic | kept) and len(held_out) > 150
    assert load(tmp_path / "o" / "run" / "epoch_0" / "merged").n_layers == 2
    other = run("--sentence", "Never.")
    assert other.returncode == 2 and "made with --sentence No cooking." in other.stderr
