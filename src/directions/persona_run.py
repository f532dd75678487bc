"""A finished persona run as contrast data: its rows chosen by their fields, its prompts rendered again as it did."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

from src.common.errors import InputError
from src.common.files import sha256_file
from src.common.jsonl import read_jsonl
from src.common.run_folder import DONE, read_run
from src.common.system_prompts import PLAIN
from src.directions.examples import Contrast, Example
from src.directions.rendering import FILLERS, text_span, without_first
from src.directions.settings import DirectionSettings
from src.models.chat_format import Message, PersonaRenderer, with_chat_template
from src.models.chat_format_tokens import GuardedTokenizer
from src.models.token_sequences import TokenSequence

LOGGER = logging.getLogger(__name__)
Row = Mapping[str, Any]
RESULTS, TOKENS = "results.jsonl", "tokens.parquet"
ASKED_AS = ("model_fingerprint", "adapter_fingerprint", "format_fingerprint")
STEERED_BY = ("steer", "interventions_path")
NEEDED = ("id", "persona", "category", "article", "prompt_id", "prompt", "rep_idx", "turn", "response", "num_tokens",
          "num_thinking_tokens", "thinking", "system_prompt", "persona_applied")  # fmt: skip


class PersonaRun:
    """The run's rows and settings. Raises InputError for what is no finished run of src.run_personas."""

    def __init__(self, path: Path) -> None:
        self.results = path / RESULTS if path.is_dir() else path
        self.folder = self.results.parent
        if not self.results.is_file():
            raise InputError(f"--positive_run {path}: no such file; expected {RESULTS} of a persona run")
        run, self._provenance = read_run(self.folder)
        if run["command"] != "run_personas":
            raise InputError(f"--positive_run {path}: a run of {run['command']}; expected one of run_personas")
        if not (self.folder / DONE).exists():
            raise InputError(f"--positive_run {path}: the run has not finished; give its command again until it has")
        self._config = run["config"]
        steered = [name for name in STEERED_BY if self._config.get(name)]
        if steered:
            raise InputError(
                f"--positive_run {path}: its responses were made under --{steered[0]}, and hidden states are read "
                f"without interventions; expected a run without"
            )
        self.rows: list[Row] = []
        for number, row in read_jsonl(self.results):
            missing = [name for name in NEEDED if name not in row]
            if missing:
                raise InputError(f"{self.results}:{number}: no field {missing[0]!r}; expected a row of run_personas")
            self.rows.append(row)
        if not self.rows:
            raise InputError(f"{self.results}:1: no rows in it; expected those of a persona run")
        self._by_place = {_place(row): row for row in self.rows}

    @property
    def inputs(self) -> list[Path]:
        """The files that the sequences are made of."""
        return [path for path in (self.results, self.folder / TOKENS) if path.exists()]

    def contrast(self, config: DirectionSettings) -> Contrast:
        """
        The rows that --where and --negative_where name; rows of one prompt stay on one side of the split.

        For mean_response rows without an answer are left out and counted, for positions in the prompt repeats of it.
        Raises InputError for an unknown
        field, a class without rows, and a row that is in both.
        """
        rows = self.rows[: config.num_tasks]
        targets = self._chosen(rows, config.where or [], "--where")
        target_ids = {row["id"] for row in targets}
        if config.negative_where is None:
            controls = [row for row in rows if row["id"] not in target_ids]
            if not controls:
                raise InputError(f"--where {' '.join(config.where)}: every row of the run is a target; none is left")
        else:
            controls = self._chosen(rows, config.negative_where, "--negative_where")
            both = [row["id"] for row in controls if row["id"] in target_ids]
            if both:
                raise InputError(f"--negative_where: row {both[0]!r} is a target too ({len(both)} rows are)")
        prepare = _answered if config.token_position == "mean_response" else _asked_once
        targets, controls = prepare(targets, "target"), prepare(controls, "control")
        return Contrast(
            target=[self._example("target", row) for row in targets],
            control=[self._example("control", row) for row in controls],
            paired=False,
        )

    def refuse_other_model(self, facts: Mapping[str, Any]) -> None:
        """Raises InputError unless the run's model, adapter and chat format have these fingerprints."""
        for name in ASKED_AS:
            if self._provenance.get(name) != facts.get(name):
                what = name.removesuffix("_fingerprint")
                raise InputError(
                    f"--positive_run {self.folder}: another {what} made its responses ({name} "
                    f"{str(self._provenance.get(name))[:12]} there, {str(facts.get(name))[:12]} here); "
                    f"expected --model_id {self._config.get('model_id')} as it was then"
                )

    def sequences(self, contrast: Contrast, tokenizer: Any, position: str) -> list[TokenSequence]:
        """
        The prompt of each example as the run rendered it, and for mean_response the response behind it.

        The response's tokens are those of tokens.parquet, else the response's text tokenized by itself. Thinking counts
        as prompt: the response is the answer. Raises InputError when the render is not what the row says, or when the
        tokens cannot be had.
        """
        renderer, guard = self._renderer(tokenizer), GuardedTokenizer(tokenizer, "")
        with_response = position == "mean_response"
        stored = self._stored_tokens(contrast.examples) if with_response else {}
        sequences, differing = [], 0
        for example in contrast.examples:
            prompt = self._rendered(renderer, example.row, None)
            span = None
            if position == "mean_prompt":
                fillers = [self._rendered(renderer, example.row, filler) for filler in FILLERS]
                span = without_first(text_span(prompt, fillers, example.id), example.id)
            response = self._response(example.row, stored, guard) if with_response else ()
            differing += with_response and len(response) != example.row["num_tokens"]
            n_thinking = example.row["num_thinking_tokens"] if with_response else 0
            sequences.append(
                TokenSequence(
                    id=example.id,
                    token_ids=(*prompt, *response),
                    prompt_length=len(prompt) + n_thinking,
                    text_span=span,
                )
            )
        if differing:
            LOGGER.warning(
                "%d of %d responses have another number of tokens than were generated: the run kept no token ids "
                "(--token_arrays)", differing, len(sequences),
            )  # fmt: skip
        return sequences

    def _chosen(self, rows: Sequence[Row], conditions: Sequence[str], flag: str) -> list[Row]:
        chosen = list(rows)
        for condition in conditions:
            field, value = condition.split("=", 1)
            if field not in self.rows[0]:
                nearest = difflib.get_close_matches(field, list(self.rows[0]), n=1, cutoff=0)[0]
                raise InputError(f"{flag} {condition}: rows have no field {field!r}; the nearest is {nearest!r}")
            known = list(dict.fromkeys(_shown(row[field]) for row in rows))
            if value not in known:
                nearest = difflib.get_close_matches(value, known, n=1, cutoff=0)[0]
                raise InputError(f"{flag} {condition}: no row has that value; the nearest is {nearest[:60]!r}")
            chosen = [row for row in chosen if _shown(row[field]) == value]
        if not chosen:
            raise InputError(f"{flag} {' '.join(conditions)}: no row has all of these")
        return chosen

    def _example(self, side: str, row: Row) -> Example:
        first = self._by_place.get(_place(row | {"turn": 0}), row)
        # The same question may be asked under two ids: it must not be fitted on and held out at once.
        keys = (f"prompt:{row['prompt_id']}", f"text:{first['prompt']}")
        return Example(id=f"{side}:{row['id']}", side=side, text=row["prompt"], keys=keys, row=row)

    def _renderer(self, tokenizer: Any) -> PersonaRenderer:
        config, template = self._config, self._config["chat_template"]
        if template not in (None, PLAIN) and Path(template).is_file():
            recorded = self._provenance["inputs"].get(template)
            if recorded != sha256_file(Path(template)):
                raise InputError(f"{template}: not the chat template that the run in {self.folder} was made with")
        return PersonaRenderer(
            with_chat_template(tokenizer, template), config["persona_mode"],
            system_prompt_style=config["system_prompt_style"], thinking=config["thinking_mode"], today=self._today,
        )  # fmt: skip

    @property
    def _today(self) -> date:
        return datetime.fromisoformat(self._provenance["sessions"][0]["started"]).date()

    def _rendered(self, renderer: PersonaRenderer, row: Row, filler: str | None) -> tuple[int, ...]:
        """The row's prompt, or the same with `filler` in place of the last question."""
        messages: list[Message] = []
        for turn in range(row["turn"]):
            earlier = self._by_place.get(_place(row | {"turn": turn}))
            if earlier is None:
                raise InputError(f"{self.results}: row {row['id']!r} is of turn {row['turn']}, turn {turn} is missing")
            messages += [
                {"role": "user", "content": earlier["prompt"]},
                {"role": "assistant", "content": earlier["response"]},
            ]
        messages.append({"role": "user", "content": row["prompt"] if filler is None else filler})
        prompt = renderer.render(messages, row["persona"], row["article"])
        made, recorded = (prompt.system_prompt, prompt.persona_applied), (row["system_prompt"], row["persona_applied"])
        if made != recorded:
            raise InputError(
                f"{self.results}: row {row['id']!r} was asked with {recorded}, and is rendered with {made} here; the "
                f"settings in config.json are not those of its rows"
            )
        return prompt.token_ids

    def _stored_tokens(self, examples: Sequence[Example]) -> dict[str, tuple[int, ...]]:
        path = self.folder / TOKENS
        if not path.exists():
            return {}
        import pyarrow.parquet as pq

        wanted = {example.row["id"] for example in examples}
        found: dict[str, tuple[int, ...]] = {}
        for batch in pq.ParquetFile(path).iter_batches(columns=["id", "token_id"]):
            for row in batch.to_pylist():
                if row["id"] in wanted:
                    found[row["id"]] = tuple(row["token_id"])
        absent = wanted - found.keys()
        if absent:
            raise InputError(f"{path}: no tokens of row {min(absent)!r}; expected those of every row")
        return found

    def _response(self, row: Row, stored: Mapping[str, tuple[int, ...]], guard: GuardedTokenizer) -> tuple[int, ...]:
        if stored:
            tokens = stored[row["id"]]
            if len(tokens) != row["num_tokens"]:
                raise InputError(
                    f"{self.folder / TOKENS}: {len(tokens)} tokens of row {row['id']!r}, which has {row['num_tokens']}"
                )
            return tokens
        if row["num_thinking_tokens"]:
            raise InputError(
                f"{self.results}: row {row['id']!r} has thinking, whose tokens cannot be made again from its text; "
                f"make the run with --token_arrays"
            )
        # A response that spells a special token did not hold one: those are left out of its text.
        return guard.encode([(row["response"], False)])[len(guard.prefix) :]


