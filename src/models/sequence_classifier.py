"""A model that sorts pairs of texts into classes: loading it, and the probabilities that it gives."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from src.common.errors import InputError
from src.models.devices import resolve_device
from src.models.hub import download
from src.models.loading import refuse_missing_weights

BATCH_SIZE = 32


class SequenceClassifier:
    """Float32 whatever the weights are stored in: classifiers are small, and half precision would move the classes."""

    def __init__(self, model_id: str, *, flag: str, device: str = "auto", revision: str | None = None) -> None:
        """
        model_id: a local folder or a hub id. flag: the setting that named it, for messages.

        Raises InputError for what cannot be found, reached or read, and for a model whose classifying head is not among
        its weights: transformers would make one of random numbers.
        """
        self._name = f"{flag} {model_id}"
        folder = Path(model_id).expanduser()
        folder = folder if folder.is_dir() else download(model_id, revision, flag)
        self._device = resolve_device(device)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{self._name}: {str(error).strip().splitlines()[0]}") from error
        refuse_missing_weights(self._name, model, report, "expected a model trained to classify, with its head")
        self._model = model.requires_grad_(False).eval().to(self._device)
        self._most_tokens = _most_tokens(model, self._tokenizer.model_max_length)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the probabilities."""
        return tuple(str(name) for _, name in sorted(self._model.config.id2label.items()))

    @torch.inference_mode()
    def probabilities(self, pairs: Sequence[tuple[str, str]], batch_size: int = BATCH_SIZE) -> Tensor:
        """
        softmax of the logits of each pair: float32 (pairs, labels), on the CPU.

        Nothing is cut off: raises InputError for a pair that is longer than the model reads, and for logits that are
        not finite.
        """
        found = torch.full((len(pairs), len(self.labels)), torch.nan)
        encoded = [self._tokenizer(*pair) for pair in pairs]
        lengths = [len(each["input_ids"]) for each in encoded]
        for i, length in enumerate(lengths):
            if length > self._most_tokens:
                raise InputError(
                    f"{self._name}: text {pairs[i][0][:40]!r} is {length} tokens with what it is asked, and the model "
                    f"reads {self._most_tokens}; lower --response_tokens or take another model"
                )
        # Sorted by length, so that little padding is computed.
        order = sorted(range(len(pairs)), key=lambda i: lengths[i])
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = self._tokenizer.pad([encoded[i] for i in batch], return_tensors="pt").to(self._device)
            found[batch] = self._model(**inputs).logits.float().softmax(dim=-1).cpu()
        if not found.isfinite().all():
            raise InputError(f"{self._name}: its logits are not finite; check the weights")
        return found


def _most_tokens(model: nn.Module, stated: int) -> int:
    """The longest input: what the tokenizer states, and no more than there are positions."""
    positions = getattr(model.config, "max_position_embeddings", None) or stated
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding's.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = min(positions, module.num_embeddings - module.padding_idx - 1)
    return min(stated, positions)
