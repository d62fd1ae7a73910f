"""ViT of Hugging Face transformers, and families built on the same layers: DeiT, ViT-MSN, I-JEPA, ViT-MAE's encoder."""

from dataclasses import replace
from typing import Any

from ..foreign_macs import macs_per_row
from ..macs import Macs
from .hf.layout import IMAGENET, Layout, Whole, enter, first_token, mean_of_patches, own_pooler


def _pooler_macs(tower: Any, tokens: int) -> Macs:
    pooler = getattr(tower, "pooler", None)
    return Macs() if pooler is None else Macs(macs_per_row(pooler, tower.config.hidden_size))


VIT = Layout(
    package="vit",
    prefix="ViT",
    tower="ViTModel",
    wholes={"ViTForImageClassification": Whole("vit", first_token, "prefix")},
    dense={"ViTForMaskedImageModeling": "vit"},
    pool=own_pooler,
    pool_macs=_pooler_macs,
)
_BOTH = Whole("deit", first_token, "prefix", ("cls_classifier", "distillation_classifier"))

enter(VIT)
enter(
    replace(
        VIT,
        package="deit",
        prefix="DeiT",
        tower="DeiTModel",
        wholes={
            "DeiTForImageClassification": Whole("deit", first_token, "prefix"),
            "DeiTForImageClassificationWithTeacher": _BOTH,
        },
        dense={"DeiTForMaskedImageModeling": "deit"},
        prefix_tokens=2,
        stats=IMAGENET,
    )
)
enter(
    replace(
        VIT,
        package="vit_msn",
        prefix="ViTMSN",
        tower="ViTMSNModel",
        wholes={"ViTMSNForImageClassification": Whole("vit", first_token, "prefix")},
        dense={},
        stats=IMAGENET,
    )
)
enter(
    replace(
        VIT,
        package="ijepa",
        prefix="IJepa",
        tower="IJepaModel",
        wholes={"IJepaForImageClassification": Whole("ijepa", mean_of_patches, "tokens")},
        dense={},
        pool=mean_of_patches,
        pool_reads="tokens",
        prefix_tokens=0,
        has_cls=False,
        stats=IMAGENET,
    )
)
enter(
    replace(
        VIT,
        package="vit_mae",
        prefix="ViTMAE",
        tower="ViTMAEModel",
        wholes={},
        dense={"ViTMAEForPreTraining": "vit"},
        shuffled=True,
        entering=lambda config, patches: int(patches * (1 - config.mask_ratio)),
        stats=IMAGENET,
    )
)
