"""
Steered tokens in vLLM's prefix cache: from the block that holds the first of them on, a request's blocks carry the
fingerprint of its interventions in their hash, and the prompt's length where these depend on it. What comes before is
shared with everybody, the same spec finds its own again, and nobody else does.
"""

from typing import Any

from src.common.errors import InputError
from src.common.resolved_interventions import ResolvedSpec
from src.models.vllm_plan import Program

KEY = "tiller"


class PrefixKeys:
    """The specs that requests of this process may name, by fingerprint: equal ones are the same everywhere."""

    def __init__(self) -> None:
        self._programs: dict[str, Program] = {}

    def add(self, fingerprint: str, spec: ResolvedSpec) -> None:
        """Make a spec known."""
        self._programs.setdefault(fingerprint, Program(spec))

    def key(self, fingerprint: str, prompt_length: int, start: int, end: int) -> tuple | None:
        """
        What to add to the hash of the block of positions start ≤ i < end; None for a block before every steered token.
        Later blocks inherit it through their parent's hash. Raises InputError for a spec that is not known.
        """
        program = self._programs.get(fingerprint)
        if program is None:
            raise InputError(f"a request names interventions {fingerprint[:12]} that were never registered")
        first = program.first_position(prompt_length)
        if first is None or end <= first:
            return None
        return (KEY, fingerprint, prompt_length) if program.depends_on_prompt_length else (KEY, fingerprint)


KEYS = PrefixKeys()


def zero_new_blocks() -> None:
    """
    Have vLLM, in this process, zero each block of its cache before a request gets it. Attention on the CPU multiplies
    what lies behind a sequence's end in its last block by a weight of 0, and numbers that are none, which a request
    with huge interventions left there, would make the next one's so, too.
    """
    from vllm.v1.kv_cache_interface import KVCacheConfig

    KVCacheConfig.needs_kv_cache_zeroing = property(lambda config: True)


def install() -> None:
    """Make vLLM's block hashes, in this process, take account of interventions."""
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.simple_kv_offload import manager

    from src.models.vllm_tag import asked_of

    plain = kv_cache_utils.generate_block_hash_extra_keys
    if getattr(plain, "tiller", False):
        return

    def generate(request: Any, start: int, end: int, *args: Any, **settings: Any) -> Any:
        keys, *rest = plain(request, start, end, *args, **settings)
        asked = asked_of(request.sampling_params)
        ours = asked and asked.fingerprint and KEYS.key(asked.fingerprint, asked.prompt_length, start, end)
        return ((*(keys or ()), ours), *rest) if ours else (keys, *rest)

    generate.tiller = True
    for module in (kv_cache_utils, block_pool, manager):
        module.generate_block_hash_extra_keys = generate
