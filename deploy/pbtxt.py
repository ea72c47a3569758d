"""Triton's config files as the exporter writes them, read and written without protobuf.

The serve image has no protobuf, and a start may change a config. Only what our own files hold is
read: one field a line, `name: value` or `name {` … `}`, as protobuf's text format prints it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from retrieval_contract.errors import DeployError

FIELD = re.compile(r"\s*(\w+)(?:: (.+)| (\{))")


@dataclass
class Message:
    """Fields in their order; a value is the text that stands there, or a message."""

    fields: list[tuple[str, str | Message]] = field(default_factory=list)

    def __getitem__(self, name: str) -> str:
        """The one scalar of that name; DeployError when there is none."""
        for key, value in self.fields:
            if key == name and isinstance(value, str):
                return value
        raise DeployError(f"config: expected a field {name}; export the release again")

    def messages(self, name: str) -> list[Message]:
        """All messages of that name."""
        return [v for key, v in self.fields if key == name and isinstance(v, Message)]

    def set(self, name: str, value: str | Message) -> None:
        """In the place of all fields of that name, else at the end."""
        at = next((i for i, (key, _) in enumerate(self.fields) if key == name), len(self.fields))
        kept = [pair for pair in self.fields[at:] if pair[0] != name]
        self.fields = [*self.fields[:at], (name, value), *kept]

    def drop(self, name: str) -> None:
        """All fields of that name."""
        self.fields = [pair for pair in self.fields if pair[0] != name]

    def text(self, indent: str = "") -> str:
        """As the exporter writes it."""
        lines = []
        for name, value in self.fields:
            if isinstance(value, Message):
                lines.append(f"{indent}{name} {{\n{value.text(indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{name}: {value}\n")
        return "".join(lines)


def message_of(*fields: tuple[str, str | Message]) -> Message:
    """A message of these fields."""
    return Message(list(fields))


def quoted(text: str) -> str:
    """A string value; ours are names, which need no escapes."""
    return f'"{text}"'


def parse(text: str) -> Message:
    """Raises DeployError for a line that is none of the exporter's."""
    return _message(iter(text.splitlines()), top=True)


def _message(lines: Iterator[str], top: bool) -> Message:
    found = Message()
    for line in lines:
        if line.strip() == "}" and not top:
            return found
        match = FIELD.fullmatch(line)
        if not match:
            raise DeployError(
                f"config: expected `name: value` or `name {{`, got {line!r}; export the release "
                "again"
            )
        name, value, _ = match.groups()
        found.fields.append((name, value if value else _message(lines, top=False)))
    if not top:
        raise DeployError("config: expected a closing brace, got the end; export the release again")
    return found
