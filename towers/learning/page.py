"""One HTML page: sample queries, and what each system ranks first, as photos."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from towers.learning.catalog import ProductData, Query
from towers.learning.metrics import Scores
from towers.learning.systems import System

STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; }
h2 { margin: 1.6em 0 .2em; } .row { display: flex; gap: 8px; align-items: flex-start; }
.name { width: 7em; padding-top: 2em; color: #555; }
figure { margin: 0; width: 108px; } img { width: 96px; height: 128px; object-fit: contain;
border: 3px solid #ddd; } .right img { border-color: #2a9d4a; } figcaption { font-size: 11px; }
"""


def write_page(
    data: ProductData, systems: Sequence[System], path: Path, samples: int, shown: int
) -> None:
    """Write the page; a green frame is a relevant product. Queries are taken evenly."""
    step = max(1, len(data.queries) // samples)
    queries = data.queries[::step][:samples]
    ranked = {s.name: s.scores(data, [q.text for q in queries]) for s in systems}
    parts = [f"<!doctype html><meta charset=utf-8><title>{data.name}</title><style>{STYLE}</style>"]
    parts.append(f"<h1>{html.escape(data.name)}</h1>")
    for number, query in enumerate(queries):
        parts.append(f"<h2>{html.escape(query.text)}</h2>")
        for name, scores in ranked.items():
            parts.append(_row(name, query, data, scores[number], shown))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), "utf-8")


def _row(name: str, query: Query, data: ProductData, scores: Scores, shown: int) -> str:
    figures = []
    for at in np.argsort(-scores, kind="stable")[:shown].tolist():
        right = " class=right" if query.grades.get(data.ids[at]) else ""
        photo = base64.b64encode(data.images[at]).decode()
        title = html.escape(data.titles[at])
        figures.append(
            f'<figure{right}><img src="data:image/jpeg;base64,{photo}">'
            f"<figcaption>{title}</figcaption></figure>"
        )
    return f"<div class=row><div class=name>{name}</div>{''.join(figures)}</div>"
