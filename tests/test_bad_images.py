"""Bad and odd image files: refused by row with a reason, or decoded to the right pixels."""

from __future__ import annotations

import io
import random
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from deploy.server import Server
from retrieval_contract.errors import Reason
from retrieval_contract.preprocess import MAX_IMAGE_BYTES, ImagePreprocessor
from retrieval_contract.release import ImageSpec
from tests.conftest import photo
from tests.hostile import SERVED, Wire, chunk, cosine, memory_growth, png

SPEC = ImageSpec(160, 128, (127.0,) * 3, (128.0,) * 3)
SIDE = 8000
Fit = Literal["pad", "crop", "squash"]
FINE = {"quality": 98, "subsampling": 0}
"""JPEG at which colours stay what they were."""
TURNS = {  # EXIF orientation → how to store an upright picture under it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def scene(seed: int = 0, size: tuple[int, int] = (192, 240)) -> Image.Image:
    """A smooth picture of many colours, like no other seed's and unlike itself when turned."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
    return blocks.resize(size, Image.Resampling.BICUBIC)


def file_of(picture: Image.Image, format: str, **save: object) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, format, **save)
    return buffer.getvalue()


def frames(format: str) -> bytes:
    """An animation whose first frame is scene 0."""
    return file_of(scene(), format, save_all=True, append_images=[scene(1)], lossless=True)


def turned(format: str, orientation: int, **save: object) -> bytes:
    """Scene 0, stored turned, with the EXIF note that says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_of(scene().transpose(TURNS[orientation]), format, exif=exif, **save)


def with_broken_exif(orientation: int) -> bytes:
    """A good JPEG whose EXIF block has an orientation, and a tag that is not what it says."""
    entries = struct.pack(">HHHIHH", 2, 0x0112, 3, 1, orientation, 0)
    entries += struct.pack(">HHII", 0x011A, 10, 1, 0xFFFFFFFF)  # a rational past the end
    block = b"Exif\0\0MM\0*" + struct.pack(">I", 8) + entries + b"\0" * 4
    return file_of(scene(), "JPEG", **FINE, exif=block)


def deep_grey(*extra: bytes) -> bytes:
    """A 16-bit grey PNG: black to white from left to right, its low bytes full of noise."""
    row = b"".join(bytes((x, x * 37 % 256)) for x in range(256))
    return png(256, 320, (b"\0" + row) * 320, *extra, depth=16)


def half_clear() -> Image.Image:
    """Scene 0, its left half fully transparent."""
    picture = scene().convert("RGBA")
    picture.paste((9, 200, 9, 0), (0, 0, 96, 240))
    return picture


def half_white() -> Image.Image:
    picture = scene()
    picture.paste("white", (0, 0, 96, 240))
    return picture


def palette() -> Image.Image:
    return scene().quantize(64)


def endless_scans() -> bytes:
    """A small progressive JPEG whose last scan comes a hundred times: hours, at full size."""
    whole = file_of(scene(), "JPEG", progressive=True)
    start = whole.rindex(b"\xff\xda")
    return whole[:start] + whole[start:-2] * 100 + whole[-2:]


BOMB = png(50_000, 50_000, b"\0" * 50_001)
SERVED_AS: dict[str, tuple[Callable[[], bytes], Callable[[], Image.Image]]] = {
    "png": (lambda: file_of(scene(), "PNG"), scene),
    "webp": (lambda: file_of(scene(), "WEBP", lossless=True), scene),
    "animated_webp_shows_its_first_frame": (lambda: frames("WEBP"), scene),
    "apng_shows_its_first_frame": (lambda: frames("PNG"), scene),
    "transparency_on_white": (lambda: file_of(half_clear(), "PNG"), half_white),
    "transparent_webp_on_white": (
        lambda: file_of(half_clear(), "WEBP", lossless=True),
        half_white,
    ),
    "palette": (lambda: file_of(palette(), "PNG"), lambda: palette().convert("RGB")),
    "grey_with_alpha": (
        lambda: file_of(half_clear().convert("LA"), "PNG"),
        lambda: half_white().convert("L").convert("RGB"),
    ),
    "16_bit_grey": (
        deep_grey,
        lambda: Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (320, 1))),
    ),
    "16_bit_grey_with_a_clear_level": (
        lambda: deep_grey(chunk(b"tRNS", bytes((0, 0)))),
        lambda: Image.fromarray(np.tile(np.r_[255, 1:256].astype(np.uint8), (320, 1))),
    ),
    "1_bit": (
        lambda: file_of(scene().convert("1"), "PNG"),
        lambda: scene().convert("1").convert("RGB"),
    ),
    "png_without_its_end": (lambda: file_of(scene(), "PNG")[:-12], scene),
    **{
        f"exif_{o}_{f.lower()}": (partial(turned, f, o, lossless=True), scene)
        for f in ("PNG", "WEBP")
        for o in TURNS
    },
}
CLOSE_TO: dict[str, tuple[Callable[[], bytes], Image.Image]] = {
    "jpeg": (lambda: file_of(scene(), "JPEG", **FINE), scene()),
    "progressive_jpeg": (lambda: file_of(scene(), "JPEG", **FINE, progressive=True), scene()),
    "cmyk_jpeg": (lambda: file_of(scene().convert("CMYK"), "JPEG", **FINE), scene()),
    "grey_jpeg": (lambda: file_of(scene().convert("L"), "JPEG", **FINE), scene().convert("L")),
    "two_pictures_in_one_jpeg": (
        lambda: file_of(scene(), "MPO", save_all=True, append_images=[scene(1)], **FINE),
        scene(),
    ),
    "bytes_after_the_end": (lambda: file_of(scene(), "JPEG", **FINE) + b"more", scene()),
    "broken_exif": (lambda: with_broken_exif(1), scene()),
    "broken_exif_turned": (lambda: with_broken_exif(3), scene().rotate(180)),
    **{f"exif_{o}_jpeg": (partial(turned, "JPEG", o, **FINE), scene()) for o in TURNS},
}
REFUSED: dict[str, tuple[Callable[[], bytes], Reason]] = {
    "truncated_jpeg": (lambda: photo()[:600], Reason.IMAGE_BROKEN),
    "jpeg_header_only": (lambda: photo()[:20], Reason.IMAGE_BROKEN),
    "truncated_png": (lambda: file_of(scene(), "PNG")[:9000], Reason.IMAGE_BROKEN),
    "png_header_only": (lambda: photo(format="PNG")[:20], Reason.IMAGE_BROKEN),
    "truncated_webp": (lambda: photo(format="WEBP")[:100], Reason.IMAGE_BROKEN),
    "png_with_a_flipped_bit": (
        lambda: photo(format="PNG").replace(b"IDAT", b"IDAT\x01", 1),
        Reason.IMAGE_BROKEN,
    ),
    "text_chunk_bomb": (
        lambda: png(
            16,
            16,
            b"\0" * 17 * 16,
            chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 100_000_000)),
        ),
        Reason.IMAGE_BROKEN,
    ),
    "endless_scans": (endless_scans, Reason.IMAGE_TOO_LARGE),
    "1x1": (lambda: photo(size=(1, 1), format="PNG"), Reason.IMAGE_TOO_SMALL),
    "7_high": (lambda: photo(size=(500, 7)), Reason.IMAGE_TOO_SMALL),
    "gif": (lambda: photo(mode="P", format="GIF"), Reason.IMAGE_FORMAT),
    "bmp": (lambda: photo(format="BMP"), Reason.IMAGE_FORMAT),
    "tiff": (lambda: photo(format="TIFF"), Reason.IMAGE_FORMAT),
    "html": (lambda: b"<!doctype html><title>404 Not Found</title>" * 20, Reason.IMAGE_FORMAT),
    "svg": (
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        Reason.IMAGE_FORMAT,
    ),
    "zeros": (lambda: b"\0" * 4096, Reason.IMAGE_FORMAT),
    "one_byte": (lambda: b"\xff", Reason.IMAGE_FORMAT),
    "over_20_megabytes": (
        lambda: photo() + b"\0" * MAX_IMAGE_BYTES,
        Reason.IMAGE_TOO_LARGE,
    ),
    "bomb_50000x50000": (lambda: BOMB, Reason.IMAGE_TOO_LARGE),
    "9000x9000": (lambda: png(9000, 9000, b"\0" * 9001), Reason.IMAGE_TOO_LARGE),
}


