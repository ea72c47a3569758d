"""Search and fill a product catalog: Triton encodes, Milvus stores and finds.

    from retrieval_client import ProductSearch, Settings

    with ProductSearch(Settings.from_env()) as search:
        for hit in search("navy blue shirt", limit=10):
            print(hit.id, hit.score, hit.title)

Needs no torch. Every call has a deadline; every error is a `RetrievalError`.
"""

from retrieval_client.catalog import Catalog
from retrieval_client.collection import Collection, Hit, ProductRow
from retrieval_client.encoder import Encoded, Encoder
from retrieval_client.fleet import Encoders
from retrieval_client.search import ProductSearch
from retrieval_client.settings import Settings
from retrieval_contract.errors import RetrievalError

__all__ = [
    "Catalog",
    "Collection",
    "Encoded",
    "Encoder",
    "Encoders",
    "Hit",
    "ProductRow",
    "ProductSearch",
    "RetrievalError",
    "Settings",
]
