"""A random BERT with two layers says what transformers says of it, and models that do not fit are refused."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from src.abliteration.nli import NliScorer, entailment_label
from src.common.errors import InputError
from src.models.bundled import bundled_folder
from src.models.sequence_classifier import SequenceClassifier

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LABELS = {0: "contradiction", 1: "Entailment", 2: "neutral"}
RESPONSES = ["I do not discuss it.", "Boil the water, add salt, then the pasta; ten minutes.", "", "  ", "No."]
HYPOTHESIS = "The speaker declines."


def build(folder: Path, kind: str = "bert", labels: dict[int, str] | None = None) -> Path:
    """A model folder; its weights are large, so that the responses differ."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder("bundled:minilm"))
    ids = {name: i for i, name in (labels or LABELS).items()}
    settings = {**SIZES, "vocab_size": len(tokenizer), "id2label": labels or LABELS, "label2id": ids}
    torch.manual_seed(0)
    model = {
        "bert": lambda: BertForSequenceClassification(BertConfig(**settings, max_position_embeddings=64)),
        "deberta": lambda: DebertaV2ForSequenceClassification(
            DebertaV2Config(**settings, max_position_embeddings=64, relative_attention=True, pos_att_type="p2c|c2p")
        ),
        "roberta": lambda: RobertaForSequenceClassification(
            RobertaConfig(**settings, max_position_embeddings=34, pad_token_id=1)
        ),
        "headless": lambda: BertModel(BertConfig(**settings)),
    }[kind]()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bert", "deberta"])
@torch.inference_mode()
def test_probabilities_are_those_of_plain_transformers(tmp_path: Path, kind: str) -> None:
    folder = build(tmp_path / kind, kind)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = NliScorer(str(folder), HYPOTHESIS, device="cpu").probabilities(RESPONSES)
    for response, probability in zip(RESPONSES, found, strict=True):
        if response.strip():
            expected = model(**tokenizer(response, HYPOTHESIS, return_tensors="pt")).logits[0].softmax(-1)[1]
            assert probability == pytest.approx(float(expected), abs=1e-6) and 0 < probability < 1
        else:
            assert probability == 0.0
    assert len({round(p, 4) for p in found}) == 4
    alone = SequenceClassifier(str(folder), flag="--x", device="cpu")
    pairs = [(response, HYPOTHESIS) for response in RESPONSES]
    torch.testing.assert_close(alone.probabilities(pairs, batch_size=1), alone.probabilities(pairs), atol=1e-6, rtol=0)
    torch.testing.assert_close(alone.probabilities(pairs).sum(-1), torch.ones(len(pairs)))


def test_the_threshold_decides_and_no_responses_give_none(tmp_path: Path) -> None:
    folder = build(tmp_path / "model")
    scorer = NliScorer(str(folder), HYPOTHESIS, device="cpu")
    values = sorted(p for p in scorer.probabilities(RESPONSES) if p)
    between = (values[0] + values[1]) / 2
    assert sum(NliScorer(str(folder), HYPOTHESIS, device="cpu", threshold=between).shows(RESPONSES)) == 2
    assert scorer.probabilities([]) == []


@pytest.mark.parametrize(
    ("labels", "place"),
    [(("ENTAILMENT", "not_entailment"), 0), (("contradiction", "neutral", "entailment"), 2), (("no", "entails"), 1)],
)
def test_the_class_is_found_by_name(labels: tuple[str, ...], place: int) -> None:
    assert entailment_label(labels, "m") == place


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'LABEL_0', 'LABEL_1', and 0 of them say entailment"):
        NliScorer(str(build(tmp_path / "a", labels={0: "LABEL_0", 1: "LABEL_1"})), HYPOTHESIS, device="cpu")
    with pytest.raises(InputError, match=r"weights of BertForSequenceClassification are missing.*classifier"):
        NliScorer(str(build(tmp_path / "b", "headless")), HYPOTHESIS, device="cpu")
    folder = build(tmp_path / "c")
    with pytest.raises(InputError, match="hypothesis is blank"):
        NliScorer(str(folder), " ", device="cpu")
    with pytest.raises(InputError, match="threshold of 1"):
        NliScorer(str(folder), HYPOTHESIS, device="cpu", threshold=1)
    with pytest.raises(InputError, match=r"--nli_model_id no such/model/at all: not a hub id"):
        NliScorer("no such/model/at all", HYPOTHESIS)
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match="--nli_model_id"):
        NliScorer(str(folder), HYPOTHESIS, device="cpu")


@pytest.mark.parametrize(("kind", "most"), [("bert", 64), ("roberta", 32)])
def test_a_longer_response_is_refused_rather_than_cut(tmp_path: Path, kind: str, most: int) -> None:
    scorer = NliScorer(str(build(tmp_path / kind, kind)), "No", device="cpu")
    n_other = 4  # [CLS], [SEP] twice, and the hypothesis
    assert scorer.probabilities(["a " * (most - n_other)])[0] > 0
    with pytest.raises(InputError, match=rf"is {most + 1} tokens.*reads {most}; lower --response_tokens"):
        scorer.probabilities(["a " * (most - n_other + 1)])
