"""Says what is installed and what is missing, what each missing piece costs, and what to do about it.

python tools/doctor.py
python tools/doctor.py --no-imports --json
python tools/doctor.py --target cuda --server models/Qwen2.5-0.5B
"""

import sys
from importlib.util import find_spec


def main() -> None:
    if missing := [name for name in ("rich", "tyro") if find_spec(name) is None]:
        sys.exit(
            f"the doctor itself needs {' and '.join(missing)}, not installed here; run make setup (docs/install.md)"
        )

    from megatron_orz.command_line import plain_errors
    from megatron_orz.doctor import command
    from megatron_orz.terminal import console

    with plain_errors():
        sys.exit(command.run(console()))


if __name__ == "__main__":
    main()
