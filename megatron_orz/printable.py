"""Text of a model, made safe to look at."""

import unicodedata


def printable(text: str) -> str:
    """The text with every character that could move a cursor or turn the text around spelt out.

    >>> printable("a\\x1b[2J\\u202eb")
    'a\\\\u001b[2J\\\\u202eb'
    """
    return "".join(
        f"\\u{ord(c):04x}" if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text
    )
