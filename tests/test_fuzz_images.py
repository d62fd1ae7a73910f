"""Altered image files: each is decoded to 8-bit pixels or refused in one line."""

import random
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fuzzing import altered_bytes, fuzz
from vitrim.data.decode import decode
from vitrim.data.folder import FolderImages
from vitrim.data.specs import DataSpec
from vitrim.data.splits import plain_stream
from vitrim.models import build_model

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged metadata; the tests run under errors.


@cache
def files() -> list[bytes]:
    """Small images in every format and many of their modes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    rgb = Image.radial_gradient("L").resize((24, 16)).convert("RGB")
    alpha = rgb.copy()
    alpha.putalpha(Image.linear_gradient("L").resize((24, 16)))
    deep = Image.fromarray(np.linspace(0, 65535, 24 * 16, dtype=np.uint16).reshape(16, 24))
    frames = {"frames": 3}
    kinds = [
        (rgb, "PNG", {"exif": exif}), (alpha, "PNG", {}), (alpha.convert("LA"), "PNG", {}), (deep, "PNG", {}),
        (rgb.quantize(9), "PNG", {"transparency": b"\x00\x80"}), (rgb.convert("1"), "PNG", {}), (rgb, "PNG", frames),
        (rgb, "JPEG", {"exif": exif}), (rgb, "JPEG", {"progressive": True}), (rgb.convert("CMYK"), "JPEG", {}),
        (rgb.convert("L"), "JPEG", {"comment": b"x" * 50}), (rgb, "MPO", frames),
        (alpha, "WEBP", {"exif": exif}), (rgb, "WEBP", {"lossless": True}), (rgb, "WEBP", frames),
        (rgb.quantize(9), "GIF", {"transparency": 3}), (rgb, "GIF", frames),
        (rgb, "BMP", {}), (rgb.quantize(9), "BMP", {}), (rgb.convert("1"), "DIB", {}), (alpha, "BMP", {}),
        (rgb, "TIFF", {"exif": exif}), (deep, "TIFF", {}), (rgb, "TIFF", {"compression": "tiff_lzw"}),
        (rgb, "TIFF", {"compression": "jpeg"}), (rgb.convert("1"), "TIFF", {"compression": "group4"}),
        (rgb.convert("CMYK"), "TIFF", {"compression": "tiff_adobe_deflate"}), (rgb.convert("F"), "TIFF", {}),
        (rgb, "TIFF", frames), (rgb.convert("LAB"), "TIFF", {}),
        (rgb, "PPM", {}), (deep, "PPM", {}), (rgb.convert("1"), "PPM", {}), (rgb.convert("F"), "PPM", {}),
        (rgb, "TGA", {"compression": "tga_rle"}), (alpha, "TGA", {}), (rgb, "JPEG2000", {}), (deep, "JPEG2000", {}),
    ]  # fmt: skip
    if "AVIF" in Image.SAVE:
        kinds.append((alpha, "AVIF", {"exif": exif}))
    found = []
    for image, kind, options in kinds:
        buffer = BytesIO()
        if options == frames:
            options = {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}
        image.copy().save(buffer, kind, **options)  # Saving leaves settings of the format on the image.
        found.append(buffer.getvalue())
    return found


def test_altered_image_files_are_decoded_or_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # Small, so that none of them costs a second.

    def decode_one(rng: random.Random) -> None:
        mode = rng.choice(("RGB", "L"))
        found = decode(BytesIO(altered_bytes(rng.choice(files()), rng)), mode, "a.png")
        assert found.mode == mode
        assert min(found.size) > 0
        assert np.asarray(found).dtype == np.uint8

    outcomes = fuzz(decode_one)
    assert not outcomes or min(outcomes["accepted"], outcomes["refused"]) > 0.1 * sum(outcomes.values())


def test_folders_of_altered_files_are_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    model = build_model("vitrim_digits_vit", depth=1, embed_dim=24, num_heads=2)
    names = (
        "a.png",
        "b.JPG",
        "c.gif",
        "d",
        "e.txt",
        ".f.png",
        "g\n.png",
        "h\x1b[31m.tif",
        "i" * 200 + ".bmp",
        "²1.jpe",
    )
    count = iter(range(10**9))

    def read_one(rng: random.Random) -> None:
        root = tmp_path / str(next(count))
        for label in rng.sample(("x", "X", ".y", "1²", "z\n"), 2):
            (root / "test" / label).mkdir(parents=True)
            for name in rng.sample(names, 3):
                (root / "test" / label / name).write_bytes(altered_bytes(rng.choice(files()), rng))
        assert len(FolderImages(root / "test")) > 0
        stream = plain_stream(model, DataSpec(name="folder", root=str(root), on_corrupt="skip"))
        assert all(image.shape == (1, 8, 8) and image.isfinite().all() for image, *_ in stream)

    fuzz(read_one, count=60)