def _place(row: Row) -> tuple:
    return tuple(row[name] for name in ("persona", "category", "prompt_id", "rep_idx", "turn"))


def _shown(value: Any) -> str:
    """A field's value as --where spells it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return str(value)


def _answered(rows: Sequence[Row], side: str) -> list[Row]:
    answered = [row for row in rows if row["num_tokens"] > row["num_thinking_tokens"] and row["response"].strip()]
    if len(answered) < len(rows):
        LOGGER.warning("%d of %d %s rows have no answer and are left out", len(rows) - len(answered), len(rows), side)
    if not answered:
        raise InputError(f"none of the {len(rows)} {side} rows has an answer: there is no mean_response")
    return answered


def _asked_once(rows: Sequence[Row], side: str) -> list[Row]:
    """Without the repeats of a first question, whose prompts are the same token for token."""
    seen: set[tuple] = set()
    kept = []
    for row in rows:
        place = (row["persona"], row["category"], row["prompt_id"])
        # Later turns follow answers, which may differ.
        if row["turn"] or place not in seen:
            kept.append(row)
            seen.add(place)
    if len(kept) < len(rows):
        LOGGER.info("%d of %d %s rows repeat the prompt of another and are left out", len(rows) - len(kept), len(rows),
                    side)  # fmt: skip
    return kept
