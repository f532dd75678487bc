"""Two models that are loaded one after the other, on the report's prompts."""

import gc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from src.abliteration.answering import Asked
from src.abliteration.detectors import detector_of
from src.abliteration.evaluation import Protocol, Reference, Rows, answer, further, measures, report_prompts, rows_of
from src.abliteration.preparation import computing
from src.abliteration.prompts import Split
from src.abliteration.settings import AbliterateSettings
from src.common.errors import InputError
from src.common.runs import Run
from src.models.hub import adapter_folder, model_folder, split_reference
from src.models.language_model import LanguageModel
from src.models.loading import ModelFiles, load_config, load_tokenizer, resolve
from src.models.single_prompts import SinglePromptRenderer

EDITED_FLAG = "--edited_model_id"


def compare(config: AbliterateSettings, run: Run, split: Mapping[str, Split]) -> tuple[Rows, dict[str, Any]]:
    """
    Rows and measures of --model_id and --edited_model_id. Raises InputError, before either is loaded, when they do not
    make the same tokens of a prompt, or know other tokens: what follows would not be about the same text.
    """
    edited = replace(config, model_id=config.edited_model_id, adapter_path=None, revision=None)
    prompts = _prompts_of_both(config, edited, run, split)
    before = LanguageModel.load(config)
    run.record(**before.facts)
    protocol = Protocol(
        prompts=prompts, detector=detector_of(config), kl_tokens=config.kl_tokens,
        response_tokens=config.response_tokens, batch_size=config.batch_size,
    )  # fmt: skip
    with computing(config, before):
        reference = Reference(before, protocol, keep=True)
        more = [further(config, before, protocol)]
    del before
    gc.collect()
    after = LanguageModel.load(edited)
    run.record(**{f"edited_{name}": value for name, value in after.facts.items()})
    with computing(config, after):
        answers = answer(after, protocol)
        rows = rows_of(reference, answers, reference.kl(after))
        more.append(further(config, after, protocol))
    found = measures(rows, reference.answers, answers, config.seed)
    return rows, {when: found[when] | each for when, each in zip(("before", "after"), more, strict=True)}


def _prompts_of_both(
    config: AbliterateSettings, edited: AbliterateSettings, run: Run, split: Mapping[str, Split]
) -> dict[str, list[Asked]]:
    base, adapter = split_reference(edited.model_id)
    # Fetched here under the name of the flag that gave it; `resolve` finds it in the cache.
    model_folder(base, flag=EDITED_FLAG)
    if adapter:
        adapter_folder(adapter, EDITED_FLAG)
    one, other = (resolve(each) for each in (config, edited))
    prompts, others = (_prompts(config, run, split, files) for files in (one, other))
    _refuse_other_tokens(config, prompts, others)
    n_one, n_other = (_vocabulary(config, files) for files in (one, other))
    if n_one != n_other:
        raise InputError(
            f"{EDITED_FLAG} {config.edited_model_id}: a vocabulary of {n_other} tokens, and that of --model_id "
            f"{config.model_id} has {n_one}; expected two versions of one model"
        )
    return prompts


def _prompts(
    config: AbliterateSettings, run: Run, split: Mapping[str, Split], files: ModelFiles
) -> dict[str, list[Asked]]:
    renderer = SinglePromptRenderer(
        load_tokenizer(files.folder, config.trust_remote_code), run.first_started.date(), raw=config.raw_prompts,
        system_prompt=config.system_prompt, chat_template=config.chat_template, thinking=config.thinking_mode,
    )  # fmt: skip
    return report_prompts(split, renderer)


def _vocabulary(config: AbliterateSettings, files: ModelFiles) -> int:
    return load_config(files.folder, config.trust_remote_code).get_text_config(decoder=True).vocab_size


def _refuse_other_tokens(
    config: AbliterateSettings, one: Mapping[str, list[Asked]], other: Mapping[str, list[Asked]]
) -> None:
    for side, prompts in one.items():
        for mine, theirs in zip(prompts, other[side], strict=True):
            if mine.token_ids != theirs.token_ids:
                raise InputError(
                    f"{EDITED_FLAG} {config.edited_model_id}: its tokenizer or chat template makes other tokens of "
                    f"prompt {mine.id!r} than that of --model_id; give --chat_template, or --raw_prompts"
                )
