"""What the trainer and its servers know, and nobody else on the machine: a token that every request carries.

It goes to the servers in their environment: the arguments of a process can be read by every user.
"""

from __future__ import annotations

import os
import secrets
from functools import cache

TOKEN_VARIABLE = "ORZ_SERVER_TOKEN"


@cache
def server_token() -> str:
    """The token of this run's servers; that of the environment where servers are given, and started by others."""
    return os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(32)


def share_token(token: str) -> None:
    """Makes the token of rank 0 that of this process, and of the servers it starts."""
    os.environ[TOKEN_VARIABLE] = token
    server_token.cache_clear()


def authorization() -> dict[str, str]:
    """The header of every request."""
    return {"Authorization": f"Bearer {server_token()}"}
