"""Bytes → tensors: the same code in the server, in training and in tests.

Every function is total over a batch: a bad item gets a status and blank tensors, and the
other items are not touched. Heavy libraries load when a preprocessor is made.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
MAX_JPEG_SCANS = 64
"""Cameras and tools write one, or some ten when progressive."""
MIN_IMAGE_SIDE = 8
"""Pixels; a smaller picture is a tracking dot, and would give a confident, wrong vector."""
EXIF_ORIENTATION = 0x0112
MAX_ASPECT = 8
"""Of what a crop can show: more of a long picture is cut off before scaling, not after."""
STRIP_ROWS = 256
"""Transparent pictures are laid on white in strips: a whole second picture is much memory."""
MAX_BYTES_PER_CHAR = 16
"""Texts beyond this many bytes per allowed character are refused unread, white space or not."""
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


def one_spelling(text: str) -> str:
    """White space and control characters folded to single blanks, none at the ends.

    A client may do it as well: a text so spelt is one key of a cache, and has the same vector.
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def text_from_bytes(raw: bytes, max_chars: int) -> str:
    """Decode and clean one text: UTF-8, white space and control characters folded to a blank.

    Raises ItemError for bytes that are not UTF-8, for NUL, and past `max_chars` characters.
    """
    if len(raw) > max_chars * MAX_BYTES_PER_CHAR:
        raise ItemError(
            Reason.TOO_LONG,
            f"expected at most {max_chars} characters, got {len(raw)} bytes; shorten it",
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ItemError(
            Reason.NOT_UTF8, f"expected UTF-8 text, got byte {exc.start} that is not; convert it"
        ) from exc
    if "\0" in text:
        raise ItemError(Reason.NUL, "the text holds a NUL character; remove it")
    text = one_spelling(text)
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
        # An absent text is all padding: its mask, not its ids, says that nothing is there.
        rows = self._tokenize(texts, status)
        if self.required:
            nothing = str(ItemError(Reason.EMPTY, "expected some text, got none; send a query"))
            status = [s if s or row else nothing for s, row in zip(status, rows, strict=True)]
        present = np.array([[int(bool(row))] for row in rows], np.int32).reshape(-1, 1)
        length = self._length(max(map(len, rows), default=0))
        ids = np.full((len(rows), length), self.spec.pad_id, np.int32)
        mask = np.zeros((len(rows), length), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return TextBatch(ids, mask, present, status)

    def _clean(self, raw: bytes) -> tuple[str, str]:
        try:
            return text_from_bytes(raw, self.spec.max_chars), ""
        except ItemError as exc:
            return "", str(exc)

    def _tokenize(self, texts: list[str], status: list[str]) -> list[list[int]]:
        """Token ids, none where the tokenizer finds nothing; `status` gets what it fails at."""
        try:
            return [_ids(e) for e in self._tokenizer.encode_batch(texts)]
        except Exception:  # such as a word that a tokenizer without an unknown token has not
            return [self._tokenize_alone(i, text, status) for i, text in enumerate(texts)]

    def _tokenize_alone(self, row: int, text: str, status: list[str]) -> list[int]:
        try:
            return _ids(self._tokenizer.encode(text))
        except Exception as exc:
            status[row] = status[row] or _internal("the tokenizer", exc)
            return []

    def _length(self, longest: int) -> int:
        if self.spec.pad_to == "max":
            return self.spec.max_tokens
        steps = max(1, -(-longest // PAD_STEP))
        return min(steps * PAD_STEP, self.spec.max_tokens)


def _ids(encoding: Any) -> list[int]:
    """Its token ids; none when all of them are special, as of a text of lone accents."""
    return [] if all(encoding.special_tokens_mask) else list(encoding.ids)


def _internal(what: str, exc: Exception) -> str:
    """The status of an item that broke our own code: it is alone in that."""
    return str(ItemError(Reason.INTERNAL, f"{what} failed ({type(exc).__name__}: {exc})"))


class ImagePreprocessor:
    """Image files → pixels of the release's size, by an ImageSpec."""

    def __init__(self, spec: ImageSpec) -> None:
        from PIL import Image

        self.spec = spec
        self.on_picture: Callable[[], None] | None = None
        """Told after each."""
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
            except Exception as exc:
                status[i] = _internal("scaling", exc)
            if self.on_picture:
                self.on_picture()
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
        if spec.fit == "crop":
            return self._middle(picture, box)
        scale = min(box[0] / picture.width, box[1] / picture.height)
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        resized = picture.resize((size[0], size[1]), self._resample)
        canvas = Image.new("RGB", box, spec.background)
        canvas.paste(resized, ((box[0] - size[0]) // 2, (box[1] - size[1]) // 2))
        return canvas

    def _middle(self, picture: Image.Image, box: tuple[int, int]) -> Image.Image:
        """Cover the box and keep its middle; whole pixels as the CLIP family's processors count."""
        scale = max(box[0] / picture.width, box[1] / picture.height)
        picture = _without_ends(picture, box[0] / scale, box[1] / scale)
        # The side that needs the larger scale fits the box exactly, the other overhangs.
        side = 0 if box[0] * picture.height >= box[1] * picture.width else 1
        width, height = (length * box[side] // picture.size[side] for length in picture.size)
        left, top = (width - box[0]) // 2, (height - box[1]) // 2
        resized = picture.resize((width, height), self._resample)
        return resized.crop((left, top, left + box[0], top + box[1]))


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
    from PIL import Image, UnidentifiedImageError

    if len(raw) > MAX_IMAGE_BYTES:
        raise ItemError(
            Reason.IMAGE_TOO_LARGE,
            f"expected at most {MAX_IMAGE_BYTES} bytes, got {len(raw)}; shrink it",
        )
    # A scan of a progressive JPEG repaints the whole picture for some hundred bytes.
    if raw.startswith(b"\xff\xd8") and (scans := raw.count(b"\xff\xda")) > MAX_JPEG_SCANS:
        raise ItemError(
            Reason.IMAGE_TOO_LARGE,
            f"expected at most {MAX_JPEG_SCANS} JPEG scans, got {scans}; save it again",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning: the limit is ours
            picture = Image.open(io.BytesIO(raw), formats=IMAGE_FORMATS)
            _check_size(*picture.size)
            picture.draft("RGB", at_least)
            picture.load()
            return _on_white(_upright(picture))
    except ItemError:
        raise
    except UnidentifiedImageError as exc:
        if raw.startswith((b"\xff\xd8", b"\x89PNG")) or raw[8:12] == b"WEBP":
            raise ItemError(
                Reason.IMAGE_BROKEN, "its header is damaged or cut short; replace it"
            ) from exc
        raise ItemError(
            Reason.IMAGE_FORMAT,
            f"expected {', '.join(IMAGE_FORMATS)}, got bytes that begin with {raw[:8].hex(' ')}; "
            "convert it",
        ) from exc
    except Image.DecompressionBombError as exc:
        raise ItemError(
            Reason.IMAGE_TOO_LARGE, f"expected at most {MAX_IMAGE_PIXELS} pixels ({exc}); shrink it"
        ) from exc
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


def _without_ends(picture: Image.Image, wide: float, high: float) -> Image.Image:
    """Cut off what lies far from the middle `wide` x `high` pixels; few pictures have any."""
    left = max(0, int(picture.width - MAX_ASPECT * wide) // 2)
    top = max(0, int(picture.height - MAX_ASPECT * high) // 2)
    if not left and not top:
        return picture
    return picture.crop((left, top, picture.width - left, picture.height - top))


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as EXIF says; a broken EXIF block says nothing against the pixels.

    Pillow's own `exif_transpose` also writes the block anew, and fails where that fails.
    """
    from PIL.Image import Transpose

    turns: dict[Any, Transpose] = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(picture.getexif().get(EXIF_ORIENTATION))
    except Exception:
        return picture
    return picture if turn is None else picture.transpose(turn)


def _on_white(picture: Image.Image) -> Image.Image:
    """Any Pillow mode → RGB; transparency shows white, 16-bit greys keep their scale."""
    from PIL import Image

    if picture.mode.startswith("I;16"):
        deep = np.asarray(picture)
        grey = (deep >> 8).astype(np.uint8)
        grey[deep == picture.info.get("transparency", -1)] = 255
        picture = Image.fromarray(grey)
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    canvas = Image.new("RGB", picture.size)
    for top in range(0, picture.height, STRIP_ROWS):
        box = (0, top, picture.width, min(top + STRIP_ROWS, picture.height))
        strip = picture.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        canvas.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    return canvas
