"""The parity ladder as a table on screen and as one HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from export.ladder import Found

COLUMNS = (
    "rung",
    "tower",
    "rows",
    "max abs",
    "cosine p0",
    "p1",
    "p50",
    "alone or in company",
    "top-10 overlap",
    "Recall@10 change",
    "nDCG@10 change",
    "verdict",
)
STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; } table { border-collapse: collapse; }
td, th { padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: right; }
td:nth-child(-n+2), th:nth-child(-n+2), td:last-child { text-align: left; }
.bad td { background: #fbe3e0; }
"""


def cells_of(found: Found) -> list[str]:
    """One row, in the order of COLUMNS."""
    changes = [
        f"{x.value:+.4f} [{x.low:+.4f}, {x.high:+.4f}]" if x else ""
        for x in (found.recall, found.ndcg)
    ]
    return [
        found.rung.name,
        found.rung.tower.name,
        str(found.rows),
        f"{found.max_abs:.1e}",
        *(f"{value:.7f}" for value in found.cosines),
        f"{found.invariance:.1e}",
        f"{found.overlap:.4f}" if found.recall else "",
        *changes,
        "; ".join(found.faults) or "within its budget",
    ]


def table_of(ladder: Sequence[Found]) -> Table:
    """For a terminal of 80 columns: what decides."""
    table = Table(title="parity with torch FP32, by tower")
    for name in ("rung", "cosine p0", "Recall@10 change", "verdict"):
        table.add_column(name)
    for at, found in enumerate(ladder):
        if not at or found.rung.tower is not ladder[at - 1].rung.tower:
            table.add_section()
            table.add_row(found.rung.tower.name, style="bold")
        cells = dict(zip(COLUMNS, cells_of(found), strict=True))
        table.add_row(
            cells["rung"],
            cells["cosine p0"],
            cells["Recall@10 change"],
            "; ".join(found.faults) or "ok",
            style="red" if found.faults else None,
        )
    return table


def write_page(path: Path, ladder: Sequence[Found], about: str) -> None:
    """All of it; rungs past their budget are red."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    rows = [
        f"<tr{' class=bad' if found.faults else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells_of(found))
        + "</tr>"
        for found in ladder
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>parity</title><style>{STYLE}</style>"
        f"<h1>Parity with torch FP32</h1><p>{html.escape(about)}</p>"
        f"<table><tr>{head}</tr>{''.join(rows)}</table>\n",
        "utf-8",
    )
