"""Tiny models of Hugging Face transformers, and the same networks under the names that the slow reference reads."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from eva_models import kept_by_head, narrowed, turned
from references import VIEWS
from vitrim.models import RemovedBranch, attached
from vitrim.models.families.hf.layout import layout_of
from vitrim.models.widths.elastic_pairs import query_dim

SMALL = {"image_size": 40, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
"""25 patch tokens, an odd number, in 3 blocks."""
LABELS = {"num_labels": 5}


def _made(name: str, config: str, **options: object) -> nn.Module:
    import transformers

    kind = getattr(transformers, name)
    return kind(getattr(transformers, config)(**{**SMALL, "intermediate_size": 48, **LABELS, **options}))


HF: dict[str, Callable[[], nn.Module]] = {
    "hf_vit": lambda: _made("ViTForImageClassification", "ViTConfig"),
    "hf_dinov2": lambda: _plain(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", num_register_tokens=2, mlp_ratio=2
    ),
    "hf_siglip": lambda: _made("SiglipVisionModel", "SiglipVisionConfig"),
    "hf_siglip2": lambda: _siglip2("Siglip2VisionModel"),
    "hf_narrow_values": lambda: narrowed(MORE["dinov3"](), 40),
}
"""In the zoo."""
MORE: dict[str, Callable[[], nn.Module]] = {
    "vit_bare": lambda: _made("ViTModel", "ViTConfig"),
    "deit": lambda: _made("DeiTForImageClassification", "DeiTConfig"),
    "deit_bare": lambda: _made("DeiTModel", "DeiTConfig"),
    "deit_distilled": lambda: _made("DeiTForImageClassificationWithTeacher", "DeiTConfig"),
    "msn": lambda: _made("ViTMSNForImageClassification", "ViTMSNConfig"),
    "ijepa": lambda: _made("IJepaForImageClassification", "IJepaConfig"),
    "ijepa_bare": lambda: _made("IJepaModel", "IJepaConfig"),
    "dinov2": lambda: _plain("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2, use_swiglu_ffn=True),
    "dinov2_bare": lambda: _plain("Dinov2Model", "Dinov2Config", mlp_ratio=2),
    "beit": lambda: _beit("BeitForImageClassification"),
    "beit_cls": lambda: _beit("BeitModel", use_mean_pooling=False, use_absolute_position_embeddings=True),
    "dinov3": lambda: _made("DINOv3ViTModel", "DINOv3ViTConfig", hidden_size=36, num_register_tokens=2),
    "dinov3_gated": lambda: _made("DINOv3ViTModel", "DINOv3ViTConfig", hidden_size=36, use_gated_mlp=True),
    "clip": lambda: _two_towers("CLIPForImageClassification", "CLIPConfig"),
    "clip_bare": lambda: _made("CLIPVisionModel", "CLIPVisionConfig"),
    "clip_projected": lambda: _made("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=7),
    "metaclip2": lambda: _two_towers("MetaClip2ForImageClassification", "MetaClip2Config"),
    "siglip": lambda: _two_towers("SiglipForImageClassification", "SiglipConfig"),
    "siglip2": lambda: _siglip2("Siglip2ForImageClassification"),
    "siglip2_headless": lambda: _siglip2("Siglip2VisionModel", vision_use_head=False),
    "siglip_headless": lambda: _made("SiglipVisionModel", "SiglipVisionConfig", vision_use_head=False),
}


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "dinov2_backbone": lambda: _plain("Dinov2Backbone", "Dinov2Config", mlp_ratio=2, **_STAGES),
    "registers_backbone": lambda: _plain(
        "Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig", mlp_ratio=2, num_register_tokens=2, **_STAGES
    ),
    "dinov3_backbone": lambda: _made(
        "DINOv3ViTBackbone", "DINOv3ViTConfig", hidden_size=36, num_register_tokens=2, **_STAGES
    ),
    "beit_backbone": lambda: _beit("BeitBackbone", reshape_hidden_states=True, **_STAGES),
}
"""Give maps of what the embeddings and every block give."""
_STAGES: dict[str, object] = {"out_indices": [0, 1, 2, 3]}


def _plain(name: str, config: str, **options: object) -> nn.Module:
    """For configurations without `intermediate_size`, or of a whole model with a text tower."""
    import transformers

    given = {**SMALL, **LABELS, **options}
    return getattr(transformers, name)(getattr(transformers, config)(**given))


def _siglip2(name: str, **options: object) -> nn.Module:
    import transformers

    vision = {key: value for key, value in SMALL.items() if key != "image_size"}
    vision |= {"num_patches": 25, "intermediate_size": 48, **options}
    if name == "Siglip2VisionModel":
        return transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**vision))
    return getattr(transformers, name)(transformers.Siglip2Config(vision_config=vision, **LABELS))


def _beit(name: str, **options: object) -> nn.Module:
    return _made(name, "BeitConfig", **{"use_relative_position_bias": True, "layer_scale_init_value": 0.5, **options})


def _two_towers(name: str, config: str) -> nn.Module:
    import transformers

    vision = {**SMALL, "intermediate_size": 48}
    return getattr(transformers, name)(getattr(transformers, config)(vision_config=vision, **LABELS))


def in_timm_words(model: Any) -> Any:
    """The same network under the names of the parts of timm's `VisionTransformer`, for the slow reference."""
    if attached(model) is not None:  # Its pooling layer is a reduced one too.
        model = copy.deepcopy(model)
        attached(model).remove()
    layout = layout_of(model)
    assert layout is not None
    tower, whole, same = layout.tower_of(model), layout.whole(model), nn.Identity()

    def heads(attn: Any) -> Any:
        if isinstance(attn, RemovedBranch):
            return attn
        parts = (attn.q_proj, attn.k_proj, attn.v_proj)
        view = SimpleNamespace(
            qkv=lambda x: torch.cat([one(x) for one in parts], -1), num_heads=getattr(attn, layout.heads),
            head_dim=attn.head_dim, q_norm=same, k_norm=same, norm=same, gate=None, proj=getattr(attn, layout.out),
        )  # fmt: skip
        if layout.rotary:
            pixels = torch.zeros(1, 1, 40, 40, dtype=torch.float64)
            cos, sin = tower.rope_embeddings(pixels)
            table = torch.cat([sin[:, : sin.shape[1] // 2], cos[:, : cos.shape[1] // 2]], 1)
            view.query_dim, kept = query_dim(attn), kept_by_head(attn, view.num_heads)
            view.turned = lambda head, place, row: turned(table, True, place, row, kept[head])
        return view

    def layer(block: Any) -> Any:
        attn, mlp = (getattr(block, name) for name in layout.parts)
        norm1, norm2 = (getattr(block, name) for name in layout.norms)
        ls1, ls2 = ((lambda x, names=names: after(block, names, x)) for names in layout.after)
        view = heads(attn)
        if layout.relative(tower):
            table = block.relative_position_bias((5, 5))[0]
            view.relative = lambda query, key: table[:, _row(query), _row(key)]
        return SimpleNamespace(attn=view, norm1=norm1, norm2=norm2, mlp=mlp, ls1=ls1, ls2=ls2)

    def after(block: Any, names: tuple[str, ...], x: Tensor) -> Tensor:
        for part in (getattr(block, name) for name in names):
            x = part(x) if isinstance(part, nn.Module) else part * x
        return x

    def head(pooled: Tensor) -> Tensor:
        """Of all final tokens, as the reference repeats those that stand for several patches."""
        pool = layout.pool if whole is None else whole.pool
        out = pool(tower, pooled, layout.num_prefix(model), None)
        return out if whole is None else getattr(model, whole.heads[0])(out)

    def embed(x: Tensor) -> Tensor:
        given, embeddings = layout.inputs(tower, x), getattr(tower, "beit", tower).embeddings
        return embeddings(given[0], given[2]) if len(given) > 1 else embeddings(*given)

    view = SimpleNamespace(
        patch_embed=embed, _pos_embed=lambda x: x, norm_pre=getattr(tower, "pre_layrnorm", same),
        num_prefix_tokens=layout.num_prefix(model), blocks=[layer(block) for block in layout.blocks(model)],
        norm=getattr(tower, layout.final_norm) if layout.final_norm else same, fc_norm=same, head=head,
        attn_pool=getattr(tower, "head", None) if whole is None else None, global_pool="all",
    )  # fmt: skip
    if whole is not None and len(whole.heads) > 1:
        view.head, view.head_dist = (getattr(model, name) for name in whole.heads)
    return view


def _row(place: int | None) -> int:
    """The row of a token in the bias of BEiT: CLS first."""
    return 0 if place is None else place + 1


VIEWS["transformers"] = in_timm_words
