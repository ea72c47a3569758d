"""python -m benchmarks: query load on a running Triton, a verdict, and locust's HTML report.

Without --rate: --users closed-loop users, each asking as soon as it is answered. With --rate: an
open loop of Poisson arrivals, timed from when each was due. The first two seconds are warm-up.
The last line of output is JSON; exit code 1 when a query failed or the figures are void.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks.rawlog import RawLog
from benchmarks.report import Plan, show, verdict_of
from retrieval_client.encoder import Encoder
from retrieval_client.settings import Settings
from retrieval_contract.errors import RetrievalError, ServerError

ROOT = Path(__file__).parent.parent
LOCUSTFILE = Path(__file__).with_name("locustfile.py")
WARMUP_S = 2.0
NAME = "load"
"""Of every file that a run leaves; a catalog has none of that name."""
FILES = tuple(
    NAME + ending
    for ending in (
        ".html",
        ".jsonl",
        ".log",
        "_stats.csv",
        "_stats_history.csv",
        "_failures.csv",
        "_exceptions.csv",
    )
)
SETTLE_S = 3
"""Locust's own time limit comes so much after the last query: normally its users have left."""
START_AND_EXIT_S = 30.0
"""What locust gets for its own start and exit before it is killed."""


def positive(text: str) -> float:
    """A number above zero, for argparse."""
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def count(text: str) -> int:
    """A whole number above zero, for argparse."""
    return int(positive(str(int(text))))


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--triton", help="gRPC address, host:port (RETRIEVAL_TRITON)")
    top.add_argument("--users", type=count, default=8, help="of the closed loop; default: 8")
    top.add_argument("--rate", type=positive, help="arrivals a second: an open loop, no users")
    top.add_argument("--seconds", type=positive, default=15.0, help="measured; default: 15")
    top.add_argument("--queries", type=Path, help="CSV with a column `query`, or its folder")
    top.add_argument("--exponent", type=float, default=0.8, help="of the Zipf weights")
    top.add_argument("--seed", type=int, default=0, help="of queries and arrivals")
    top.add_argument("--timeout-s", type=positive, help="deadline of one query, in seconds")
    top.add_argument("--out", type=Path, default=Path("build/bench"), help="default: build/bench")
    return top


def run_locust(args: argparse.Namespace, settings: Settings, out: Path) -> RawLog:
    """Run locust in a process of its own, which it patches, and read what it logged.

    It is killed when it does not end in time. Raises ServerError with its last words.
    """
    raw_log, log = out / f"{NAME}.jsonl", out / f"{NAME}.log"
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    flags: dict[str, object] = {
        "users": 1 if args.rate else args.users,
        "spawn-rate": args.users,
        "run-time": f"{math.ceil(WARMUP_S + args.seconds) + SETTLE_S}s",
        "stop-timeout": math.ceil(settings.timeout_s) + 1,
        "html": out / f"{NAME}.html",
        "csv": out / NAME,
        "loglevel": "WARNING",
        "triton": settings.triton,
        "timeout-s": settings.timeout_s,
        "exponent": args.exponent,
        "seed": args.seed,
        "warmup-s": WARMUP_S,
        "measure-s": args.seconds,
        "raw-log": raw_log,
    }
    flags |= {"queries": args.queries.resolve()} if args.queries else {}
    flags |= {"rate": args.rate} if args.rate else {}
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"]
    command += ["--only-summary", *(f"--{name}={value}" for name, value in flags.items())]
    command.append("Arrivals" if args.rate else "Shopper")
    limit_s = WARMUP_S + args.seconds + SETTLE_S + settings.timeout_s + START_AND_EXIT_S
    with log.open("w", encoding="utf-8") as output:
        try:
            subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=output, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired as exc:
            raise ServerError(f"locust did not end in {limit_s:.0f} s; read {log}") from exc
    if not raw_log.exists():
        last = "\n".join(log.read_text("utf-8").splitlines()[-5:])
        raise ServerError(f"locust ended without a result; its last words:\n{last}")
    return RawLog.read(raw_log)


def served(settings: Settings) -> str:
    """The release behind the address; ServerError when nobody answers."""
    with Encoder(settings) as encoder:
        return encoder.served().release_id


def run(args: argparse.Namespace) -> int:
    """Handshake, load, handshake, verdict; returns the exit code."""
    settings = Settings.from_env().override(triton=args.triton, timeout_s=args.timeout_s)
    before = served(settings)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = run_locust(args, settings, out)
    try:
        after = served(settings)
    except RetrievalError:
        after = ""  # the verdict says it
    plan = Plan(None if args.rate else args.users, args.seconds, args.rate)
    verdict = verdict_of(log, plan, before, after)
    console = Console()
    show(verdict, log, console)
    console.print(f"report: {out / NAME}.html", markup=False, soft_wrap=True)
    print(json.dumps(asdict(verdict)))
    return 0 if verdict.good else 1


def main() -> None:
    """Command line."""
    args = parser().parse_args()
    # Leaves by an exception, so that locust is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        raise SystemExit(run(args))
    except RetrievalError as exc:
        raise SystemExit(f"error: {exc}") from exc
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
