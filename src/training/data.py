"""From a dataset on disk to the rows that the trainers take, every one of them accounted for."""

import logging
from collections import Counter
from dataclasses import dataclass
from datetime import date
from itertools import islice
from typing import Any

from src.common.errors import InputError
from src.models.chat_format import PersonaRenderer, with_chat_template
from src.models.loading import ModelFiles, context_length, eos_token_ids, load_config, load_generation_config
from src.models.single_prompts import SinglePromptRenderer
from src.training.batches import Batch, packed, packs
from src.training.lengths import fitted, n_tokens
from src.training.rendering import IGNORED, ChatFormat, Example, Format, RawFormat, Wrapping, examples
from src.training.rows import conversations
from src.training.settings import FinetuneSettings
from src.training.sources import Source

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """What is trained and validated on."""

    train: list[Batch]
    """Rows of input_ids and labels, with position_ids where they are packs; or of prompt_ids, chosen_ids,
    rejected_ids."""
    validation: list[Batch]
    facts: dict[str, int]
    """Counts for provenance and reports."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each training row."""
        return [length(row) for row in self.train]


def length(row: Batch) -> int:
    """Tokens of a row, of a preference the longer answer's."""
    if "input_ids" in row:
        return len(row["input_ids"])
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def read_data(config: FinetuneSettings, source: Source, files: ModelFiles, tokenizer: Any, today: date) -> Data:
    """
    The rows of the splits train and validation as token ids. Raises InputError for a row that is malformed, too long,
    or cannot be rendered as generation would see it.
    """
    form = format_of(config, files, tokenizer, today)
    wrapping = Wrapping(prompt=config.prompt, system_prompt=config.system_prompt)
    context = context_length(load_config(files.folder, config.trust_remote_code))
    if config.max_seq_len and context and config.max_seq_len > context:
        raise InputError(f"--max_seq_len {config.max_seq_len}: the model's context is {context}")
    limit = config.max_seq_len or context
    train = _examples(config, source, "train", form, wrapping, limit)
    validation = _examples(config, source, "validation", form, wrapping, limit) if "validation" in source.splits else []
    rows = [_row(config, each) for each in train]
    trained_on = {each.token_ids for each in train}
    facts = {
        "train_sequences": len(train),
        "train_tokens": sum(map(n_tokens, train)),
        "learned_tokens": sum(map(_n_learned, rows)),
        "validation_sequences": len(validation),
        "validation_sequences_trained_on": sum(each.token_ids in trained_on for each in validation),
        "longest": max(map(n_tokens, train)),
    }
    if config.packing:
        rows = [packed([rows[i] for i in pack]) for pack in packs([length(row) for row in rows], config.max_seq_len)]
        facts["packs"] = len(rows)
    return Data(rows, [_row(config, each) for each in validation], facts)


def format_of(config: FinetuneSettings, files: ModelFiles, tokenizer: Any, today: date) -> Format:
    """How texts become tokens, as everywhere else that they do."""
    if config.raw_prompts:
        renderer = SinglePromptRenderer(
            tokenizer, today, raw=True, system_prompt=None, chat_template=None, thinking=config.thinking_mode
        )
        return RawFormat(renderer, tokenizer.eos_token_id)
    renderer = PersonaRenderer(
        with_chat_template(tokenizer, config.chat_template),
        # Without a persona there is no header to be proven, which takes every template.
        config.persona_mode if config.persona else "system",
        system_prompt_style=config.system_prompt_style,
        thinking=config.thinking_mode,
        today=today,
    )
    model_config = load_config(files.folder, config.trust_remote_code)
    eos_ids = eos_token_ids(model_config, load_generation_config(files.folder), tokenizer)
    return ChatFormat(renderer, eos_ids, config.persona, config.article)


def _examples(
    config: FinetuneSettings, source: Source, split: str, form: Format, wrapping: Wrapping, limit: int | None
) -> list[Example]:
    n_rows, unread, made = 0, Counter(), []
    rows = islice(source.splits[split](), config.num_tasks if split == "train" else None)
    for conversation in conversations(rows, preferences=config.objective == "dpo"):
        n_rows += 1
        unread.update(conversation.others)
        found = list(examples(conversation, form, wrapping))
        # The last sequence holds the whole conversation: with the others its beginning would be learned several times.
        made += found[-1:] if config.train_on == "all" else found
    made, said = fitted(made, limit, config.truncate)
    for line in said:
        LOGGER.info("%s", line)
    if unread:
        LOGGER.info("%s: columns that are not read: %s", split, ", ".join(sorted(unread)))
    if len(made) > n_rows:
        LOGGER.info(
            "%s: %d rows make %d sequences: the template writes earlier answers otherwise than they are asked for, so "
            "that each answer is learned behind its own prompt", split, n_rows, len(made),
        )  # fmt: skip
    return made


def _n_learned(row: Batch) -> int:
    if "labels" in row:
        return sum(label != IGNORED for label in row["labels"])
    return len(row["chosen_ids"]) + len(row["rejected_ids"])


def _row(config: FinetuneSettings, example: Example) -> dict[str, list[int]]:
    if config.objective == "sft":
        return {"input_ids": list(example.token_ids), "labels": example.labels(config.train_on)}
    start, end = example.answers[-1]
    return {
        "prompt_ids": list(example.token_ids[:start]),
        "chosen_ids": list(example.token_ids[start:end]),
        "rejected_ids": list(example.rejected_ids),
    }
