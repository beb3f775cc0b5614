"""The demo's picture: one row of images a model, its name at the left, all from the same noise."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stepdistill.eval.images import to_pil, to_uint8
from stepdistill.run.files import write_bytes

SIDE, GAP, LABEL, INK, PAPER = 56, 8, 250, (28, 30, 34), (255, 255, 255)


def write_picture(path: Path, rows: Sequence[tuple[str, Tensor]]) -> None:
    """Write a PNG of rows (title, images [N, C, H, W] in [-1, 1]), N the same in each."""
    columns = len(rows[0][1])
    width = LABEL + columns * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (SIDE + GAP) + GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=20)
    for line, (title, images) in enumerate(rows):
        top = GAP + line * (SIDE + GAP)
        pen.text((2 * GAP, top + SIDE // 2), title, fill=INK, font=font, anchor="lm")
        for column, pixels in enumerate(to_uint8(images)):
            tile = to_pil(pixels).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(tile, (LABEL + column * (SIDE + GAP), top))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())
