"""The vision tower of SigLIP of Hugging Face transformers, whose head pools by attention."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..foreign_macs import macs_per_row
from ..macs import Macs
from ..reduction.exchange import Reduced, while_attached
from ..reduction.forward_pass import trace_at_head
from .hf.layout import HALF, Whole, enter, mean_of_patches
from .hf_clip import CLIP


class ReducedPool(Reduced):
    """Attention pooling in which a token that stands for n patches is read like n equal ones."""

    probe: Any
    attention: Any
    layernorm: Any
    mlp: Any

    @while_attached
    def forward(self, hidden_state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        trace = trace_at_head(self.vitrim_policy, hidden_state)
        bias = None if trace is None else trace.bias(hidden_state.dtype)
        if bias is None:
            return super().forward(hidden_state, *args, **kwargs)
        mask = bias.expand(-1, self.attention.num_heads, -1, -1).flatten(0, 1)
        probe = self.probe.repeat(hidden_state.shape[0], 1, 1)
        pooled = self.attention(probe, hidden_state, hidden_state, attn_mask=mask, need_weights=False)[0]
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


def attention_pool(tower: Any, tokens_BTC: Tensor, num_prefix: int, size_BN: Tensor | None) -> Tensor:
    """What the pooling head makes of the tokens; their mean for a tower without it."""
    if not tower.use_head:
        return mean_of_patches(tower, tokens_BTC, num_prefix, size_BN)
    return tower.head(tokens_BTC)


def pool_macs(tower: Any, tokens: int) -> Macs:
    """MACs of the pooling head."""
    if not tower.use_head:
        return Macs()
    width = tower.config.hidden_size
    linear = 2 * width * width + macs_per_row(tower.head.mlp, width) + 2 * tokens * width * width
    return Macs(linear, 2 * tokens * width)


SIGLIP = replace(
    CLIP,
    package="siglip",
    prefix="Siglip",
    tower="SiglipVisionModel",
    wholes={"SiglipForImageClassification": Whole("vision_model", mean_of_patches, "tokens")},
    pool=attention_pool,
    pool_reads="tokens",
    pool_macs=pool_macs,
    final_norm="post_layernorm",
    prefix_tokens=0,
    has_cls=False,
    others={"SiglipMultiheadAttentionPoolingHead": ReducedPool},
    stats=HALF,
    types=("siglip_vision_model",),
)
enter(SIGLIP)
