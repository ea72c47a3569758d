"""Bytes → tensors: the same code in the server, in training and in tests.

Every function is total over a batch: a bad item gets a status and blank tensors, and the
other items are not touched. Heavy libraries load when a preprocessor is made.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retrieval_contract.errors import ItemError, Reason
from retrieval_contract.release import ImageSpec, TextSpec
from retrieval_contract.tensors import Array

if TYPE_CHECKING:
    from PIL import Image

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_BYTES = 20_000_000
MAX_IMAGE_PIXELS = 80_000_000
"""A 8000 x 8000 photo passes; what a header claims beyond this is not decoded."""
MIN_IMAGE_SIDE = 8
"""Pixels; a smaller picture is a tracking dot, and would give a confident, wrong vector."""
PAD_STEP = 8
"""Token lengths are rounded up to this, so that concurrent requests have equal shapes."""


@dataclass(frozen=True)
class TextBatch:
    """`ids`, `mask`: int32 (batch, tokens); `present`: int32 (batch, 1); `status`: one a row."""

    ids: Array
    mask: Array
    present: Array
    status: list[str]


@dataclass(frozen=True)
class ImageBatch:
    """`pixels`: uint8 (batch, height, width, 3); `present`: int32 (batch, 1); `status`."""

    pixels: Array
    present: Array
    status: list[str]


def text_from_bytes(raw: bytes, max_chars: int) -> str:
    """Decode and clean one text: UTF-8, white space and control characters folded to a blank.

    Raises ItemError for bytes that are not UTF-8, for NUL, and past `max_chars` characters.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ItemError(
            Reason.NOT_UTF8, f"expected UTF-8 text, got byte {exc.start} that is not; convert it"
        ) from exc
    if "\0" in text:
        raise ItemError(Reason.NUL, "the text holds a NUL character; remove it")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(text) > max_chars:
        raise ItemError(
            Reason.TOO_LONG,
            f"expected at most {max_chars} characters, got {len(text)}; shorten it",
        )
    return text


