"""Arrange pictures on a sheet, with captions and a heading."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

PAPER, INK, FAINT = (255, 255, 255), (24, 26, 31), (110, 114, 124)
_MARGIN, _GAP, _LINE = 20, 12, 20
_COLUMNS = 7


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet with its caption; `swatch` is the colour of a fused token."""

    picture: Image.Image
    title: str = ""
    note: str = ""
    swatch: Colour | None = None


def wrap_rows(tiles: list[Tile], heat: list[Tile | None]) -> list[list[Tile]]:
    """The tiles of one image in rows, each heat map below its cut."""
    rows: list[list[Tile]] = []
    columns = ceil(len(tiles) / ceil(len(tiles) / _COLUMNS))
    for start in range(0, len(tiles), columns):
        part = slice(start, start + columns)
        rows += [tiles[part], *_heat_row(tiles[part], heat[part])]
    return rows


def montage_rows(name: str, tiles: list[Tile], heat: list[Tile | None], first: bool) -> list[list[Tile]]:
    """The tiles of one image as a row of a montage; only the first row names the cuts."""
    row = [Tile(tiles[0].picture, tiles[0].title if first else "", name.rpartition("/")[2])]
    row += tiles[1:] if first else [Tile(t.picture, "", "fused" if t.swatch else "", t.swatch) for t in tiles[1:]]
    return [row, *_heat_row(tiles, heat)]


def _heat_row(tiles: Sequence[Tile], heat: Sequence[Tile | None]) -> list[list[Tile]]:
    if not any(heat):
        return []
    size = tiles[0].picture.size
    return [[tile or Tile(Image.new("RGB", size, "white")) for tile in heat]]


def sheet(rows: Sequence[Sequence[Tile]], heading: str = "", subheading: str = "") -> Image.Image:
    """Tiles in rows, each with its caption above it, under a heading."""
    columns = max(len(row) for row in rows)
    widths = [max(row[at].picture.width for row in rows if at < len(row)) for at in range(columns)]
    heights = [(_caption_height(row), max(tile.picture.height for tile in row)) for row in rows]
    top = _MARGIN + (26 if heading else 0) + (_LINE if subheading else 0) + (8 if heading or subheading else 0)
    size = (
        2 * _MARGIN + sum(widths) + _GAP * (columns - 1),
        top + sum(caption + height for caption, height in heights) + _GAP * (len(rows) - 1) + _MARGIN,
    )
    page = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(page)
    room = size[0] - 2 * _MARGIN
    _write(pen, (_MARGIN, _MARGIN - 4), heading, 18, True, INK, room)
    _write(pen, (_MARGIN, top - 8 - _LINE), subheading, 13, False, FAINT, room)
    for row, (caption, height) in zip(rows, heights, strict=True):
        left = _MARGIN
        for tile, width in zip(row, widths, strict=False):
            _caption(pen, (left, top), tile, caption, width)
            page.paste(tile.picture, (left, top + caption))
            left += width + _GAP
        top += caption + height + _GAP
    return page


def _caption_height(row: Sequence[Tile]) -> int:
    lines = any(tile.title for tile in row) + any(tile.note or tile.swatch for tile in row)
    return lines * _LINE + (4 if lines else 0)


def _caption(pen: ImageDraw.ImageDraw, at: tuple[int, int], tile: Tile, height: int, width: int) -> None:
    left, bottom = at[0], at[1] + height - 4
    if tile.title:
        _write(pen, (left, at[1]), tile.title, 14, True, INK, width)
    end = left + _write(pen, (left, bottom - _LINE), tile.note, 13, False, FAINT, width)
    if tile.swatch is not None:
        box = (end + 6, bottom - _LINE + 2, end + 18, bottom - _LINE + 14)
        pen.rounded_rectangle(box, 3, fill=tile.swatch, outline=FAINT)


def _write(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, bold: bool, colour: Colour, room: int
) -> int:
    """Write one line, shortened in the middle to fit; returns its width in pixels."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    font = _font(size, bold)
    shown, keep = text, len(text)
    while keep > 1 and font.getlength(shown) > room:
        keep -= 1
        shown = text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :]
    pen.text(at, shown, fill=colour, font=font)
    return round(font.getlength(shown))


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
