"""Where the examples of an extraction come from, and their tokens."""

import logging
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.directions.examples import Example, held_out_ids, read_contrast, read_preserved
from src.directions.settings import DirectionSettings

if TYPE_CHECKING:
    from src.models.token_sequences import TokenSequence

LOGGER = logging.getLogger(__name__)
PATHS = ("positive_path", "negative_path", "pairs_path", "preserve_path", "preserve_against_path", "chat_template")


class Source:
    """The contrast, its split, and what is to be preserved."""

    def __init__(self, config: DirectionSettings) -> None:
        """Raises InputError for everything that is wrong with the prompts or the persona run."""
        self.config = config
        self.persona_run = None
        if config.positive_run is not None:
            # What reads a persona run and what renders know transformers: wrong prompt files are refused without it.
            from src.directions.persona_run import PersonaRun

            self.persona_run = PersonaRun(config.positive_run)
        self.contrast = self.persona_run.contrast(config) if self.persona_run else read_contrast(config)
        self.preserve, self.against = read_preserved(config)
        self.held = held_out_ids(self.contrast, config.val_fraction, config.seed)

    @property
    def examples(self) -> list[Example]:
        """All that take part: both classes, and what is to be preserved."""
        return [*self.contrast.examples, *self.preserve, *self.against]

    @property
    def inputs(self) -> list[Path]:
        """The files whose content decides the directions."""
        named = [getattr(self.config, name) for name in PATHS]
        files = [Path(path) for path in named if path and not str(path).startswith("hub:") and str(path) != "plain"]
        return files + (self.persona_run.inputs if self.persona_run else [])

    def sequences(self, tokenizer: Any, facts: Mapping[str, Any], today: date) -> tuple[list["TokenSequence"], dict]:
        """
        The tokens of targets, controls and preserved examples in this order, and what a directions file says of them.

        facts: the model's, which a persona run must share. today: for templates that write the date. Raises InputError
        for a run of another model and for a prompt that cannot be rendered.
        """
        from src.directions.rendering import PromptRenderer

        details = self._details()
        if self.persona_run is not None:
            self.persona_run.refuse_other_model(facts)
            return self.persona_run.sequences(self.contrast, tokenizer, self.config.token_position), details
        renderer = PromptRenderer(self.config, tokenizer, today)
        sequences = renderer.sequences(self.examples)
        if renderer.n_cut:
            LOGGER.warning(
                "%d of %d prompts have more than %d tokens and were cut on the left of their text",
                renderer.n_cut, len(sequences), self.config.max_prompt_tokens,
            )  # fmt: skip
        return sequences, details | {"n_prompts_cut": renderer.n_cut, "bos_added": renderer.adds_bos}

    def _details(self) -> dict[str, Any]:
        config = self.config
        details = {"paired": self.contrast.paired, "val_fraction": config.val_fraction, "seed": config.seed}
        for side, examples in (("target", self.contrast.target), ("control", self.contrast.control)):
            n_fitted = self.n_fitted(examples)
            details |= {f"n_{side}_fitted": n_fitted, f"n_{side}_held_out": len(examples) - n_fitted}
        details |= {"project_out": config.project_out, "winsorize_quantile": config.winsorize_quantile}
        if self.preserve:
            details |= {"n_preserve": config.n_preserve, "n_preserve_examples": len(self.preserve)}
        if config.method == "ensemble":
            details |= {"ensemble_methods": config.ensemble_methods, "ensemble_weights": config.ensemble_weights}
        if config.token_position == "mean_prompt":
            details["mean_prompt_over"] = "the user's own text, the prompt's first token left out"
        if self.persona_run is not None:
            return details | {"where": config.where, "negative_where": config.negative_where or "every other row"}
        rendering = ("raw_prompts", "system_prompt", "chat_template", "thinking_mode", "max_prompt_tokens")
        return details | {name: getattr(config, name) for name in rendering}

    def n_fitted(self, examples: Sequence[Example]) -> int:
        """How many of the examples are not held out."""
        return sum(example.id not in self.held for example in examples)
