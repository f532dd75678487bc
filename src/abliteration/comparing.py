"""Two models that are loaded one after the other, on the report's prompts."""

import gc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from src.abliteration.detectors import detector_of
from src.abliteration.evaluation import Protocol, Reference, Rows, answer, further, measures, report_prompts, rows_of
from src.abliteration.preparation import computing
from src.abliteration.prompts import Split
from src.abliteration.settings import AbliterateSettings
from src.common.errors import InputError
from src.common.runs import Run
from src.models.language_model import LanguageModel
from src.models.single_prompts import SinglePromptRenderer


def compare(config: AbliterateSettings, run: Run, split: Mapping[str, Split]) -> tuple[Rows, dict[str, Any]]:
    """
    Rows and measures of --model_id and --edited_model_id. Raises InputError when they do not make the same tokens of a
    prompt: what follows would not be about the same text.
    """
    before = LanguageModel.load(config)
    run.record(**before.facts)
    protocol = _protocol(config, run, split, before)
    with computing(config, before):
        reference = Reference(before, protocol, keep=True)
        more = [further(config, before, protocol)]
    del before
    gc.collect()
    after = LanguageModel.load(replace(config, model_id=config.edited_model_id, adapter_path=None, revision=None))
    run.record(**{f"edited_{name}": value for name, value in after.facts.items()})
    _refuse_other_tokens(config, protocol, _protocol(config, run, split, after))
    with computing(config, after):
        answers = answer(after, protocol)
        rows = rows_of(reference, answers, reference.kl(after))
        more.append(further(config, after, protocol))
    found = measures(rows, reference.answers, answers, config.seed)
    return rows, {when: found[when] | each for when, each in zip(("before", "after"), more, strict=True)}


def _protocol(config: AbliterateSettings, run: Run, split: Mapping[str, Split], model: LanguageModel) -> Protocol:
    renderer = SinglePromptRenderer(
        model.tokenizer, run.first_started.date(), raw=config.raw_prompts, system_prompt=config.system_prompt,
        chat_template=config.chat_template, thinking=config.thinking_mode,
    )  # fmt: skip
    return Protocol(
        prompts=report_prompts(split, renderer), detector=detector_of(config), kl_tokens=config.kl_tokens,
        response_tokens=config.response_tokens, batch_size=config.batch_size,
    )  # fmt: skip


def _refuse_other_tokens(config: AbliterateSettings, one: Protocol, other: Protocol) -> None:
    for side, prompts in one.prompts.items():
        for mine, theirs in zip(prompts, other.prompts[side], strict=True):
            if mine.token_ids != theirs.token_ids:
                raise InputError(
                    f"--edited_model_id {config.edited_model_id}: its tokenizer or chat template makes other tokens of "
                    f"prompt {mine.id!r} than that of --model_id; give --chat_template, or --raw_prompts"
                )
