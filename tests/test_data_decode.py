"""Decoding: any file gives the pixels that its makers meant, or one clear line, and never waits."""

import os
import socket
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vitrim.data.decode import decode, read_image, suffixes
from vitrim.errors import DataError

RAMP = np.linspace(0, 65535, 48, dtype=np.uint16).reshape(6, 8)
EIGHT = np.round(RAMP / 65535 * 255)


def stored(image: Image.Image, kind: str, **options: Any) -> BytesIO:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


def grey(file: BytesIO | Image.Image) -> np.ndarray:
    rgb, alone = (np.asarray(decode(file, mode, "it")) for mode in ("RGB", "L"))
    assert rgb.shape == (*alone.shape, 3)
    assert (rgb == alone[..., None]).all()
    return alone


def tiff(values: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1) -> BytesIO:
    """A TIFF file of one strip; Pillow cannot write these kinds itself."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2)
        packed = [(a >> 4, (a & 15) << 4 | b >> 8, b & 255) for a, b in pairs.tolist()]
        pixels = bytes(byte for triple in packed for byte in triple)
    else:
        pixels = values.tobytes()
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
        (277, 3, 1), (278, 4, height), (279, 4, len(pixels)), (339, 3, sample_format),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    header = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    return BytesIO(header + pixels + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind: str):
    found = grey(stored(Image.fromarray(RAMP), kind))
    assert np.abs(found.astype(int) - EIGHT).max() <= (1 if kind == "JPEG2000" else 0)
    assert (found.min(), found.max()) == (0, 255)


def test_sixteen_bits_in_memory_and_in_either_byte_order():
    for image in (Image.fromarray(RAMP), Image.fromarray(RAMP.astype(">u2"))):
        assert (grey(image) == EIGHT).all(), image.mode
    assert not grey(Image.fromarray(np.zeros_like(RAMP))).any()


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_opened_files_of_sixteen_bits_are_decoded_in_memory_too(kind: str):
    with Image.open(stored(Image.fromarray(RAMP), kind)) as image:
        assert (grey(image) == EIGHT).all()
    dark = Image.fromarray(RAMP // 300)  # A file says its range, so that a dark image is dark.
    assert grey(stored(dark, kind)).max() <= 1


def test_tiff_files_of_twelve_bits_and_negatives():
    assert np.abs(grey(tiff(RAMP >> 4, 12)) - EIGHT).max() <= 1
    assert (grey(tiff(RAMP, 16)) == EIGHT).all()
    assert (grey(tiff(RAMP, 16, photometric=0)) == 255 - EIGHT).all()


def test_floats_in_the_unit_interval_are_scaled():
    assert (grey(Image.fromarray((RAMP / 65535).astype(np.float32))) == EIGHT).all()


def test_twelve_bits_in_sixteen_are_scaled_as_the_message_says():
    image = Image.fromarray(RAMP >> 4)
    assert (abs(grey(Image.fromarray(np.asarray(image).astype(float) / 4095)).astype(int) - EIGHT) <= 1).all()
    assert (grey(Image.fromarray(RAMP // 8)) == (RAMP // 8 * 255.0 / 65535).round()).all()  # Dark, but in 13 bits.


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(RAMP.astype(np.float32)), "floating-point values are not all in"),
        (Image.fromarray(np.full((2, 2), np.nan, np.float32)), "floating-point values are not all in"),
        (Image.fromarray(RAMP.astype(np.int32)), "have no known range; .*astype"),
        (Image.fromarray(EIGHT.astype(np.int32)), "have no known range; .*astype"),
        (Image.fromarray(EIGHT.astype(np.uint8)).convert("I"), "have no known range; .*astype"),
        (Image.fromarray(EIGHT.astype(np.uint16)), "go up to 255 only, which is black.*in 8 bits, .*uint8"),
        (Image.fromarray(EIGHT.astype(">u2")), "go up to 255 only, which is black.*in 8 bits, .*uint8"),
        (Image.fromarray(RAMP >> 4), r"go up to 4095 only, which is black or nearly so; .*12 bits, .*float\) / 4095\)"),
        (Image.fromarray(RAMP >> 6), "go up to 1023 only, which is black or nearly so"),
        (Image.fromarray(EIGHT.astype(np.float32)), "floating-point values are not all in"),
        (Image.fromarray(RAMP.astype(np.int32) - 1), "have no known range"),
        (Image.fromarray(RAMP.astype(np.int32) * 9), "have no known range"),
        (tiff(RAMP.astype(np.int32), 32, sample_format=2), "have no known range"),
        (tiff(RAMP.astype(np.int16), 16, sample_format=2), "have no known range"),
    ],
    ids=[
        "float",
        "nan",
        "int32",
        "8 in 32",
        "L as I",
        "8 in 16",
        "8 in big",
        "12 in 16",
        "10 in 16",
        "8 in float",
        "negative",
        "large",
        "tiff32",
        "signed",
    ],
)
def test_pixels_of_unknown_range_are_refused(image: Any, reason: str):
    with pytest.raises(DataError, match=f"cannot read it: .*{reason}"):
        decode(image, "RGB", "it")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind: str, orientation: int):
    upright = Image.new("RGB", (24, 16), "white")
    upright.paste("red", (0, 0, 12, 8))  # Top left.
    turns = {
        1: (), 2: ("FLIP_LEFT_RIGHT",), 3: ("ROTATE_180",), 4: ("FLIP_TOP_BOTTOM",), 5: ("TRANSPOSE",),
        6: ("ROTATE_90",), 7: ("TRANSVERSE",), 8: ("ROTATE_270",),
    }  # fmt: skip
    as_stored = upright
    for turn in turns[orientation]:
        as_stored = as_stored.transpose(Image.Transpose[turn])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    found = decode(stored(as_stored, kind, exif=exif, **options), "RGB", "it")
    assert found.size == (24, 16)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(upright)).mean() < 3


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_data_do_not_hide_the_image():
    image = Image.new("RGB", (4, 4), "red")
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0", b"x"):
        assert decode(stored(image, "PNG", exif=exif), "RGB", "it").getpixel((1, 1)) == (255, 0, 0)


def half_transparent(mode: str) -> Image.Image | BytesIO:
    """Black, of which the left half is transparent."""
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 2))
    if mode == "tRNS of RGB":
        plain = Image.new("RGB", (4, 2))
        plain.paste((9, 9, 9), (0, 0, 2, 2))
        return stored(plain, "PNG", transparency=(9, 9, 9))
    if mode == "tRNS of L":
        plain = Image.new("L", (4, 2))
        plain.paste(9, (0, 0, 2, 2))
        return stored(plain, "PNG", transparency=9)
    if mode in ("GIF", "WEBP"):
        return stored(image, mode, **({"lossless": True} if mode == "WEBP" else {}))
    if mode == "P":
        palette = Image.new("P", (4, 2))
        palette.putpalette([7, 7, 7, 0, 0, 0])
        palette.paste(1, (2, 0, 4, 2))
        return stored(palette, "PNG", transparency=b"\x00\xff")
    return stored(image.convert(mode), "PNG")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "GIF", "WEBP", "tRNS of RGB", "tRNS of L"])
def test_transparent_pixels_are_shown_on_white(mode: str):
    found = grey(half_transparent(mode))
    assert (found[:, :2] == 255).all()
    assert (found[:, 2:] == 0).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_of_pillow_keep_their_colour(mode: str):
    colour = (200, 200, 200) if mode in ("L", "LA") else (255, 255, 255) if mode == "1" else (200, 30, 90)
    plain = Image.new("RGB", (8, 8), colour)
    image = plain.quantize() if mode == "P" else plain.convert(mode)  # Pillow converts to a fixed palette.
    assert np.abs(np.subtract(decode(image, "RGB", "it").getpixel((1, 1)), colour)).max() <= 3
    luminance = np.dot(colour, (0.299, 0.587, 0.114))
    assert decode(image, "L", "it").getpixel((1, 1)) == pytest.approx(luminance, abs=3)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (".png", "PNG"), (".jpg", "JPEG"), (".jpeg", "JPEG"), (".jpe", "JPEG"), (".jfif", "JPEG"), (".webp", "WEBP"),
        (".bmp", "BMP"), (".gif", "GIF"), (".tif", "TIFF"), (".tiff", "TIFF"), (".ppm", "PPM"), (".tga", "TGA"),
        (".jp2", "JPEG2000"),
    ],
)  # fmt: skip
def test_formats_are_read(suffix: str, kind: str, tmp_path: Path):
    assert suffix in suffixes()
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (16, 16), (250, 20, 20)).save(path, kind)
    assert np.abs(np.subtract(read_image(path, "RGB").getpixel((3, 3)), (250, 20, 20))).max() < 12


def test_an_animation_gives_its_first_frame(tmp_path: Path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
        red, green, blue = read_image(tmp_path / "a", "RGB").getpixel((1, 1))
        assert red > 240
        assert max(green, blue) < 15


@pytest.mark.parametrize("what", ["fifo", "socket", "device", "folder", "missing", "loop"])
def test_what_is_no_regular_file_is_refused_at_once(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.png"
    with socket.socket(socket.AF_UNIX) as listening:
        if what == "fifo":
            os.mkfifo(path)
        elif what == "socket":
            monkeypatch.chdir(tmp_path)  # Paths of sockets are short.
            listening.bind(path.name)
        elif what == "device":
            path.symlink_to("/dev/zero")
        elif what == "folder":
            path.mkdir()
        elif what == "loop":
            path.symlink_to(path)
        with pytest.raises(DataError, match=r"cannot read .*a\.png: "):
            read_image(path, "RGB")


def png_of(size: tuple[int, int]) -> BytesIO:
    """A PNG file whose header promises this size."""
    content = bytearray(stored(Image.new("L", (1, 1)), "PNG").getvalue())
    content[16:24] = struct.pack(">II", *size)
    import zlib

    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return BytesIO(content)


def test_decompression_bombs_are_refused():
    with pytest.raises(DataError, match=r"cannot read it: .*decompression bomb"):
        decode(png_of((60_000, 60_000)), "RGB", "it")
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "0" * 80_000_000, zip=True)
    with pytest.raises(DataError, match=r"cannot read it: .*too large"):
        decode(stored(Image.new("L", (1, 1)), "PNG", pnginfo=text), "RGB", "it")


def test_formats_that_start_programs_are_not_opened():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/x) (w) file\n%%EOF\n"
    with pytest.raises(DataError, match="not an image in a format that vitrim reads"):
        decode(BytesIO(eps), "RGB", "a.png")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a\nb"), struct.error("x" * 5000), MemoryError(), KeyError(3), Image.DecompressionBombError()],
    ids=lambda error: type(error).__name__,
)
def test_whatever_pillow_raises_takes_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(DataError, match=r"^cannot read it: \S") as refused:
        decode(BytesIO(), "RGB", "it")
    assert len(str(refused.value)) < 300
    assert "\n" not in str(refused.value)