class TextPreprocessor:
    """Texts → token ids, by a `tokenizer.json` and a TextSpec."""

    def __init__(self, tokenizer_json: str, spec: TextSpec, *, required: bool) -> None:
        """`required`: an empty text is refused (queries) instead of merely absent (titles)."""
        from tokenizers import Tokenizer

        self.spec = spec
        self.required = required
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(spec.max_tokens)

    def __call__(self, raw: Sequence[bytes]) -> TextBatch:
        texts, status = [], []
        for one in raw:
            text, problem = self._clean(one)
            texts.append(text)
            status.append(problem)
        rows = [list(e.ids) for e in self._tokenizer.encode_batch(texts)]
        present = np.array([[int(bool(t))] for t in texts], np.int32).reshape(-1, 1)
        # An absent text is all padding: its mask, not its ids, says that nothing is there.
        rows = [row if there else [] for row, there in zip(rows, present[:, 0], strict=True)]
        length = self._length(max(map(len, rows), default=0))
        ids = np.full((len(rows), length), self.spec.pad_id, np.int32)
        mask = np.zeros((len(rows), length), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return TextBatch(ids, mask, present, status)

    def _clean(self, raw: bytes) -> tuple[str, str]:
        try:
            text = text_from_bytes(raw, self.spec.max_chars)
            if self.required and not text:
                raise ItemError(Reason.EMPTY, "expected some text, got none; send a query")
        except ItemError as exc:
            return "", str(exc)
        return text, ""

    def _length(self, longest: int) -> int:
        if self.spec.pad_to == "max":
            return self.spec.max_tokens
        steps = max(1, -(-longest // PAD_STEP))
        return min(steps * PAD_STEP, self.spec.max_tokens)


class ImagePreprocessor:
    """Image files → pixels of the release's size, by an ImageSpec."""

    def __init__(self, spec: ImageSpec) -> None:
        from PIL import Image

        self.spec = spec
        self._resample = {
            "bilinear": Image.Resampling.BILINEAR,
            "bicubic": Image.Resampling.BICUBIC,
        }[spec.resample]

    def __call__(self, raw: Sequence[bytes]) -> ImageBatch:
        spec = self.spec
        pixels = np.empty((len(raw), spec.height, spec.width, 3), np.uint8)
        pixels[:] = np.array(spec.background, np.uint8)
        present = np.zeros((len(raw), 1), np.int32)
        status = [""] * len(raw)
        for i, one in enumerate(raw):
            if not one:
                continue
            try:
                pixels[i] = self.pixels(one)
                present[i] = 1
            except ItemError as exc:
                status[i] = str(exc)
        return ImageBatch(pixels, present, status)

    def pixels(self, raw: bytes) -> Array:
        """One image file → uint8 (height, width, 3); raises ItemError when it cannot be."""
        picture = open_image(raw, (self.spec.width, self.spec.height))
        return np.asarray(self._fit(picture))

    def _fit(self, picture: Image.Image) -> Image.Image:
        from PIL import Image

        spec = self.spec
        box = (spec.width, spec.height)
        if spec.fit == "squash":
            return picture.resize(box, self._resample)
        choose = max if spec.fit == "crop" else min
        scale = choose(box[0] / picture.width, box[1] / picture.height)
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        resized = picture.resize((size[0], size[1]), self._resample)
        canvas = Image.new("RGB", box, spec.background)
        canvas.paste(resized, ((box[0] - size[0]) // 2, (box[1] - size[1]) // 2))
        return canvas


@dataclass(frozen=True)
class ProductBatch:
    """The product tower's inputs by tensor name, and one status a row."""

    tensors: dict[str, Array]
    status: list[str]


class ProductPreprocessor:
    """(title, image file) → the product tower's inputs; a refused row has neither modality."""

    def __init__(self, tokenizer_json: str, title: TextSpec, image: ImageSpec) -> None:
        self.title = TextPreprocessor(tokenizer_json, title, required=False)
        self.image = ImagePreprocessor(image)

    def __call__(self, titles: Sequence[bytes], images: Sequence[bytes]) -> ProductBatch:
        text, picture = self.title(titles), self.image(images)
        status = [t or i for t, i in zip(text.status, picture.status, strict=True)]
        there = text.present | picture.present
        status = [
            s
            if s or flag
            else str(
                ItemError(Reason.NOTHING_TO_ENCODE, "expected a title or an image, got neither")
            )
            for s, flag in zip(status, there[:, 0], strict=True)
        ]
        # A bad picture beside a good title must not pass as a product without a picture.
        good = np.array([[int(not s)] for s in status], np.int32).reshape(-1, 1)
        tensors = {
            "title_ids": text.ids,
            "title_mask": text.mask * good,
            "has_title": text.present * good,
            "pixels": picture.pixels,
            "has_image": picture.present * good,
        }
        return ProductBatch(tensors, status)


def open_image(raw: bytes, at_least: tuple[int, int]) -> Image.Image:
    """Decode the first frame of an image file as upright RGB on white; the name is not asked.

    `at_least`: (width, height) in pixels that the caller will scale to; a JPEG is decoded at
    the smallest of its built-in scales that still covers it. Raises ItemError.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if len(raw) > MAX_IMAGE_BYTES:
        raise ItemError(
            Reason.IMAGE_TOO_LARGE,
            f"expected at most {MAX_IMAGE_BYTES} bytes, got {len(raw)}; shrink it",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning: the limit is ours
            picture = Image.open(io.BytesIO(raw), formats=IMAGE_FORMATS)
            _check_size(*picture.size)
            picture.draft("RGB", at_least)
            picture.load()
            return _on_white(ImageOps.exif_transpose(picture))
    except ItemError:
        raise
    except UnidentifiedImageError as exc:
        raise ItemError(
            Reason.IMAGE_FORMAT,
            f"expected {', '.join(IMAGE_FORMATS)}, got bytes that begin with {raw[:8].hex(' ')}; "
            "convert it",
        ) from exc
    except Image.DecompressionBombError as exc:
        raise ItemError(Reason.IMAGE_TOO_LARGE, f"{exc}; shrink it") from exc
    except Exception as exc:  # codecs raise many types on hostile bytes; all mean the same
        raise ItemError(Reason.IMAGE_BROKEN, f"cannot be decoded ({exc}); replace it") from exc


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise ItemError(
            Reason.IMAGE_TOO_LARGE,
            f"expected at most {MAX_IMAGE_PIXELS} pixels, got {width} x {height}; shrink it",
        )
    if min(width, height) < MIN_IMAGE_SIDE:
        raise ItemError(
            Reason.IMAGE_TOO_SMALL,
            f"expected at least {MIN_IMAGE_SIDE} pixels a side, got {width} x {height}; "
            "send no image instead",
        )


def _on_white(picture: Image.Image) -> Image.Image:
    """Any Pillow mode → RGB; transparency shows white, 16-bit greys keep their scale."""
    from PIL import Image

    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")
