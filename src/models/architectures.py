"""Where the parts of a decoder live: layers, norms, and the modules that write to the residual stream."""

from dataclasses import dataclass

from torch import Tensor, nn

from src.common.errors import InputError

LAYER_PATHS = (
    "model.layers",  # Llama, Mistral, Qwen, Gemma, Phi-3, OLMo, Cohere, GLM, DeepSeek, gpt-oss, Mixtral
    "model.language_model.layers",  # Gemma 3, Qwen-VL, LLaVA and other multimodal models since transformers 5
    "language_model.model.layers",
    "model.text_model.layers",  # Idefics, SmolVLM
    "text_model.layers",
    "language_model.layers",
    "layers",  # a bare decoder without a head
    "transformer.h",  # GPT-2, GPT-J, Falcon, BLOOM
    "transformer.blocks",  # MPT, DBRX
    "h",
    "gpt_neox.layers",
    "model.decoder.layers",  # OPT
    "backbone.layers",  # Mamba, Nemotron-H
)
ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention", "linear_attn", "mamba", "conv", "mixer")
ATTENTION_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")
# OPT keeps its two feed-forward matrices on the layer itself: there the second one stands for the whole. The last three
# stand beside another one in some models (Gemma 4, Granite 4), where that comes first.
MLP_NAMES = (
    "mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "mixer", "fc2", "shared_mlp", "experts",
    "per_layer_projection",
)  # fmt: skip
MLP_OUTPUT_NAMES = (
    "down_proj", "w2", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "output_linear", "per_layer_projection",
)  # fmt: skip
FINAL_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "embedding_norm")
OVERRIDE = "tiller_layers_path"


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A weight whose output is added to the residual stream."""

    path: str
    """Dotted path of the module, from its decoder layer."""
    component: str
    """`attention` or `mlp`."""
    module: nn.Module
    parameter: str
    """Name of the weight on `module`: (out, in), (in, out) for GPT-2's Conv1D, (experts, …) when fused."""

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.parameter)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """
    The decoder blocks of `model` in order, the text tower's for a multimodal model.

    A model of another build is taught by setting `model.tiller_layers_path = "dotted.path"`. Raises InputError, naming
    that way out and the lists of modules that were found, when none of the known paths holds.
    """
    override = getattr(model, OVERRIDE, None)
    for path in (override,) if override else LAYER_PATHS:
        layers = _get(model, path)
        if isinstance(layers, nn.ModuleList) and len(layers):
            return layers
    found = [f"{name} ({len(m)})" for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    tried = f"{OVERRIDE} = {override!r} is not a list of modules" if override else "none of the known paths exists"
    raise InputError(
        f"cannot find the decoder layers of {type(model).__name__}: {tried}. "
        f"Set model.{OVERRIDE} to one of its lists of modules: {', '.join(found) or 'it has none'}"
    )


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder layer and the unembedding. Raises InputError when there is none."""
    layers = decoder_layers(model)
    for parent in model.modules():
        if any(child is layers for child in parent.children()):
            return _first(parent, FINAL_NORM_NAMES, "final norm")
    raise AssertionError("the decoder layers have no parent module")


def attention(layer: nn.Module) -> nn.Module:
    """The token-mixing module of a decoder layer: attention, linear attention or a state-space mixer."""
    return _first(layer, ATTENTION_NAMES, "attention")


def mlp(layer: nn.Module) -> nn.Module:
    """The feed-forward module of a decoder layer, dense or mixture of experts."""
    return _first(layer, MLP_NAMES, "feed-forward")


def attention_writers(layer: nn.Module) -> list[Writer]:
    """
    The output projections of all token-mixing modules: several where attention runs beside a state-space mixer, none in
    a layer without any. Raises InputError for such a module without a projection that is known.
    """
    return _writers(layer, ATTENTION_NAMES, "attention")


def mlp_writers(layer: nn.Module) -> list[Writer]:
    """
    Every feed-forward weight that writes to the residual stream: the dense projection, or each expert's, fused experts'
    and the shared expert's; none in a layer without any. Raises InputError for such a module without a projection that
    is known.
    """
    return _writers(layer, MLP_NAMES, "mlp")


def _writers(layer: nn.Module, names: tuple[str, ...], component: str) -> list[Writer]:
    writers = []
    for name, module in _present(layer, names):
        found = {"attention": _attention_outputs(layer, module), "mlp": _mlp_outputs(layer, module)}
        # A hybrid model calls its mixer the same whether it is attention or a feed-forward part.
        is_either = name in ATTENTION_NAMES and name in MLP_NAMES
        if not found[component] and not (is_either and any(found.values())):
            raise InputError(
                f"no {component} output projection in {type(module).__name__}: it has {_children(module)}, and looked "
                f"for were {', '.join(ATTENTION_OUTPUT_NAMES if component == 'attention' else MLP_OUTPUT_NAMES)}"
            )
        writers += found[component]
    return writers


def _present(module: nn.Module, names: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    children = dict(module.named_children())
    return [(name, children[name]) for name in names if name in children]


def _attention_outputs(layer: nn.Module, module: nn.Module) -> list[Writer]:
    # GPT-Neo has its attention within its attention.
    for parent in module.modules():
        for _, child in _present(parent, ATTENTION_OUTPUT_NAMES)[:1]:
            return [Writer(path=_path(layer, child), component="attention", module=child, parameter="weight")]
    return []


def _mlp_outputs(layer: nn.Module, parent: nn.Module) -> list[Writer]:
    writers = []
    for module in parent.modules():
        leaf = _path(layer, module).rsplit(".", 1)[-1]
        if leaf in MLP_OUTPUT_NAMES and isinstance(getattr(module, "weight", None), Tensor):
            writers.append(Writer(path=_path(layer, module), component="mlp", module=module, parameter="weight"))
        # Fused experts keep one stacked parameter on the container rather than a module an expert.
        fused = [p for p, _ in module.named_parameters(recurse=False) if p in MLP_OUTPUT_NAMES]
        writers += [Writer(path=_path(layer, module), component="mlp", module=module, parameter=p) for p in fused]
    return writers


def _get(module: nn.Module, path: str) -> object | None:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def _name_of_first(module: nn.Module, names: tuple[str, ...], what: str) -> str:
    children = dict(module.named_children())
    for name in names:
        if name in children:
            return name
    raise InputError(f"no {what} in {type(module).__name__}: looked for {', '.join(names)}; it has {_children(module)}")


def _first(module: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    return getattr(module, _name_of_first(module, names, what))


def _path(layer: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in layer.named_modules() if candidate is module)


def _children(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "no children"
