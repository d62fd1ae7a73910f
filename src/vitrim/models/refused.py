"""Models whose tokens cannot be reduced, by the module of their class, each with the reason.

A model of none of these modules, and of no adapter, is refused without a reason: nobody has looked at it yet.
"""

from torch import nn

_WINDOWS = "attention in windows needs the whole grid"
_POOLED = "keys and values are pooled over the grid, which needs every place of it"
_STAGES = "stages of several resolutions need the whole grid"
_CONVOLUTIONS = "convolutions between its blocks need the whole grid"
_MASK_UNITS = "attention in mask units and pooling between stages need the whole grid"
_SHRINKS = "stages shrink the grid, whose places give the attention bias"
_DETECTS = "it predicts a box at every patch"
_TOWER = "the blocks of this tower have no adapter yet"

REFUSED: dict[str, tuple[str, str]] = {
    # timm
    "timm.models.cait": ("CaiT", "talking heads mix attention maps, which fused attention does not give"),
    "timm.models.coat": ("CoaT", _CONVOLUTIONS),
    "timm.models.convit": ("ConViT", "gated attention mixes in a map of positions after softmax"),
    "timm.models.crossvit": ("CrossViT", "two branches see the image at two scales"),
    "timm.models.davit": ("DaViT", _WINDOWS),
    "timm.models.edgenext": ("EdgeNeXt", _STAGES),
    "timm.models.efficientformer": ("EfficientFormer", _STAGES),
    "timm.models.efficientformer_v2": ("EfficientFormer V2", _STAGES),
    "timm.models.efficientvit_mit": ("EfficientViT (MIT)", _STAGES),
    "timm.models.efficientvit_msra": ("EfficientViT (MSRA)", _WINDOWS),
    "timm.models.fastvit": ("FastViT", _STAGES),
    "timm.models.focalnet": ("FocalNet", _STAGES),
    "timm.models.gcvit": ("GC ViT", _WINDOWS),
    "timm.models.hiera": ("Hiera", _MASK_UNITS),
    "timm.models.hieradet_sam2": ("Hiera of SAM 2", _WINDOWS),
    "timm.models.levit": ("LeViT", _SHRINKS),
    "timm.models.maxxvit": ("MaxViT and CoAtNet", _WINDOWS),
    "timm.models.metaformer": ("MetaFormer", _STAGES),
    "timm.models.mlp_mixer": ("MLP-Mixer", "it mixes patches by weights for fixed places"),
    "timm.models.mobilevit": ("MobileViT", _STAGES),
    "timm.models.mvitv2": ("MViT v2", _POOLED),
    "timm.models.nest": ("NesT", _WINDOWS),
    "timm.models.nextvit": ("Next-ViT", _STAGES),
    "timm.models.pit": ("PiT", "pooling between stages needs the whole grid"),
    "timm.models.pvt_v2": ("PVT v2", _POOLED),
    "timm.models.swiftformer": ("SwiftFormer", _STAGES),
    "timm.models.swin_transformer": ("Swin", _WINDOWS),
    "timm.models.swin_transformer_v2": ("Swin V2", _WINDOWS),
    "timm.models.swin_transformer_v2_cr": ("Swin V2", _WINDOWS),
    "timm.models.tiny_vit": ("TinyViT", _WINDOWS),
    "timm.models.tnt": ("TNT", "every patch has tokens of its own, on a second level"),
    "timm.models.twins": ("Twins", _WINDOWS),
    "timm.models.vision_transformer_sam": ("SAM ViT", _WINDOWS),
    "timm.models.visformer": ("Visformer", _STAGES),
    "timm.models.volo": ("VOLO", "outlook attention unfolds the whole grid"),
    "timm.models.xcit": ("XCiT", "attention is between channels, and patches meet in convolutions over the grid"),
    # transformers
    "transformers.models.cvt": ("CvT", _CONVOLUTIONS),
    "transformers.models.dinat": ("DiNAT", "attention to neighbours on the grid needs all of it"),
    "transformers.models.clipseg": ("CLIPSeg", _TOWER),
    "transformers.models.donut": ("Donut Swin", _WINDOWS),
    "transformers.models.dpt": ("DPT", "its own ViT has no adapter; on a backbone, such as Dinov2Backbone, it can be"),
    "transformers.models.eomt": ("EoMT", "its queries enter among the patches, whose places its masks need"),
    "transformers.models.focalnet": ("FocalNet", _STAGES),
    "transformers.models.glpn": ("GLPN", _POOLED),
    "transformers.models.groupvit": ("GroupViT", "it groups its tokens itself"),
    "transformers.models.hiera": ("Hiera", _MASK_UNITS),
    "transformers.models.levit": ("LeViT", _SHRINKS),
    "transformers.models.lw_detr": ("LW-DETR ViT", _WINDOWS),
    "transformers.models.mobilevit": ("MobileViT", _STAGES),
    "transformers.models.mobilevitv2": ("MobileViT V2", _STAGES),
    "transformers.models.owlv2": ("OWLv2", _DETECTS),
    "transformers.models.owlvit": ("OWL-ViT", _DETECTS),
    "transformers.models.pixio": ("Pixio", _TOWER),
    "transformers.models.poolformer": ("PoolFormer", _STAGES),
    "transformers.models.pvt": ("PVT", _POOLED),
    "transformers.models.pvt_v2": ("PVT v2", _POOLED),
    "transformers.models.rf_detr": ("RF-DETR DINOv2", _WINDOWS),
    "transformers.models.sam": ("SAM", _WINDOWS),
    "transformers.models.sam2": ("SAM 2", _WINDOWS),
    "transformers.models.sam_hq": ("SAM-HQ", _WINDOWS),
    "transformers.models.sapiens2": ("Sapiens 2", _TOWER),
    "transformers.models.segformer": ("SegFormer", _POOLED),
    "transformers.models.swiftformer": ("SwiftFormer", _STAGES),
    "transformers.models.swin": ("Swin", _WINDOWS),
    "transformers.models.swin2sr": ("Swin2SR", _WINDOWS),
    "transformers.models.swinv2": ("Swin V2", _WINDOWS),
    "transformers.models.tipsv2": ("TIPS v2", _TOWER),
    "transformers.models.vitdet": ("ViTDet", _WINDOWS),
    "transformers.models.vitpose_backbone": ("ViTPose", _TOWER),
    "transformers.models.yolos": ("YOLOS", _TOWER),
}
"""Module of the class, or the package of that module -> (what people call it, why not)."""


def reason(model: nn.Module) -> tuple[str, str] | None:
    """What people call a model that cannot be reduced, and why not; None if it is not in the table."""
    for cls in type(model).__mro__:
        for module in (cls.__module__, cls.__module__.rpartition(".")[0]):
            if module in REFUSED:
                return REFUSED[module]
    return None
