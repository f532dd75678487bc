"""Settings of an embedding run: which texts, which model, how they are cut into batches, what is stored."""

from dataclasses import dataclass

from src.common.errors import InputError
from src.common.experiment_config import WorkerConfigBase
from src.common.settings import require_at_least_one, setting

EXTRACTS = ("none", "first_assistant", "last_user", "all_turns", "response")
PRECISIONS = ("float32", "float16", "bfloat16", "int8", "binary")
AT_LEAST_ONE = ("chunk_tokens", "truncate_dim", "rows_per_shard", "num_rows", "openai_num_threads")


@dataclass(kw_only=True)
class TextSettings(WorkerConfigBase):
    """The texts"""

    dataset_path: str = setting()
    """A Parquet, JSONL, CSV or JSON file, a folder of files of one of these kinds, or hub:NAME (streamed)."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    split: str | None = None
    """Split of a hub dataset, train unless given; of local files only the name in the column `split`."""
    dataset_revision: str | None = setting(None, affects_rows=False)
    """Branch, tag or commit of a hub dataset, the newest commit unless given; shards of another one are refused."""
    text_field: str | None = None
    """Field that holds the text; without it text, for turns messages, for response response."""
    extract: str = setting("none", choices=EXTRACTS)
    """What of the field is embedded: all of it, a turn of a conversation, every turn as one text, or an answer."""
    num_rows: int | None = setting(None, aliases=("num_tasks",))
    """Only the first N rows of the dataset."""
    fraction: float = 1.0
    """Share of the rows to embed, chosen by a hash of seed and row number."""
    dedup: bool = True
    """Embed equal texts of a shard once; every row keeps its line."""
    skip_bad_rows: bool = setting(False, affects_rows=False)
    """Leave out rows without a text (counted in the sidecars) instead of refusing the dataset."""
    store_text: bool = True
    """Keep the text in the shards."""


@dataclass(kw_only=True)
class EmbedderSettings:
    """The model"""

    model_id: str = setting(aliases=("model",))
    """sentence-transformers model: hub id, local folder or bundled:minilm; for --backend openai the server's name."""
    revision: str | None = None
    """Branch, tag or commit of the hub's repository."""
    backend: str = setting("auto", choices=("auto", "st", "openvino", "vllm", "openai"), affects_rows=False)
    """auto: sentence-transformers (st) on CUDA; on the CPU OpenVINO where it is installed, else st."""
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16", "float16"), affects_rows=False)
    """auto: bfloat16 on CUDA and MPS, and on a CPU that computes in it; else float32."""
    device: str = setting("auto", affects_rows=False)
    """auto is the first that is there of cuda, mps, cpu."""
    prompt: str | None = None
    """Text put before every text."""
    prompt_name: str | None = None
    """A prompt that the model brings, by its name."""
    max_length: int | None = None
    """Tokens of a text at most, special ones included; the model's own limit unless given."""
    tokens_per_batch: int | None = None
    """Tokens of a batch at most, padding included; 1,024 on the CPU and 32,768 on others unless given."""

    def check_model(self) -> None:
        """Raises InputError for numbers below 1 and for prompts that exclude each other."""
        require_at_least_one(self, ("max_length", "tokens_per_batch"))
        if self.prompt is not None and self.prompt_name is not None:
            raise InputError("--prompt and --prompt_name exclude each other; give one of them")


@dataclass(kw_only=True)
class EncoderSettings(EmbedderSettings, WorkerConfigBase):
    """The encoder"""

    devices: str | None = setting(None, affects_rows=False)
    """Several devices with commas between, each with a copy of the model: cuda:0,cuda:1."""
    compile: bool = False
    """torch.compile (st): batches are padded to few sizes, each compiled before the first batch."""
    chunk_tokens: int | None = None
    """Cut longer texts into pieces of this many tokens, special ones included, instead of cutting them off."""
    chunk_overlap: int = 0
    """Tokens that a piece has in common with the one before."""
    pool_chunks: bool = False
    """One vector a text: the mean over its pieces, weighted by their tokens."""


@dataclass(kw_only=True)
class EmbedSettings(TextSettings, EncoderSettings):
    """What is stored"""

    truncate_dim: int | None = None
    """Keep the first N dimensions (Matryoshka models)."""
    normalize: bool = False
    """Scale to length 1, also where the model does not itself."""
    precision: str = setting("float32", choices=PRECISIONS)
    """Number format of the stored vectors: int8 with one coefficient a shard, binary one bit a dimension."""
    rows_per_shard: int = 8192
    """Rows of the dataset in one file: what is lost at most by a kill, and the window of sorting by length."""
    verify: int = setting(32, affects_rows=False)
    """Embed N random rows again, one by one in float32, and fail where a stored vector differs; 0 leaves it out."""
    push_to_hub: str | None = setting(None, affects_rows=False)
    """Upload the shards to this dataset repository, owner/name, at the end; private unless --public."""
    public: bool = setting(False, affects_rows=False)
    """Make the uploaded dataset public."""
    base_url: str | None = None
    """openai: another server that speaks the protocol, as http://localhost:8000/v1."""
    execute: bool = setting(False, affects_rows=False)
    """openai: send the requests; without it their number, tokens and cost are printed."""
    openai_tag: str = setting("OPENAI_API_KEY", affects_rows=False)
    """openai: name of the variable that holds the key."""
    openai_num_threads: int = setting(8, affects_rows=False)
    """openai: requests at once."""
    price_per_million: float | None = setting(None, affects_rows=False)
    """openai: US dollars for a million tokens, for the estimate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, AT_LEAST_ONE)
        self.check_model()
        if not 0 < self.fraction <= 1:
            raise InputError(f"--fraction {self.fraction}: expected a share above 0, up to 1")
        if self.verify < 0:
            raise InputError(f"--verify {self.verify}: expected 0 or more rows")
        self._check_chunks()
        self._check_together()

    def _check_chunks(self) -> None:
        if self.chunk_tokens is None:
            if self.chunk_overlap or self.pool_chunks:
                raise InputError("--chunk_overlap and --pool_chunks need --chunk_tokens; add it or drop them")
        elif not 0 <= self.chunk_overlap < self.chunk_tokens:
            raise InputError(f"--chunk_overlap {self.chunk_overlap}: expected 0 to {self.chunk_tokens - 1}")
        if self.chunk_tokens and self.max_length:
            raise InputError("--max_length cuts texts off and --chunk_tokens cuts them up; give one of them")

    def _check_together(self) -> None:
        if self.device != "auto" and self.devices:
            raise InputError("--device and --devices exclude each other; give one of them")
        if self.devices and self.backend == "vllm":
            raise InputError("--devices with --backend vllm: it has one engine a process; give --num_workers instead")
        if self.compile and self.backend not in ("auto", "st"):
            raise InputError(f"--compile with --backend {self.backend}: only st compiles; drop one of them")
        if self.public and not self.push_to_hub:
            raise InputError("--public needs --push_to_hub OWNER/NAME")
        if self.backend == "openai":
            asked = [n for n in ("chunk_tokens", "max_length", "prompt_name", "devices") if getattr(self, n)]
            if asked:
                raise InputError(f"--{asked[0]} with --backend openai: the server has the tokenizer; leave it out")
            if self.base_url and "@" in self.base_url:
                raise InputError("--base_url: it holds a password, which would be stored; use --openai_tag instead")
        elif self.execute or self.base_url:
            raise InputError("--execute and --base_url belong to --backend openai; add it or drop them")
