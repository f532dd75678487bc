"""Settings of a fine-tuning run: what is learned, by which adapter, how, and what is kept."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from src.common.errors import InputError
from src.common.model_config import ModelConfigBase
from src.common.settings import require_at_least_one, setting
from src.common.system_prompts import check_style

AT_LEAST_ONE = (
    "lora_rank", "epochs", "batch_size", "gradient_accumulation", "max_seq_len", "validate_every", "checkpoint_every",
    "num_tasks", "num_processes",
)  # fmt: skip
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
PLACEHOLDER = "{input}"


@dataclass(kw_only=True)
class FormatSettings:
    """How rows become tokens"""

    prompt: str = PLACEHOLDER
    """What a row's input becomes, {input} standing for it; in a chat its first question. Other braces are text."""
    system_prompt: str | None = None
    """A system message before every row."""
    persona: str | None = None
    """Who answers, named as --persona_mode says: with the ids that src.run_personas gives this persona."""
    article: str = ""
    """What stands before the persona's name in the system prompt: a, an, the, or nothing."""
    persona_mode: str = setting("both", choices=("header", "system", "both"))
    """Where the persona is named: in every assistant header, in the system prompt, or in both."""
    system_prompt_style: str = "you-are-a"
    """you-are-a, act-as, none, or a text with {article} and {persona}."""
    chat_template: str | None = None
    """Jinja file used instead of the model's own chat template, or `plain` for a base model that has none."""
    thinking_mode: bool = True
    """Ask templates that know it for thinking before the answer; give the same when generating."""
    raw_prompts: bool = False
    """No chat template: prompt and completion one after another (for base models)."""
    max_seq_len: int | None = None
    """Tokens of a row at most; the model's context unless given. Longer rows are listed and refused."""
    truncate: bool = False
    """Cut longer rows from the left of the prompt instead; an answer is never cut."""
    train_on: str = setting("completions", choices=("completions", "all"))
    """Learn the answers with the token that ends each, or every token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_style(self.system_prompt_style)
        if self.prompt.count(PLACEHOLDER) != 1:
            raise InputError(f"--prompt {self.prompt!r}: expected {PLACEHOLDER} in it, once")
        if self.persona is not None and not self.persona.strip():
            raise InputError("--persona is empty; expected a name, or leave it out")
        others = (self.chat_template, self.system_prompt, self.persona)
        if self.raw_prompts and any(value is not None for value in others):
            raise InputError("--raw_prompts leaves no place for --chat_template, --system_prompt or --persona")


@dataclass(kw_only=True)
class SavingSettings:
    """What is kept"""

    epochs_to_save: str = "all"
    """all, none, or epochs from 0, as 0,2,4: which leave an adapter in epoch_N/."""
    save_last_epoch_only: bool = False
    """Keep the last epoch's adapter alone."""
    merge: bool = False
    """Also write the merged model of each epoch kept, in epoch_N/merged/."""
    stash_adapter_weights: bool = False
    """With --merge: the merged model in epoch_N/ itself, the adapter in epoch_N/adapter/."""
    checkpoint_every: int = setting(100, affects_rows=False)
    """Steps between checkpoints, which a killed run goes on from; each epoch ends with one too."""
    run_name: str | None = setting(None, affects_rows=False)
    """Name of the run, for reports; a random adjective_noun unless given."""
    report_to: str = setting("none", choices=("none", "wandb", "tensorboard", "trackio"), affects_rows=False)
    """Where else the numbers of metrics.jsonl go."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"all|none|\d+(,\d+)*", self.epochs_to_save):
            raise InputError(f"--epochs_to_save {self.epochs_to_save}: expected all, none, or epochs such as 0,2,4")
        if self.save_last_epoch_only and self.epochs_to_save != "all":
            raise InputError("--save_last_epoch_only and --epochs_to_save exclude each other; give one of them")
        if self.stash_adapter_weights and not self.merge:
            raise InputError("--stash_adapter_weights puts the adapter beside merged weights; it goes with --merge")


@dataclass(kw_only=True)
class FinetuneSettings(FormatSettings, SavingSettings, ModelConfigBase):
    """Fields of `src.finetune`."""

    dataset_path: Path = setting()
    """The rows: a JSON file of train / validation / test lists, a JSONL, Parquet or Arrow file, or a folder of files
    named by split. A row has messages, or input and output, or prompt and completion."""
    objective: str = setting("sft", choices=("sft", "dpo"))
    """Learn the answers, or (dpo) prefer one: rows then have prompt, chosen and rejected."""
    dpo_beta: float = 0.1
    """dpo: how strongly the adapter is held near the model that it began from."""
    lora_rank: int = 16
    """Rank of the adapter."""
    lora_alpha: float | None = None
    """Twice the rank unless given."""
    lora_dropout: float = 0.0
    """Share of the adapter's inputs that are left out at random."""
    target_modules: list[str] | None = None
    """Names of the linear modules that get an adapter; all in the decoder unless given."""
    use_dora: bool = False
    """Learn the weights' lengths apart from their directions (DoRA)."""
    use_rslora: bool = False
    """Scale by alpha / √rank instead of alpha / rank."""
    epochs: int = 1
    """Passes over the rows."""
    lr: float = setting(2e-4, aliases=("learning_rate",))
    """The learning rate at its highest."""
    lr_scheduler: str = setting("cosine", choices=SCHEDULES)
    """How it falls behind the warm-up."""
    warmup_steps: int = 0
    """Steps in which it rises from 0."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Length to which gradients are cut; 0 leaves them."""
    batch_size: int = 8
    """Rows at once; with --packing, packs of max_seq_len tokens."""
    gradient_accumulation: int = 1
    """Batches a step."""
    group_by_length: bool = False
    """Rows of like length in one step: less padding on a GPU (there is hardly any on the CPU), but tokens of short rows
    count for more than those of long ones, since each step is a mean over its own tokens."""
    packing: bool = False
    """Fill sequences of max_seq_len tokens with several rows each, which do not see one another."""
    gradient_checkpointing: bool = setting(True, affects_rows=False)
    """Compute activations of large batches again instead of keeping them."""
    num_processes: int = 1
    """Processes that share each batch, on CUDA a device each: on this machine, or all that torchrun or srun has
    started on several. --batch_size is still all of them together, so that the numbers stay the same up to rounding
    (but for --lora_dropout, whose draws are each one's)."""
    shard_weights: bool = setting(False, affects_rows=False)
    """Spread the model's own weights over the processes (FSDP2), for models that one device does not hold."""
    validate_every: int | None = setting(None, affects_rows=False)
    """Steps between validations; at each epoch's end unless given."""
    num_tasks: int | None = None
    """Only the first N training rows."""
    preventative_direction: list[str] | None = None
    """FILE:LAYER:COEFFICIENT, sft: steer while training, so that the adapter need not learn the trait; the adapter is
    then used without."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, AT_LEAST_ONE)
        for name in ("lr", "dpo_beta", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name} {value}: expected a positive number")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name} {getattr(self, name)}: expected 0 or a positive number")
        if self.lr_scheduler == "constant" and self.warmup_steps:
            raise InputError("--lr_scheduler constant has no warm-up; take constant_with_warmup, or no --warmup_steps")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout {self.lora_dropout}: expected a share from 0 to below 1")
        if self.target_modules is not None and not self.target_modules:
            raise InputError("--target_modules is empty; expected names, or leave it out for all")
        wanted = [e for e in self.saved_epochs if e >= self.epochs]
        if wanted:
            raise InputError(f"--epochs_to_save {self.epochs_to_save}: the epochs are 0 to {self.epochs - 1}")
        if self.packing and (self.max_seq_len is None or self.objective == "dpo"):
            raise InputError("--packing needs --max_seq_len, the tokens of a pack, and --objective sft")
        if self.num_processes > self.batch_size:
            raise InputError(f"--num_processes {self.num_processes}: more than the {self.batch_size} of --batch_size")
        if self.shard_weights and (self.num_processes == 1 or self.objective == "dpo" or self.quantization != "none"):
            raise InputError("--shard_weights needs several --num_processes, --objective sft, and no --quantization")
        if self.objective == "dpo" and (self.train_on == "all" or self.preventative_direction):
            raise InputError("--objective dpo compares completions; leave --train_on, --preventative_direction out")

    @property
    def alpha(self) -> float:
        """Of the adapter: --lora_alpha, or twice the rank."""
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def saved_epochs(self) -> list[int]:
        """The epochs, from 0, of which an adapter is kept."""
        if self.save_last_epoch_only:
            return [self.epochs - 1]
        if self.epochs_to_save in ("all", "none"):
            return list(range(self.epochs)) if self.epochs_to_save == "all" else []
        return sorted({int(epoch) for epoch in self.epochs_to_save.split(",")})
