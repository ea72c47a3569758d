"""Raw log → figures and verdict: was the load good, and did the generator keep up."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.rawlog import RawLog, Sample

CPU_LIMIT = 0.8
"""Share of a core above which a Python generator, not the server, sets the pace."""
LATENESS_LIMIT_MS = 50.0
"""Open loop: later than this, arrivals are no longer the ones that were asked for."""
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Plan:
    """What was asked for: a closed loop of users, or an open loop of `rate` arrivals a second."""

    users: int | None
    seconds: float
    rate: float | None = None

    @property
    def mode(self) -> str:
        """ "closed" or "open"."""
        return "closed" if self.rate is None else "open"


@dataclass(frozen=True)
class Verdict:
    """The last line of output. Times count from when a query was due; None = no good answer.

    `users` is None in an open loop, which has arrivals instead; `lateness_p99_ms` is None in a
    closed loop, which is never late.
    """

    users: int | None
    seconds: float
    mode: str
    target_rate_per_s: float | None
    requests: int
    failures: int
    rate_per_s: float
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    service_p99_ms: float | None
    lateness_p99_ms: float | None
    dropped: int
    cpu_share: float
    void: bool
    release_id: str
    reasons: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Nothing failed and the figures mean what they say."""
        return not self.void and not self.failures


def verdict_of(log: RawLog, plan: Plan, before: str, after: str) -> Verdict:
    """Judge a load between two handshakes, which found the releases `before` and `after`."""
    samples = [s for s in log.samples if s.at_s >= log.warmup_s]
    good = [s for s in samples if not s.error]
    p50, p90, p99 = percentiles([s.response_ms for s in good])
    opened = plan.rate is not None
    lateness = percentiles([s.late_ms for s in samples])[-1] if opened else None
    reasons = _reasons(log, samples, lateness)
    if before != after:
        reasons.append(f"the server changed from release {before} to {after or 'no answer'}")
    return Verdict(
        users=plan.users,
        seconds=plan.seconds,
        mode=plan.mode,
        target_rate_per_s=plan.rate,
        requests=len(samples),
        failures=len(samples) - len(good),
        rate_per_s=round(len(samples) / plan.seconds, 2),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        service_p99_ms=percentiles([s.service_ms for s in good])[-1],
        lateness_p99_ms=lateness,
        dropped=log.dropped,
        cpu_share=round(log.cpu_share, 3),
        void=bool(reasons),
        release_id=before,
        reasons=reasons,
    )


def percentiles(values_ms: list[float]) -> list[float | None]:
    """Exact p50, p90 and p99 in ms: each is a value that was measured."""
    if not values_ms:
        return [None] * len(PERCENTILES)
    found = np.percentile(values_ms, PERCENTILES, method="inverted_cdf")
    return [round(float(value), 3) for value in found]


def _reasons(log: RawLog, samples: list[Sample], lateness_ms: float | None) -> list[str]:
    """Why the figures do not describe the server, in words; empty when they do."""
    reasons = []
    if not samples:
        reasons.append("no query was asked in the measured time")
    if log.cpu_share > CPU_LIMIT:
        reasons.append(
            f"the generator was saturated: {log.cpu_share:.0%} of a core, limit {CPU_LIMIT:.0%}; "
            "ask less, or generate from another machine"
        )
    if lateness_ms is not None and lateness_ms > LATENESS_LIMIT_MS:
        reasons.append(
            f"the generator was late: p99 {lateness_ms:.0f} ms, limit {LATENESS_LIMIT_MS:.0f} ms; "
            "ask less, or free the generator's machine"
        )
    if log.dropped:
        reasons.append(f"{log.dropped} arrivals were dropped: too many queries were unanswered")
    early = [s.error for s in log.samples if s.error and s.at_s < log.warmup_s]
    if early:
        reasons.append(f"{len(early)} queries failed during the warm-up: {early[0]}")
    return reasons


def show(verdict: Verdict, log: RawLog, console: Console) -> None:
    """The table, then what to know when reading it."""
    load = f"{verdict.users} users" if verdict.mode == "closed" else "Poisson arrivals"
    table = Table(title=f"Queries, {verdict.mode} loop, {load}, {verdict.seconds:g} s")
    table.add_column("")
    table.add_column("measured", justify="right")
    target = f" of {verdict.target_rate_per_s:g}" if verdict.target_rate_per_s else ""
    table.add_row("requests", str(verdict.requests))
    table.add_row("failures", str(verdict.failures))
    table.add_row("realised rate, per s", f"{verdict.rate_per_s:g}{target}")
    for name in ("p50_ms", "p90_ms", "p99_ms", "service_p99_ms", "lateness_p99_ms"):
        if (value := getattr(verdict, name)) is not None:
            table.add_row(name.removesuffix("_ms").replace("_", " ") + ", ms", f"{value:.2f}")
    if verdict.mode == "open":
        table.add_row("arrivals dropped", str(verdict.dropped))
    table.add_row("generator CPU, of a core", f"{verdict.cpu_share:.0%}")
    table.add_row("release", verdict.release_id)
    console.print(table)
    console.print(f"The first {log.warmup_s:g} s were warm-up and are left out of every figure.")
    if verdict.mode == "closed":
        console.print("A closed loop asks a slow server less often: take the tail from --rate.")
    errors = dict.fromkeys(s.error for s in log.samples if s.error)
    for error in list(errors)[:3]:
        console.print(f"failed: {error}", markup=False)
    for reason in verdict.reasons:
        console.print(f"VOID: {reason}", markup=False)
