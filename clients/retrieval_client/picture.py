"""Results as one picture: a row a query, the found photos with title and score."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from retrieval_client.records import Hit

CELL_PX = (150, 230)
PHOTO_PX = (130, 150)
QUERY_PX = 190
MARGIN_PX = 10
INK, FAINT, PAPER, EMPTY = "#1b1f24", "#6b7280", "#ffffff", "#eef0f2"


def draw_results(queries: Sequence[str], results: Sequence[Sequence[Hit]], path: Path) -> None:
    """Write a PNG; hits need their thumbnails, one that has none gets an empty frame."""
    columns = max((len(hits) for hits in results), default=0)
    width = QUERY_PX + columns * CELL_PX[0] + 2 * MARGIN_PX
    page = Image.new("RGB", (width, len(queries) * CELL_PX[1] + 2 * MARGIN_PX), PAPER)
    draw = ImageDraw.Draw(page)
    for row, (query, hits) in enumerate(zip(queries, results, strict=True)):
        top = MARGIN_PX + row * CELL_PX[1]
        if row:
            draw.line([(MARGIN_PX, top - 5), (width - MARGIN_PX, top - 5)], fill=EMPTY, width=2)
        _text(draw, query, (MARGIN_PX, top + 50), QUERY_PX - 20, 19, INK, lines=5)
        for column, hit in enumerate(hits):
            _draw_hit(page, draw, hit, (QUERY_PX + MARGIN_PX + column * CELL_PX[0], top))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def _draw_hit(page: Image.Image, draw: ImageDraw.ImageDraw, hit: Hit, at: tuple[int, int]) -> None:
    x, y = at
    if photo := _photo(hit.thumbnail):
        scale = min(PHOTO_PX[0] / photo.width, PHOTO_PX[1] / photo.height)
        size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
        photo = photo.resize(size, Image.Resampling.LANCZOS)
        page.paste(photo, (x + (PHOTO_PX[0] - size[0]) // 2, y + PHOTO_PX[1] - size[1]))
    else:
        draw.rectangle([x, y, x + PHOTO_PX[0], y + PHOTO_PX[1]], fill=EMPTY)
        _text(draw, "no photo", (x + 35, y + 65), PHOTO_PX[0], 13, FAINT, lines=1)
    _text(draw, f"{hit.score:.3f}", (x, y + PHOTO_PX[1] + 6), PHOTO_PX[0], 12, FAINT, lines=1)
    _text(draw, hit.title or hit.id, (x, y + PHOTO_PX[1] + 22), PHOTO_PX[0], 12, INK, lines=3)


def _photo(thumbnail: bytes) -> Image.Image | None:
    """None where there is none that can be read."""
    try:
        return Image.open(io.BytesIO(thumbnail)).convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None


def _text(
    draw: ImageDraw.ImageDraw,
    text: str,
    at: tuple[int, int],
    width: int,
    size: int,
    ink: str,
    lines: int,
) -> None:
    """Words wrapped to `width` pixels, at most `lines` lines, the rest as an ellipsis."""
    font = ImageFont.load_default(size)
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if wrapped[-1] and draw.textlength(longer, font) > width:
            wrapped.append(word)
        else:
            wrapped[-1] = longer
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1] + "…"]
    draw.multiline_text(at, "\n".join(wrapped), fill=ink, font=font, spacing=3)
