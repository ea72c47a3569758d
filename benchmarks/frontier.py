"""What is worth having of many settings: the points that no other beats, and a picture of them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, MARGIN = 640, 400, 60
TICKS = 5
AS_GOOD = 0.97
"""Of the most; single rounds differ by more."""


@dataclass(frozen=True)
class Point:
    """One setting under one load: medians of rows a second and p99, over rounds."""

    setting: str
    in_flight: int
    rows_per_s: float
    p99_ms: float
    failed: int = 0

    def beats(self, other: Point) -> bool:
        """At least as good in both figures, and better in one."""
        return (
            self.rows_per_s >= other.rows_per_s
            and self.p99_ms <= other.p99_ms
            and (self.rows_per_s, self.p99_ms) != (other.rows_per_s, other.p99_ms)
        )


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those without failures that no other beats, the quickest first."""
    good = [point for point in points if not point.failed]
    best = [point for point in good if not any(other.beats(point) for other in good)]
    return sorted(best, key=lambda point: point.p99_ms)


def best_under(points: Sequence[Point], p99_ms: float) -> Point | None:
    """The first whose rows a second are the most within a limit, or as good as; None if none is.

    Give those of fewer copies and threads first: noise must not buy more of them.
    """
    kept = [point for point in points if not point.failed and point.p99_ms <= p99_ms]
    most = max((point.rows_per_s for point in kept), default=0.0)
    return next((point for point in kept if point.rows_per_s >= AS_GOOD * most), None)


def svg(points: Sequence[Point], limit_ms: float, title: str) -> str:
    """Throughput over p99: all points, the frontier as a line, the limit dashed."""
    right = max([limit_ms, *(p.p99_ms for p in points if p.p99_ms < float("inf"))]) * 1.05
    top = max([1.0, *(point.rows_per_s for point in points)]) * 1.05

    def x(ms: float) -> float:
        return MARGIN + min(ms, right) / right * (WIDTH - 2 * MARGIN)

    def y(rate: float) -> float:
        return HEIGHT - MARGIN - rate / top * (HEIGHT - 2 * MARGIN)

    kept = frontier(points)
    parts = [f'<text x="{MARGIN}" y="25" font-weight="bold">{html.escape(title)}</text>']
    for n in range(TICKS + 1):
        ms, rate = right * n / TICKS, top * n / TICKS
        parts.append(f'<text x="{x(ms):.0f}" y="{HEIGHT - MARGIN + 18}">{ms:.0f} ms</text>')
        parts.append(f'<text x="5" y="{y(rate):.0f}">{rate:.0f}/s</text>')
        parts.append(f'<path class="grid" d="M{MARGIN} {y(rate):.1f}H{WIDTH - MARGIN}"/>')
    parts.append(f'<path class="limit" d="M{x(limit_ms):.1f} {MARGIN}V{HEIGHT - MARGIN}"/>')
    line = " ".join(f"{x(p.p99_ms):.1f},{y(p.rows_per_s):.1f}" for p in kept)
    parts.append(f'<polyline points="{line}"/>')
    for point in points:
        said = f"{point.setting}, {point.in_flight} in flight: {point.rows_per_s:.0f}/s"
        said += f", p99 {point.p99_ms:.1f} ms"
        parts.append(
            f'<circle class="{"kept" if point in kept else ""}" r="4" cx="{x(point.p99_ms):.1f}" '
            f'cy="{y(point.rows_per_s):.1f}"><title>{html.escape(said)}</title></circle>'
        )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">{"".join(parts)}</svg>'


STYLE = """
body, svg { font: 12px system-ui, sans-serif; margin: 2em; }
circle { fill: #bbb; } circle.kept { fill: #06c; }
polyline { fill: none; stroke: #06c; } path.grid { stroke: #eee; }
path.limit { stroke: #c00; stroke-dasharray: 4; }
"""


def page(pictures: Sequence[str]) -> str:
    """One HTML page of pictures; each point says what it is under the pointer."""
    return (
        f"<!doctype html><meta charset=utf-8><title>tuning</title><style>{STYLE}</style>"
        f"<h1>Throughput against p99</h1>{''.join(pictures)}\n"
    )
