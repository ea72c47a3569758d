"""Search and fill a product catalog: Triton encodes, Milvus stores and finds.

    from retrieval_client import ProductSearch, Settings

    with ProductSearch(Settings.from_env()) as search:
        for hit in search("navy blue shirt", limit=10):
            print(hit.id, hit.score, hit.title)

`AsyncProductSearch` has the same face, to be awaited.
Needs no torch. Every call has a deadline; every error is a `RetrievalError`.
"""

from retrieval_client.aio import AsyncProductSearch
from retrieval_client.catalog import Catalog
from retrieval_client.collection import Collection, Consistency
from retrieval_client.encoder import Encoded, Encoder
from retrieval_client.finding import End, Hits
from retrieval_client.fleet import Encoders
from retrieval_client.hybrid import Fusion, Hybrid
from retrieval_client.options import Options
from retrieval_client.query import Query
from retrieval_client.records import Hit, ProductRow
from retrieval_client.search import ProductSearch
from retrieval_client.settings import Settings
from retrieval_client.where import Where
from retrieval_contract.errors import RetrievalError

__all__ = [
    "AsyncProductSearch",
    "Catalog",
    "Collection",
    "Consistency",
    "Encoded",
    "Encoder",
    "Encoders",
    "End",
    "Fusion",
    "Hit",
    "Hits",
    "Hybrid",
    "Options",
    "ProductRow",
    "ProductSearch",
    "Query",
    "RetrievalError",
    "Settings",
    "Where",
]
