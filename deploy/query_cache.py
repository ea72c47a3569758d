"""Triton's response cache before the queries of a server: off unless it is asked for.

Its key is a hash of model name, version, input names and input bytes. So what an answer depends on
must be among these, and what is not must not matter:

    query_encoder ──► query_cached ──► query_uncached
    (one step)        (remembers)      what query_encoder is without a cache

A release has a version number of its own, so none gives another's answers. An ensemble keeps no
errors, a model would. Which outputs are wanted is no part of the key, but a step of an ensemble is
always asked for all of them: callers of `query_encoder` cannot leave half an answer there. Who
asks `query_cached` itself can, and who sends texts whose hashes collide can have a text answered
with another's vector: hence RISK.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deploy.pbtxt import Message, message_of, parse, quoted
from retrieval_contract.errors import DeployError
from retrieval_contract.models import QUERY_CACHED, QUERY_ENCODER, QUERY_UNCACHED

RISK = (
    "the cache is shared by all callers and its key is a 64-bit hash that is not secret: a "
    "malicious caller can prepare wrong or incomplete answers for chosen texts; switch it on only "
    "where every caller is trusted"
)
CONFIG = "config.pbtxt"
MEBIBYTE = 2**20


def cache_size(text: str) -> int:
    """`--query-cache-mb`, for argparse: MiB, 0 for none."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected MiB, a whole number from 0, got {text}")
    return int(text)


def add_cache_flag(parser: argparse.ArgumentParser) -> None:
    """`--query-cache-mb`; None where it is not given."""
    parser.add_argument(
        "--query-cache-mb",
        type=cache_size,
        metavar="MIB",
        help=f"remember queries' answers in so much memory; default: 0, none. Risk: {RISK}",
    )


def prepare_cache(mebibytes: int, repository: Path) -> list[str]:
    """Triton's flags for so much memory, and a repository of links made ready for it."""
    if not mebibytes:
        return []
    put_cache_before_queries(repository)
    return [f"--cache-config=local,size={mebibytes * MEBIBYTE}"]


def put_cache_before_queries(repository: Path) -> None:
    """Change a repository of links, which is ours alone; DeployError when it is of another form."""
    public = repository / QUERY_ENCODER.name
    behind = public.rename(repository / QUERY_UNCACHED)
    for path in behind.rglob("*.pbtxt"):
        config = parse(path.read_text("utf-8"))
        config.set("name", quoted(QUERY_UNCACHED))
        rewrite(path, config)
    whole = parse((behind / CONFIG).read_text("utf-8"))
    versions = [path.name for path in behind.iterdir() if path.name.isdigit()]
    if len(versions) != 1:
        raise DeployError(
            f"{QUERY_ENCODER.name}: expected one version, got {sorted(versions)}; "
            "serve a built release folder"
        )
    for name, step in ((QUERY_CACHED, QUERY_UNCACHED), (QUERY_ENCODER.name, QUERY_CACHED)):
        (repository / name / versions[0]).mkdir(parents=True)
        config = one_step(whole, name, step, versions[0])
        if name == QUERY_CACHED:
            config.set("response_cache", message_of(("enable", "true")))
        rewrite(repository / name / CONFIG, config)


def one_step(whole: Message, name: str, step: str, version: str) -> Message:
    """An ensemble like `whole`, which only passes everything to `step`."""
    ours = message_of(("model_name", quoted(step)), ("model_version", version))
    for field, tensors in (("input", QUERY_ENCODER.inputs), ("output", QUERY_ENCODER.outputs)):
        for tensor in tensors:
            wire = message_of(("key", quoted(tensor.name)), ("value", quoted(tensor.name)))
            ours.fields.append((f"{field}_map", wire))
    config = Message(list(whole.fields))
    config.set("name", quoted(name))
    config.set("ensemble_scheduling", message_of(("step", ours)))
    return config


def rewrite(path: Path, config: Message) -> None:
    """In the place of a link or of nothing: what the link leads to is not touched."""
    path.unlink(missing_ok=True)
    path.write_text(config.text(), "utf-8")
