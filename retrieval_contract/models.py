"""THE declarations: every tensor, both towers, both ensembles and the collection.

Names and dtypes are fixed here. Sizes belong to a release (`release.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from retrieval_contract.tensors import Batch, Dtype, Engine, Ensemble, Model, Tensor, UpTo
from retrieval_contract.took import Took

# ── what callers send ────────────────────────────────────────────────────────────────────
QUERY = Tensor("query", Dtype.BYTES, (1,), "one search query, UTF-8")
TITLE = Tensor("title", Dtype.BYTES, (1,), "one product title, UTF-8; no bytes = missing")
IMAGE = Tensor("image", Dtype.BYTES, (1,), "one JPEG, PNG or WebP file; no bytes = missing")

# ── what travels between the steps ───────────────────────────────────────────────────────
QUERY_IDS = Tensor("query_ids", Dtype.INT32, (UpTo("query_tokens"),), "token ids, padded")
QUERY_MASK = Tensor("query_mask", Dtype.INT32, (UpTo("query_tokens"),), "1 token, 0 padding")
TITLE_IDS = Tensor("title_ids", Dtype.INT32, (UpTo("title_tokens"),), "token ids, padded")
TITLE_MASK = Tensor("title_mask", Dtype.INT32, (UpTo("title_tokens"),), "1 token, 0 padding")
HAS_TITLE = Tensor("has_title", Dtype.INT32, (1,), "1 when the title is there, else 0")
PIXELS = Tensor("pixels", Dtype.UINT8, ("image_height", "image_width", 3), "RGB, row by row")
HAS_IMAGE = Tensor("has_image", Dtype.INT32, (1,), "1 when the image is there, else 0")

# ── what callers get ─────────────────────────────────────────────────────────────────────
QUERY_VECTOR = Tensor("query_vector", Dtype.FP32, ("vector_dim",), "unit norm; 0 if refused")
PRODUCT_VECTOR = Tensor("product_vector", Dtype.FP32, ("vector_dim",), "unit norm; 0 if refused")
ITEM_STATUS = Tensor("item_status", Dtype.BYTES, (1,), "empty = good, else `reason: detail`")

# ── what callers get besides, who send the parameter EXPLAIN to a model in one process ───
EXPLAIN = "explain"
TIMINGS = Tensor("timings", Dtype.FP32, (len(Took._fields),), "a Took: of the run, on every row")

# A query is short and many callers ask at once; a product is a picture. Both bounds are the
# most rows that one request, and one merged batch, may hold.
QUERY_BATCH = Batch(opt=16, max=128)
PRODUCT_BATCH = Batch(opt=32, max=64)

QUERY_TOKENIZER = Model(
    "query_tokenizer",
    Engine.PYTHON,
    inputs=(QUERY,),
    outputs=(QUERY_IDS, QUERY_MASK, ITEM_STATUS),
    batch=QUERY_BATCH,
)
QUERY_TOWER = Model(
    "query_tower",
    Engine.NETWORK,
    inputs=(QUERY_IDS, QUERY_MASK),
    outputs=(QUERY_VECTOR,),
    batch=QUERY_BATCH,
)
PRODUCT_PREPROCESSOR = Model(
    "product_preprocessor",
    Engine.PYTHON,
    inputs=(TITLE, IMAGE),
    outputs=(TITLE_IDS, TITLE_MASK, HAS_TITLE, PIXELS, HAS_IMAGE, ITEM_STATUS),
    batch=PRODUCT_BATCH,
)
PRODUCT_TOWER = Model(
    "product_tower",
    Engine.NETWORK,
    inputs=(TITLE_IDS, TITLE_MASK, HAS_TITLE, PIXELS, HAS_IMAGE),
    outputs=(PRODUCT_VECTOR,),
    batch=PRODUCT_BATCH,
)

QUERY_ENCODER = Ensemble(
    "query_encoder",
    inputs=(QUERY,),
    outputs=(QUERY_VECTOR, ITEM_STATUS),
    steps=(QUERY_TOKENIZER, QUERY_TOWER),
)
PRODUCT_ENCODER = Ensemble(
    "product_encoder",
    inputs=(TITLE, IMAGE),
    outputs=(PRODUCT_VECTOR, ITEM_STATUS),
    steps=(PRODUCT_PREPROCESSOR, PRODUCT_TOWER),
)

TOWERS: tuple[Model, ...] = (QUERY_TOWER, PRODUCT_TOWER)
ENSEMBLES: tuple[Ensemble, ...] = (QUERY_ENCODER, PRODUCT_ENCODER)
MODELS: tuple[Model, ...] = tuple(step for e in ENSEMBLES for step in e.steps)
IN_ONE: tuple[Ensemble, ...] = (QUERY_ENCODER,)
"""What the local target computes in one Python process: there every step is one, and a hop between
two costs as much as a short text. Pictures are decoded beside the tower instead."""

QUERY_CACHED, QUERY_UNCACHED = "query_cached", "query_uncached"
"""With a response cache, `query_encoder` is one step over the first, which remembers the answers of
the second: what `query_encoder` is without. See `deploy/query_cache.py`."""


class Target(StrEnum):
    """Which runtime runs the towers: a `configs/<target>.pbtxt` of each."""

    GPU = "gpu"  # TensorRT plan
    CPU = "cpu"  # the container's ONNX Runtime backend; in bf16 the Python backend
    LOCAL = "local"  # the Python backend: the wheel's server has no other


RUNS, PICTURES = "retrieval_runs_total", "retrieval_pictures_total"
"""Metrics by which to see from outside whether a Python model gets on: Triton counts as answered
what its door (`door.py`) has let in."""

PRECISION = "precision"
"""Parameter of a config of ours that runs a graph, and field of `release.json`."""

# File names inside a model's version folder.
PYTHON_FILE = "model.py"
ONNX_FILE = "model.onnx"
HALF_FILE = "model.fp16.onnx"
"""What engines are built from, on the GPU that will run them."""
PLAN_FILE = "model.plan"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Field:
    """One Milvus field. `max_bytes` is UTF-8 bytes, of text fields only."""

    name: str
    kind: str  # pymilvus DataType name
    meaning: str
    max_bytes: int = 0
    size: str = ""  # the release size of a vector field
    words_of: str = ""  # the text field that Milvus makes this one from, where it has BM25


@dataclass(frozen=True)
class Collection:
    """The Milvus side: one collection a release, all behind one alias."""

    alias: str
    fields: tuple[Field, ...]
    metric: str

    def name(self, release_id: str, alias: str) -> str:
        """The collection of one release; vectors of two releases never share one."""
        return f"{alias}_{release_id}"


BUCKETS = 1000
"""A share of a catalog is a condition on the field `bucket`: `bucket < 10` is about one percent."""

PRODUCTS = Collection(
    alias="products",
    metric="COSINE",
    fields=(
        Field("id", "VARCHAR", "the caller's id", max_bytes=256),
        Field("title", "VARCHAR", "as given, cleaned", max_bytes=8192),
        Field("content_hash", "VARCHAR", "release id, and a hash of title, image", max_bytes=64),
        Field("row_hash", "VARCHAR", "of all that the source says of it", max_bytes=64),
        Field("checksum", "INT64", "of title, attributes and vector, as they were written"),
        Field("bucket", "INT64", "a hash of the id, 0 to BUCKETS - 1"),
        Field("attributes", "JSON", "the source's other columns"),
        Field("thumbnail", "VARCHAR", "base64 JPEG for result pages, or empty", max_bytes=65535),
        Field("vector", "FLOAT_VECTOR", "product_vector", size="vector_dim"),
        Field("words", "SPARSE_FLOAT_VECTOR", "BM25 of the title", words_of="title"),
    ),
)
