"""The port: what other rooms may ask about any model, whoever made it."""

import timm

from vitrim.models.input_format import InputFormat


def test_input_format_keeps_how_evaluation_fits_images_in() -> None:
    squash = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, pretrained_cfg_overlay={"crop_mode": "squash"}
    )
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    assert InputFormat.of(squash).crop_mode == "squash"
    assert InputFormat.of(plain).crop_mode == "center"
