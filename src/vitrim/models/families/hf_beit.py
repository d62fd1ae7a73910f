"""BEiT of Hugging Face transformers: the relative bias of every block follows the tokens that are left."""

from typing import Any

from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ..exchange import Reduced, while_attached
from ..forward_pass import trace_at_head
from ..reduced import ReducedBlock
from .hf_layout import Layout, Whole, enter, mean_of_patches
from .hf_reduced import ReducedLayer


class _ReducedLayer(ReducedLayer):
    bias_argument = "resolution"  # The size of the images, of which the block makes its bias.
    attend_whole = ReducedBlock.attend_whole
    relative_position_bias: Any
    patch_size: int

    def position_bias(self, shared: Any) -> Tensor | None:
        if self.relative_position_bias is None:
            return None
        height, width = shared
        return self.relative_position_bias((height // self.patch_size, width // self.patch_size))[0]


class _ReducedPooler(Reduced):
    """The mean over patches, in which a token that stands for several counts as so many."""

    layernorm: nn.LayerNorm | None

    @while_attached
    def forward(self, hidden_states: Tensor) -> Tensor:
        trace = None if self.layernorm is None else trace_at_head(self.vitrim_policy, hidden_states)
        if trace is None or trace.size_BN is None or self.layernorm is None:
            return super().forward(hidden_states)
        return self.layernorm(mean_of_patches(self, hidden_states, 1, trace.size_BN))


def _pool(tower: Any, tokens_BTC: Tensor, num_prefix: int, size_BN: Tensor | None) -> Tensor:
    pooler = tower.pooler
    if pooler is None or pooler.layernorm is None:
        return tokens_BTC[:, 0]
    return pooler.layernorm(mean_of_patches(tower, tokens_BTC, num_prefix, size_BN))


def _check(tower: Any) -> None:
    if tower.shared_position_bias is not None:
        raise UnsupportedModelError("a BEiT whose blocks share one relative bias (pre-training) cannot be cut")


enter(
    Layout(
        package="beit",
        prefix="Beit",
        tower="BeitModel",
        wholes={"BeitForImageClassification": Whole("beit", _pool, "tokens")},
        dense={"BeitForMaskedImageModeling": "beit", "BeitForSemanticSegmentation": "beit", "BeitBackbone": "beit"},
        pool=_pool,
        pool_reads="tokens",
        after=(("dropout", "lambda_1", "drop_path"), ("dropout", "lambda_2", "drop_path")),
        any_size=True,
        relative=lambda tower: tower.layers[0].relative_position_bias is not None,
        check=_check,
        others={"BeitPooler": _ReducedPooler},
        block=_ReducedLayer,
    )
)