@pytest.fixture(scope="module")
def wire(triton: Server) -> Iterator[Wire]:
    with Wire(triton) as connected:
        yield connected


@pytest.mark.parametrize("name", SERVED_AS)
def test_lossless_files_give_the_vector_of_their_picture(wire: Wire, name: str) -> None:
    make, picture = SERVED_AS[name]
    got, expected = wire.image(make()), wire.image(file_of(picture(), "PNG"))
    assert (got.outcome, expected.outcome) == (SERVED, SERVED)
    np.testing.assert_allclose(got.vector, expected.vector, atol=1e-5)
    assert cosine(got.vector, wire.image(file_of(scene(1), "PNG")).vector) < 0.95


@pytest.mark.parametrize("name", CLOSE_TO)
def test_lossy_files_give_nearly_the_vector_of_their_picture(wire: Wire, name: str) -> None:
    make, picture = CLOSE_TO[name]
    file, plain = make(), file_of(picture, "PNG")
    got = wire.image(file)
    assert got.outcome == SERVED
    same = cosine(got.vector, wire.image(plain).vector)
    assert same > 0.98
    for degrees in (90, 180):
        upset = wire.image(file_of(picture.rotate(degrees), "PNG"))
        assert 1 - same < 0.5 * (1 - cosine(got.vector, upset.vector))
    pixels = ImagePreprocessor(SPEC).pixels
    assert np.abs(pixels(file).astype(int) - pixels(plain)).mean() < 1.0


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_even_beside_a_good_title(wire: Wire, name: str) -> None:
    make, reason = REFUSED[name]
    file = make()
    started = time.perf_counter()
    answers = wire.products((b"", file), (b"red shoes", file))
    assert [a.outcome for a in answers] == [reason, reason]
    assert time.perf_counter() - started < 3.0


