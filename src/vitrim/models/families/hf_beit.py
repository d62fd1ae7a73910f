"""BEiT of Hugging Face transformers: the relative bias of every block follows the tokens that are left."""

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ..foreign_macs import counted
from ..macs import Macs
from ..reduction.exchange import Reduced, while_attached
from ..reduction.forward_pass import trace_at_head
from ..reduction.reduced_block import ReducedBlock
from .hf.backbone import enter_backbone, with_all_patches
from .hf.layout import Layout, Whole, enter, first_token, mean_of_patches
from .hf.reduced_block import ReducedLayer
from .hf.reduced_models import ReducedTower


class _ReducedLayer(ReducedLayer):
    bias_argument = "resolution"  # The size of the images, of which the block makes its bias.
    attend_whole = ReducedBlock.attend_whole
    relative_position_bias: Any
    patch_size: int

    def position_bias(self, shared: Any) -> Tensor | None:
        if self.relative_position_bias is None:
            return None
        height, width = shared
        _keep_index(self, height, width)
        return self.relative_position_bias((height // self.patch_size, width // self.patch_size))[0]


def _keep_index(block: Any, height: int, width: int) -> None:
    """Have transformers keep the places of all pairs as a tensor that training can use.

    It keeps them for the whole process. Made in inference mode first, they would fail in every training after that.
    """
    if block.relative_position_bias is None or torch.compiler.is_compiling():  # Then nothing is kept.
        return
    with torch.inference_mode(False):
        block.relative_position_bias.generate_relative_position_index(
            (height // block.patch_size, width // block.patch_size)
        )


def _inputs(tower: Any, images: Tensor) -> tuple[Any, ...]:
    encoder = tower if hasattr(tower, "layers") else tower.beit  # The latter of a backbone.
    _keep_index(encoder.layers[0], *images.shape[-2:])
    return (images,)


class _ReducedPooler(Reduced):
    """The mean over patches, in which a token that stands for several counts as so many."""

    layernorm: nn.LayerNorm | None

    @while_attached
    def forward(self, hidden_states: Tensor) -> Tensor:
        trace = None if self.layernorm is None else trace_at_head(self.vitrim_policy, hidden_states)
        if trace is None or trace.size_BN is None or self.layernorm is None:
            return super().forward(hidden_states)
        return self.layernorm(mean_of_patches(self, hidden_states, 1, trace.size_BN))


class _ReducedTower(ReducedTower):
    """The tower, which runs the blocks of a backbone too."""

    @while_attached
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return with_all_patches(self.vitrim_policy, super().forward(*args, **kwargs))


def _pyramid_macs(backbone: Any, patches: int) -> Macs:
    """MACs of the feature pyramid, which scales up the first two of its four maps."""
    fpn, shape = backbone.fpn, (1, backbone.config.hidden_size, patches, 1)
    if isinstance(fpn, nn.Identity):
        return Macs()
    return counted(fpn.fpn1, shape) + counted(fpn.fpn2, shape)


def _pool(tower: Any, tokens_BTC: Tensor, num_prefix: int, size_BN: Tensor | None) -> Tensor:
    pooler = tower.pooler
    if pooler is None or pooler.layernorm is None:
        return tokens_BTC[:, 0]
    return pooler.layernorm(mean_of_patches(tower, tokens_BTC, num_prefix, size_BN))


def _check(tower: Any) -> None:
    if tower.shared_position_bias is not None:
        raise UnsupportedModelError("a BEiT whose blocks share one relative bias (pre-training) cannot be cut")


BEIT = Layout(
    package="beit",
    prefix="Beit",
    tower="BeitModel",
    wholes={"BeitForImageClassification": Whole("beit", _pool, "tokens")},
    dense={"BeitForMaskedImageModeling": "beit", "BeitForSemanticSegmentation": "beit", "BeitBackbone": "beit"},
    pool=_pool,
    pool_reads="tokens",
    after=(("dropout", "lambda_1", "drop_path"), ("dropout", "lambda_2", "drop_path")),
    any_size=True,
    inputs=_inputs,
    relative=lambda tower: tower.layers[0].relative_position_bias is not None,
    check=_check,
    others={"BeitPooler": _ReducedPooler},
    block=_ReducedLayer,
    tower_class=_ReducedTower,
)
enter(BEIT)
enter_backbone(
    BEIT,
    "BeitBackbone",
    "BeitModel",
    layers="beit.layers",
    projection="beit.embeddings.patch_embeddings.projection",
    final_norm="",
    pool=first_token,
    pool_reads="prefix",
    relative=lambda backbone: BEIT.relative(backbone.beit),
    check=lambda backbone: _check(backbone.beit),
    place_macs=_pyramid_macs,
)
