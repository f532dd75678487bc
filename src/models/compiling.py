"""
Compiled normalisation, for what runs one model again and again.

A decoder's norms are written as six kernels and more each; compiled, each is one that reads its input once. Nothing
larger is compiled: a search puts other hooks on the weights it edits in every trial, leaves out layers and lets caches
grow, and whatever holds these would be compiled anew each time. The rotary embedding runs once a pass, the norms at
least twice a layer.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from src.common.errors import InputError
from src.models.architectures import decoder_layers

LOGGER = logging.getLogger(__name__)
MOST_GRAPHS = 64
"""Versions that are compiled at most. Four suffice for norms of one kind and width; torch's own bound is 8 for all."""
WARM_UP = ((5, 7), (1, 7), (5, 1), (1, 1))
"""Rows and tokens: a size of 1 is compiled apart, any other stands for all, if it is not that of something else."""


@contextmanager
def compiled_norms(model: nn.Module) -> Iterator[int]:
    """
    Within the context the norms of the decoder are compiled, for batches of all sizes; yields how many are. Raises
    InputError for a model that has none and where they cannot be compiled, torch's FailOnRecompileLimitHit rather than
    going on uncompiled.
    """
    norms = _composed_norms(model)
    if not norms:
        raise InputError(
            f"--compile: {model.config.model_type} models, or this one as it is loaded, have no normalisation that is "
            f"several kernels, so there is nothing to compile; leave the flag out"
        )
    # Without the emulation what torch rounds between two kernels would not be, and a model saved would differ.
    options = {"emulate_precision_casts": True}
    with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS, fail_on_recompile_limit_hit=True):
        try:
            for norm in norms:
                norm.compile(fullgraph=True, dynamic=True, options=options)
            _warm_up(model, len(norms))
            yield len(norms)
        finally:
            for norm in norms:
                norm._compiled_call_impl = None


def _composed_norms(model: nn.Module) -> list[nn.Module]:
    layers = decoder_layers(model)
    decoder = next(parent for parent in model.modules() if any(child is layers for child in parent.children()))
    return [module for module in decoder.modules() if _is_composed_norm(module)]


def _is_composed_norm(module: nn.Module) -> bool:
    """A leaf whose parameters are all vectors. Torch's own are one kernel already."""
    is_leaf = next(module.children(), None) is None and not type(module).__module__.startswith("torch.")
    parameters = list(module.parameters())
    # A forward set on the instance is accelerate's, which places inputs on devices.
    return is_leaf and bool(parameters) and all(p.ndim == 1 for p in parameters) and "forward" not in vars(module)


def _warm_up(model: nn.Module, n_norms: int) -> None:
    began = time.monotonic()
    device = model.get_input_embeddings().weight.device
    try:
        with torch.inference_mode():
            for shape in WARM_UP:
                model(input_ids=torch.zeros(shape, dtype=torch.long, device=device))
    except TorchDynamoException as error:
        raise InputError(
            f"--compile: the model's normalisation cannot be compiled here: {_first_line(error)}; install a C++ "
            f"compiler (g++ or clang++, or name yours in CXX; Triton on CUDA), or leave the flag out"
        ) from error
    LOGGER.info("Compiled %d normalisations in %.1f s", n_norms, time.monotonic() - began)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
