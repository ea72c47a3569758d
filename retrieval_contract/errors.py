"""The whole error tree of the project, in one place.

RetrievalError
├── ContractError            a tensor, size or declaration that cannot be right
│   ├── ReleaseMismatch      two parts speak of two different releases
│   └── FilterError          a condition on products that cannot be understood, or not everywhere
├── CheckpointError          a checkpoint folder that is incomplete or does not fit its config
├── ExportError              an artefact that failed its own proof, and so was not written
├── EngineError              a TensorRT engine that cannot be built, or is not what it should be
├── DeployError              the server cannot be started here
├── SourceError              a catalog file that cannot be read
├── ItemError                one query or product is bad; the rest of its batch is not
├── ServerError              Triton answered with an error
│   ├── ServerUnavailable    nobody answers, or the server is starting, or a part of it is dead
│   │   ├── ServerBusy       full: it could not answer in time; try later
│   │   └── ServerDraining   it stops, and answers only who was there before
│   ├── DeadlineExceeded     no answer within the caller's deadline
│   ├── RequestRefused       the request itself is wrong
│   └── AccessDenied         this is not open to us
└── CatalogError             Milvus answered with an error
    ├── CatalogUnavailable   nobody answers, or the collection is still loading
    ├── CollectionGone       what was asked of is not there (any more)
    ├── TooMuchToDelete      a source that lacks much of what is stored
    ├── NotVerified          a release that nobody has verified as it is now
    └── Unsupported          this Milvus cannot do what was asked for

Messages say what was expected, what was found, and what to do next.
"""

from __future__ import annotations

from enum import StrEnum


class RetrievalError(Exception):
    """Base of every error that this project raises on purpose."""


class ContractError(RetrievalError):
    """A tensor, size or declaration cannot be right."""


class ReleaseMismatch(ContractError):
    """Two parts (server, collection, folder) speak of two different releases."""


class FilterError(ContractError):
    """A condition on products cannot be understood, or would not mean the same everywhere."""


class CheckpointError(RetrievalError):
    """A checkpoint folder is incomplete or does not fit its own config."""


class ExportError(RetrievalError):
    """An artefact failed its own proof and was not written."""


class EngineError(RetrievalError):
    """A TensorRT engine cannot be built, or is not what it should be."""


class DeployError(RetrievalError):
    """The server cannot be started on this machine as asked."""


class SourceError(RetrievalError):
    """A catalog source (file, folder, column) cannot be read."""


class Reason(StrEnum):
    """Why one item was refused; the word before the colon of an `item_status`."""

    EMPTY = "empty"
    NOT_UTF8 = "not_utf8"
    NUL = "nul"
    TOO_LONG = "too_long"
    NOTHING_TO_ENCODE = "nothing_to_encode"
    IMAGE_BROKEN = "image_broken"
    IMAGE_FORMAT = "image_format"
    IMAGE_TOO_LARGE = "image_too_large"
    IMAGE_TOO_SMALL = "image_too_small"
    IMAGE_MISSING_FILE = "image_missing_file"
    BAD_ID = "bad_id"
    BAD_ATTRIBUTES = "bad_attributes"
    DUPLICATE_ID = "duplicate_id"
    UNKNOWN_ID = "unknown_id"
    INTERNAL = "internal"


class ItemError(RetrievalError):
    """One query or product is bad; `reason` is a code, `detail` is for people."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[ItemError], tuple[Reason, str]]:
        """Its words are not its arguments, which a worker's error is made of again."""
        return type(self), (self.reason, self.detail)

    @classmethod
    def from_status(cls, status: str) -> ItemError:
        """Read back an `item_status` string, `reason: detail`."""
        code, _, detail = status.partition(": ")
        known = code in Reason.__members__.values()
        return cls(Reason(code), detail) if known else cls(Reason.INTERNAL, status)


class ServerError(RetrievalError):
    """Triton answered with an error."""


class ServerUnavailable(ServerError):
    """Nobody answers at the address, the server is starting, or a part of it is dead."""


class ServerBusy(ServerUnavailable):
    """The server, or our own queue before it, could not answer in time. Try later, not at once."""


class BadCompany(ServerBusy):
    """Somebody's malformed request failed ours, which the server had merged with it. Try again."""


class ServerDraining(ServerUnavailable):
    """The server is stopping: another one may answer, this one will not."""


class DeadlineExceeded(ServerError):
    """No answer came within the caller's deadline."""


class RequestRefused(ServerError):
    """The server says that the request itself is wrong."""


class AccessDenied(ServerError):
    """What was asked for is closed to us, or wants a key."""


class CatalogError(RetrievalError):
    """Milvus answered with an error."""


class CatalogUnavailable(CatalogError):
    """Nobody answers at the Milvus address, or the collection is still loading."""


class CollectionGone(CatalogError):
    """What was asked of is not there: never filled, or cleared away meanwhile."""


class TooMuchToDelete(CatalogError):
    """A source lacks so much of what is stored that it looks cut short; nothing was deleted."""


class NotVerified(CatalogError):
    """A candidate was not verified, did not pass, or has changed since."""


class Unsupported(CatalogError):
    """This Milvus cannot do what was asked for."""