def test_what_is_missing_is_not_bad(wire: Wire) -> None:
    """Zero bytes are no picture: the title speaks alone, and with neither nothing does."""
    title, picture, both, neither = wire.products(
        (b"red shoes", b""), (b"", photo()), (b"red shoes", photo()), (b"", b"")
    )
    assert [a.outcome for a in (title, picture, both)] == [SERVED] * 3
    assert neither.outcome == Reason.NOTHING_TO_ENCODE
    assert cosine(title.vector, picture.vector) < 0.9
    assert cosine(both.vector, title.vector) < 0.9999
    assert cosine(both.vector, picture.vector) < 0.9999


@pytest.mark.parametrize("bad", ["truncated_jpeg", "gif", "bomb_50000x50000"])
def test_one_bad_picture_leaves_its_31_neighbours_alone(wire: Wire, bad: str) -> None:
    products = [
        (b"" if i % 5 == 0 else f"product {i}".encode(), photo((8 * i, 60, 255 - 8 * i)))
        for i in range(32)
    ]
    alone = [wire.products(product)[0].vector for product in products]
    make, reason = REFUSED[bad]
    products[13] = (b"product 13", make())
    answers = wire.products(*products)
    assert [a.outcome for a in answers] == [SERVED] * 13 + [reason] + [SERVED] * 18
    for i, answer in enumerate(answers):
        if i != 13:
            np.testing.assert_allclose(answer.vector, alone[i], atol=1e-5)


BIG: dict[str, tuple[Callable[[], bytes], int]] = {
    "jpeg": (lambda: file_of(big("RGB"), "JPEG"), 100),
    "png": (lambda: file_of(big("RGB"), "PNG", compress_level=1), 400),
    "transparent_png": (lambda: file_of(big("RGBA"), "PNG", compress_level=1), 700),
    "palette_png": (lambda: file_of(big("P"), "PNG", compress_level=1), 500),
    # The codec holds three copies of its own, whatever we do.
    "webp_of_38_bytes": (
        lambda: bytes.fromhex(
            "524946461e000000574542505650384c110000002f3fdfcf0707508f2217a5ff8188e87f0000"
        ),
        1200,
    ),
}
"""File, and what decoding may add to the server's memory in MB; 8000 x 8000 RGB is 256 MB."""


def big(mode: str) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (200, 30, 40)).convert(mode)


