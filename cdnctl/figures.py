"""Pictures that people look at: a map with its scale, two pictures side by side, a sheet of many.

Pillow draws them with the font that it brings along: no window system, no plotting package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from cdnctl.images import Image, Metadata, from_unit, to_unit

LEAST, MOST = 448, 2048  # pixels of a map's longer side: room for its text, and no more than seen
INK, PAPER = (30, 30, 30), (255, 255, 255)

FOR, AGAINST = np.array([0.85, 0.1, 0.1]), np.array([0.1, 0.25, 0.9])
STRONGEST = 0.85  # share of the colour at the end of the scale: what is below shows through
# Black over violet and orange to pale yellow, brighter with every step.
HEAT = np.array(
    [(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)]
)


@dataclass(frozen=True)
class Scale:
    """The key to a map: a line of text, a bar of colours, and what its ends and parts mean."""

    title: str
    bar: np.ndarray  # (1, n, 3), in [0, 1], from the lowest value to the highest
    ticks: Sequence[str]  # evenly spaced, from the lowest value to the highest
    unit: str


def evidence_colours(pixels: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Red for, blue against, over the gray picture.

    pixels: (H, W, C) in [0, 1]; amount: (H, W), clipped to [-1, 1]. (H, W, 3) in [0, 1].
    """
    gray = np.clip(pixels, 0, 1).mean(-1, keepdims=True).repeat(3, axis=-1) * 0.6 + 0.2
    share = STRONGEST * np.clip(np.abs(amount), 0, 1)[..., None]
    colour = np.where(amount[..., None] > 0, FOR, AGAINST)
    return (gray * (1 - share) + colour * share).astype(np.float32)


def heat_colours(amount: np.ndarray) -> np.ndarray:
    """Dark to bright for (H, W) in [0, 1], and clipped to it: (H, W, 3) in [0, 1]."""
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(amount, stops, HEAT[:, c] / 255) for c in range(3)]
    return np.stack(channels, -1).astype(np.float32)


