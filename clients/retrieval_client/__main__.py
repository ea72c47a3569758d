"""retrieval: push, audit, search and release a catalog; the command line of the client library.

Exit codes: 0 all done, 1 an error (said on stderr), 3 some rows or ids were refused or unknown.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys

from retrieval_client.commands import audit, bulk, index, push, release, search, status
from retrieval_client.commands.shared import EXIT_ERROR, console
from retrieval_client.settings import Settings, traces_wanted
from retrieval_client.tracing import export_spans
from retrieval_contract.errors import RetrievalError

GROUPS = (push, bulk, audit, search, index, release, status)


def parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    top = argparse.ArgumentParser(
        prog="retrieval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--triton", help="gRPC address, host:port (RETRIEVAL_TRITON)")
    shared.add_argument("--milvus", help="a .db path or a server's URI (RETRIEVAL_MILVUS)")
    shared.add_argument("--collection", help="alias of the collection (RETRIEVAL_COLLECTION)")
    shared.add_argument("--timeout-s", type=float, help="deadline of a call, in seconds")
    shared.add_argument("--json", action="store_true", help="one JSON object on stdout")
    commands = top.add_subparsers(dest="command", required=True)
    for group in GROUPS:
        group.add(commands, shared)
    return top


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `retrieval` command."""
    args = parser().parse_args(argv)
    # pymilvus logs a traceback for every error that it also raises; we say it once, readably.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    send_spans = export_spans() if traces_wanted() else None
    if traces_wanted() and not send_spans:
        console.print("no spans: expected OpenTelemetry, got none; install make-retrieval[trace]")
    try:
        settings = Settings.from_env().override(
            triton=args.triton,
            milvus=args.milvus,
            collection=args.collection,
            timeout_s=args.timeout_s,
            retry_s=getattr(args, "retry_s", None),
            shadow=getattr(args, "shadow", None),
        )
        code = args.run(args, settings)
    except RetrievalError as exc:
        if args.json:
            print(json.dumps({"error": type(exc).__name__, "detail": str(exc)}))
        console.print(f"error: {exc}", style="red", markup=False, soft_wrap=True)
        code = EXIT_ERROR
    except OSError as exc:  # of files that the caller named: rejects, pictures
        console.print(f"error: {exc}", style="red", markup=False, soft_wrap=True)
        code = EXIT_ERROR
    except KeyboardInterrupt:
        console.print("stopped; what was stored stays, run it again to go on")
        code = EXIT_ERROR
    finally:
        if send_spans:
            send_spans()
    sys.exit(code)


if __name__ == "__main__":
    main()
