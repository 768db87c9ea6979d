"""SGLang's server, which answers those alone who know the run's token: `python -m megatron_orz.rollout.sglang_main`.

SGLang takes an API key as an argument, which every user of the machine can read, and logs all its arguments. Here the
key comes from the environment, after the arguments are read, and is a string that does not show itself. With a key set,
SGLang asks for it on every path but those below /health and /metrics.
"""

from __future__ import annotations

import os
import sys

from megatron_orz.rollout.token import TOKEN_VARIABLE


class Secret(str):
    """A string whose `repr`, which is what loggers of dataclasses print, shows nothing of it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Secret(...)"


def main(arguments: list[str]) -> None:
    """Runs the server until it is ended. Raises KeyError where the environment holds no token."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    # As the module that the server's subprocesses find it in: this one is __main__ here.
    from megatron_orz.rollout.sglang_main import Secret

    server_args = prepare_server_args(arguments)
    server_args.api_key = Secret(os.environ[TOKEN_VARIABLE])
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main(sys.argv[1:])