def size_of_map(height: int, width: int) -> tuple[int, int]:
    """Height and width at which a map of a picture is drawn: small ones enlarged by a whole
    factor, large ones reduced."""
    longer = max(height, width)
    scale = MOST / longer if longer > MOST else max(1, LEAST // longer)
    return max(1, round(height * scale)), max(1, round(width * scale))


def fitted(image: Image, height: int, width: int) -> np.ndarray:
    """A picture at another size, float32 (height, width, 3) in [0, 1]; enlarged, its pixels stay
    squares."""
    picture = _rgb(image)
    grows = height > picture.height
    how = PIL.Image.Resampling.NEAREST if grows else PIL.Image.Resampling.BOX
    return to_unit(np.asarray(picture.resize((width, height), how)))


def resized(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """A smooth map (h, w) at another size, float32 (height, width)."""
    if values.shape == (height, width):
        return values.astype(np.float32)
    picture = PIL.Image.fromarray(values.astype(np.float32))
    return np.asarray(picture.resize((width, height), PIL.Image.Resampling.BICUBIC))


def with_scale(pixels: np.ndarray, scale: Scale) -> Image:
    """A map (H, W, 3) in [0, 1] with the key to it below."""
    drawn = PIL.Image.fromarray(from_unit(pixels, np.dtype(np.uint8)))
    width = max(drawn.width, LEAST)
    font = _font(width)
    line = _line(font)
    margin = line // 2
    sheet = PIL.Image.new("RGB", (width, drawn.height + 5 * line), PAPER)
    sheet.paste(drawn, ((width - drawn.width) // 2, 0))
    draw = PIL.ImageDraw.Draw(sheet)

    inside = width - 2 * margin
    top = drawn.height + margin
    draw.text((margin, top), _cut(scale.title, font, inside), INK, font)
    unit = _cut(scale.unit, font, inside)
    top += line + margin // 2
    bar = PIL.Image.fromarray(from_unit(scale.bar, np.dtype(np.uint8)))
    sheet.paste(bar.resize((inside, line * 3 // 4)), (margin, top))
    top += line
    for i, text in enumerate(scale.ticks):
        share = i / (len(scale.ticks) - 1)
        # The first begins with the bar and the last ends with it.
        draw.text((margin + share * (inside - font.getlength(text)), top), text, INK, font)
    top += line
    draw.text((margin, top), unit, INK, font)
    return Image(np.asarray(sheet))


def before_and_after(before: Image, after: Image) -> Image:
    """Two pictures of one size with their names above: side by side, wide ones one below the
    other. They keep the colour profile of the first."""
    pictures = [_rgb(before), _rgb(after)]
    height, width = pictures[0].height, pictures[0].width
    beside = width <= 2 * height
    font = _font(width * (1 + beside))
    head, gap = _line(font) * 3 // 2, max(2, width // 200)
    cell_width, cell_height = width + gap, height + head
    sheet = PIL.Image.new(
        "RGB",
        (cell_width + width, cell_height) if beside else (width, 2 * cell_height),
        PAPER,
    )
    draw = PIL.ImageDraw.Draw(sheet)
    for i, (picture, name) in enumerate(zip(pictures, ("before", "after"), strict=True)):
        left, top = (i * cell_width, 0) if beside else (0, i * cell_height)
        draw.text((left + head // 4, top + head // 8), _cut(name, font, width), INK, font)
        sheet.paste(picture, (left, top + head))
    icc = before.metadata.icc
    metadata = Metadata(icc=icc if before.samples.shape[2] == 3 else None)
    return Image(np.asarray(sheet), metadata=metadata)


def contact_sheet(
    columns: Sequence[str], rows: Mapping[str, Sequence[Image]], caption: str
) -> Image:
    """Crops in a table at their own size, one pixel a pixel: each column with its name above,
    each row with its own, and a caption below. It keeps the colour profile of the first."""
    crops = {name: [_rgb(image) for image in row] for name, row in rows.items()}
    first = next(iter(rows.values()))[0]
    width = max(crop.width for row in crops.values() for crop in row)
    font = _font(3 * width)
    line = _line(font)
    gap = line // 3
    heights = [line + row[0].height + gap for row in crops.values()]
    sheet = PIL.Image.new(
        "RGB", (len(columns) * (width + gap) + gap, sum(heights) + 2 * line + 3 * gap), PAPER
    )
    draw = PIL.ImageDraw.Draw(sheet)
    for i, name in enumerate(columns):
        draw.text((gap + i * (width + gap), gap), _cut(name, font, width), INK, font)
    top = line + gap
    for (name, row), height in zip(crops.items(), heights, strict=True):
        draw.text((gap, top), _cut(name, font, sheet.width - 2 * gap), INK, font)
        for i, crop in enumerate(row):
            sheet.paste(crop, (gap + i * (width + gap), top + line))
        top += height
    draw.text((gap, top + gap), _cut(caption, font, sheet.width - 2 * gap), INK, font)
    icc = first.metadata.icc if first.samples.shape[2] == 3 else None
    return Image(np.asarray(sheet), metadata=Metadata(icc=icc))


def gallery(cells: Sequence[tuple[str, Image]], columns: int | None = None) -> Image:
    """Pictures of one size with their names above, row by row; small ones are enlarged.

    columns: of the sheet; None: as many as make it about as wide as high. Without any name there
    is no room for one.
    """
    columns = columns or math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / columns)
    height, width = cells[0][1].samples.shape[:2]
    side = max(rows * height, columns * width)
    scale = MOST / side if side > MOST else max(1, MOST // 2 // side)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    font = _font(LEAST)
    named = any(name for name, _ in cells)
    gap = max(2, width // 40)
    head = _line(font) * 3 // 2 if named else gap
    sheet_height = rows * (height + head) - (0 if named else gap)
    sheet = PIL.Image.new("RGB", (columns * (width + gap) - gap, sheet_height), PAPER)
    draw = PIL.ImageDraw.Draw(sheet)
    for i, (name, image) in enumerate(cells):
        left, top = i % columns * (width + gap), i // columns * (height + head)
        if named:
            draw.text((left + head // 8, top + head // 8), _cut(name, font, width), INK, font)
            top += head
        picture = from_unit(fitted(image, height, width), np.dtype(np.uint8))
        sheet.paste(PIL.Image.fromarray(picture), (left, top))
    return Image(np.asarray(sheet))


def _rgb(image: Image) -> PIL.Image.Image:
    """8-bit RGB; what is transparent is white."""
    pixels = np.clip(image.pixels, 0, 1)
    if image.alpha is not None:
        pixels = 1 + (pixels - 1) * to_unit(image.alpha)[..., None]
    shape = (*pixels.shape[:2], 3)
    return PIL.Image.fromarray(from_unit(np.broadcast_to(pixels, shape), np.dtype(np.uint8)))


def _font(width: int) -> PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont:
    return PIL.ImageFont.load_default(min(max(width // 36, 13), 48))


def _line(font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont) -> int:
    """Height of a line of text, with the space to the next."""
    return round(1.2 * font.getbbox("Ágj")[3])


def _cut(
    text: str, font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont, width: float
) -> str:
    """As much of a text as fits."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…" if text else ""