@pytest.mark.parametrize("name", BIG)
def test_8000_by_8000_is_served_in_bounded_memory(wire: Wire, triton: Server, name: str) -> None:
    make, megabytes = BIG[name]
    file, small = make(), file_of(Image.new("RGB", (80, 80), (200, 30, 40)), "PNG")
    started = time.perf_counter()
    with memory_growth(triton.process.pid) as growth:
        answer = wire.image(file)
    assert answer.outcome == SERVED
    assert cosine(answer.vector, wire.image(small).vector) > 0.99
    assert len(growth) >= 6  # the server and its five Python models
    assert max(growth) < megabytes, growth
    assert time.perf_counter() - started < 20.0


@pytest.mark.parametrize("name", ["bomb_50000x50000", "9000x9000", "text_chunk_bomb"])
def test_a_bomb_costs_no_memory(wire: Wire, triton: Server, name: str) -> None:
    make, reason = REFUSED[name]
    file = make()
    assert len(file) < 110_000
    good = file_of(scene(0), "PNG")
    wire.products(*[(b"", good)] * 16)  # what a batch of good pictures takes is taken by now
    with memory_growth(triton.process.pid) as growth:
        assert {a.outcome for a in wire.products(*[(b"", file)] * 16)} == {reason}
    assert max(growth) < 30, growth


# ── the preprocessor itself, without a server ────────────────────────────────────────────


@pytest.mark.parametrize("fit", ["pad", "crop", "squash"])
def test_a_very_long_picture_is_cheap(fit: Fit) -> None:
    """8 x 200,000 pixels, scaled to cover a crop, would be half a gigapixel."""
    wide = png(200_000, 8, (b"\0" + b"\x80" * 200_000) * 8)
    started = time.perf_counter()
    batch = ImagePreprocessor(ImageSpec(160, 128, SPEC.mean, SPEC.std, fit=fit))([wide])
    assert time.perf_counter() - started < 1.0
    assert batch.status == [""]
    assert 128 in batch.pixels[0, 79:81, 64]


def test_our_own_failure_is_one_rows_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake: nothing known makes the scaling step raise."""
    sound = ImagePreprocessor._fit

    def fit(self: ImagePreprocessor, picture: Image.Image) -> Image.Image:
        if picture.width == 66:
            raise MemoryError("no room")
        return sound(self, picture)

    monkeypatch.setattr(ImagePreprocessor, "_fit", fit)
    batch = ImagePreprocessor(SPEC)([photo(), photo(size=(66, 66)), photo()])
    assert batch.status == ["", "internal: scaling failed (MemoryError: no room)", ""]
    assert batch.present[:, 0].tolist() == [1, 0, 1]


def mutated(file: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, overwritten with extremes, cut out or cut off."""
    data = bytearray(file)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                data[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
            case 2:
                del data[at : at + rng.randrange(1, 20)]
            case 3 if at > 8:
                del data[at:]
    return bytes(data)


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("name", ["jpeg", "cmyk", "mpo", "png", "palette", "alpha", "webp"])
def test_mutated_files_never_raise(name: str, fit: Fit) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010F] = 6, 72.0, "maker"
    picture = scene(size=(96, 120))
    file = {
        "jpeg": lambda: file_of(picture, "JPEG", exif=exif),
        "cmyk": lambda: file_of(picture.convert("CMYK"), "JPEG", progressive=True),
        "mpo": lambda: file_of(picture, "MPO", save_all=True, append_images=[picture]),
        "png": lambda: file_of(picture, "PNG", exif=exif),
        "palette": lambda: file_of(picture.quantize(16), "PNG", transparency=3),
        "alpha": lambda: file_of(half_clear(), "PNG"),
        "webp": lambda: file_of(picture, "WEBP", exif=exif),
    }[name]()
    rng = random.Random(f"{name} {fit}")
    prepare = ImagePreprocessor(ImageSpec(160, 128, SPEC.mean, SPEC.std, fit=fit))
    seen = set()
    for _ in range(50):
        batch = prepare([mutated(file, rng)])
        assert batch.pixels.shape == (1, 160, 128, 3)
        assert batch.present[0, 0] == (not batch.status[0])
        seen.add(batch.status[0].split(":")[0])
    assert Reason.IMAGE_BROKEN in seen
    assert seen <= {"", *(r for r in Reason if r.startswith("image_"))}
    assert prepare([file]).status == [""]
