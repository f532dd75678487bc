"""The heads whose outputs an attention's output projection gets."""

from torch import nn

from src.common.errors import InputError
from src.models.architectures import decoder_layers
from src.models.residual_writers import PlacedWriter, matrix

NAMES = ("num_v_heads", "num_heads", "n_heads", "num_attention_heads")
"""What modules call their number of heads; linear attention hands on what those of its values are."""


def heads_of(model: nn.Module, placed: PlacedWriter) -> tuple[int, int]:
    """
    Number of heads of an attention, and width of each in its output projection's inputs. Raises InputError for a part
    without heads: a convolution, or a state-space mixer of single channels.
    """
    module = decoder_layers(model)[placed.layer].get_submodule(placed.writer.path.rpartition(".")[0])
    n_inputs = matrix(placed.writer).shape[-1]
    own = [n for name in NAMES if isinstance(n := getattr(module, name, None), int)]
    if not own and (hasattr(module, "head_dim") or hasattr(module, "head_size")):
        config = model.config.get_text_config(decoder=True)
        differ = getattr(config, "is_heterogeneous", False)
        own = [(config.per_layer_config[placed.layer] if differ else config).num_attention_heads]
    if not own or n_inputs % own[0]:
        raise InputError(
            f"--heads: layer {placed.layer} has {type(module).__name__}, whose {n_inputs} outputs are of no heads that "
            f"are known; leave the layer out"
        )
    return own[0], n_inputs // own[0]
