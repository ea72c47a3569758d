"""Recall over latency as an SVG: a curve for each filter."""

from __future__ import annotations

import html

from retrieval_client.recalls import Point, Recall

WIDTH, HEIGHT, MARGIN, TICKS = 640, 400, 60, 5
COLOURS = ("#0066cc", "#cc6600", "#009966", "#aa3377", "#666666")


def curves(found: Recall) -> str:
    """recall@10 of each effort over the latency of one search; a point says what it is."""
    right = max(point.latency_ms for point in found.points) * 1.05
    bottom = min(0.9, *(point.recall_10 for point in found.points))

    def x(ms: float) -> float:
        return MARGIN + ms / right * (WIDTH - 2 * MARGIN)

    def y(recall: float) -> float:
        return HEIGHT - MARGIN - (recall - bottom) / (1 - bottom) * (HEIGHT - 2 * MARGIN)

    title = f"recall@10 of {found.index}, {found.rows} rows"
    parts = [f'<text x="{MARGIN}" y="25" font-weight="bold">{html.escape(title)}</text>']
    for n in range(TICKS + 1):
        ms, recall = right * n / TICKS, bottom + (1 - bottom) * n / TICKS
        parts.append(f'<text x="{x(ms):.0f}" y="{HEIGHT - MARGIN + 18}">{ms:.1f} ms</text>')
        parts.append(f'<text x="5" y="{y(recall):.0f}">{recall:.3f}</text>')
        parts.append(f'<path stroke="#eee" d="M{MARGIN} {y(recall):.1f}H{WIDTH - MARGIN}"/>')
    shares = list(dict.fromkeys(point.share for point in found.points))
    for n, share in enumerate(shares):
        colour, points = COLOURS[n % len(COLOURS)], found.of(share)
        line = " ".join(f"{x(p.latency_ms):.1f},{y(p.recall_10):.1f}" for p in points)
        parts.append(f'<polyline fill="none" stroke="{colour}" points="{line}"/>')
        parts += [
            f'<circle r="4" fill="{colour}" cx="{x(p.latency_ms):.1f}" cy="{y(p.recall_10):.1f}">'
            f"<title>{html.escape(_said(found, p))}</title></circle>"
            for p in points
        ]
        label = f"{share:.1%} of the rows"
        parts.append(
            f'<text x="{WIDTH - MARGIN - 90}" y="{HEIGHT - MARGIN - 12 - 16 * n}" '
            f'fill="{colour}">{label}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'font-family="sans-serif" font-size="12">{"".join(parts)}</svg>\n'
    )


def _said(found: Recall, point: Point) -> str:
    effort = f"{found.knob} {point.effort}, " if point.effort is not None else ""
    return f"{effort}recall@10 {point.recall_10:.4f}, {point.latency_ms:.2f} ms"
