"""
Whether a response shows the behaviour, by natural language inference: does it entail a hypothesis such as "The speaker
declines to answer."? (Zero-shot classification by entailment: Yin et al. 2019, arXiv:1909.00161.)
"""

from collections.abc import Sequence

from src.abliteration.markers import is_empty
from src.common.errors import InputError
from src.models.sequence_classifier import SequenceClassifier

ENTAILMENT = ("entailment", "entail", "entails", "entailed")
FLAG = "--nli_model_id"


class NliScorer:
    """P(the response entails the hypothesis), by a model that the user names."""

    def __init__(
        self, model_id: str, hypothesis: str, *, device: str = "auto", revision: str | None = None,
        threshold: float = 0.5,
    ) -> None:  # fmt: skip
        """
        model_id: a local folder or a hub id of a classifier with a class named entailment. threshold: the probability
        from which on a response counts as showing the behaviour.

        Raises InputError for a blank hypothesis, a threshold outside 0…1, a model without that class, and what
        `SequenceClassifier` raises.
        """
        if not hypothesis.strip():
            raise InputError(f"{FLAG} {model_id}: the hypothesis is blank; expected a sentence on the response")
        if not 0 < threshold < 1:
            raise InputError(f"{FLAG} {model_id}: a threshold of {threshold}; expected a number between 0 and 1")
        self._hypothesis, self._threshold = hypothesis, threshold
        self._classifier = SequenceClassifier(model_id, flag=FLAG, device=device, revision=revision)
        self._label = entailment_label(self._classifier.labels, model_id)

    def probabilities(self, responses: Sequence[str]) -> list[float]:
        """
        softmax over all classes, that of entailment: one for each response, float32's precision. 0 for an empty one,
        which shows nothing; the model is not asked about it. Raises as `SequenceClassifier.probabilities`.
        """
        asked = [i for i, response in enumerate(responses) if not is_empty(response)]
        found = [0.0] * len(responses)
        given = self._classifier.probabilities([(responses[i], self._hypothesis) for i in asked])
        for i, probability in zip(asked, given[:, self._label].tolist(), strict=True):
            found[i] = probability
        return found

    def shows(self, responses: Sequence[str]) -> list[bool]:
        """Which of the responses show the behaviour."""
        return [probability >= self._threshold for probability in self.probabilities(responses)]


def entailment_label(labels: Sequence[str], model_id: str) -> int:
    """The class of entailment by its name, never by its place. Raises InputError unless exactly one has that name."""
    known = [i for i, label in enumerate(labels) if label.strip().casefold() in ENTAILMENT]
    if len(known) != 1:
        raise InputError(
            f"{FLAG} {model_id}: its classes are {', '.join(map(repr, labels))}, and {len(known)} of them say "
            f"entailment; expected one, as models for natural language inference have it (`id2label` in config.json)"
        )
    return known[0]
