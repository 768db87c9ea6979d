"""Files of conversations to learn from, one a line, in either of two forms.

{"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}
{"prompt": "2+2", "response": "4"}

Messages are those of a user and an assistant in turns; a system message may come before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from megatron_orz.data.reading import RowError, read_jsonl, text_of

Role: TypeAlias = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """What one of them says."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One row of a file: it ends with what the assistant says."""

    messages: tuple[Message, ...]
    place: str
    """Where it stands: `train.jsonl: line 3`."""


def read_conversations(path: Path) -> Iterator[Conversation]:
    """The conversations of a .jsonl file, line by line.

    Raises ValueError naming the file, the line, the rule and the remedy.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check data.train and data.held_out")
    if path.suffix != ".jsonl":
        raise ValueError(f"{path}: conversations are read from .jsonl files; write one conversation a line")
    is_empty = True
    for place, row in read_jsonl(path):
        if isinstance(row, RowError):
            raise row
        is_empty = False
        yield Conversation(messages=_messages(row, place), place=place)
    if is_empty:
        raise ValueError(f"{path}: holds no conversations; remove it from the list of files, or fill it")


def _messages(row: Any, place: str) -> tuple[Message, ...]:
    match row:
        case {"messages": list(items)}:
            messages = tuple(_message(item, number, place) for number, item in enumerate(items, start=1))
        case {"prompt": prompt, "response": response}:
            return (
                Message(role="user", content=text_of(prompt, "prompt", place)),
                Message(role="assistant", content=text_of(response, "response", place)),
            )
        case _:
            rule = 'holds no conversation; write {"messages": [...]} or {"prompt": ..., "response": ...}'
            raise RowError("missing_column", place, rule)
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        rule = f"the roles {', '.join(roles) or 'none'} are not user and assistant in turns, after at most one system"
        raise RowError("wrong_type", place, f"{rule}; end it with what the assistant says, or remove it")
    return messages


def _message(item: Any, number: int, place: str) -> Message:
    match item:
        case {"role": ("system" | "user" | "assistant") as role, "content": content}:
            return Message(role=role, content=text_of(content, f"content of message {number}", place))
    rule = f"message {number} is not an object with a content and one of the roles {', '.join(get_args(Role))}"
    raise RowError("wrong_type", place, f"{rule}; correct it")
