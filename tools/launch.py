"""Starts a recipe on this machine, on a SLURM cluster or on a Ray cluster: docs/launch.md, and `--help`.

python tools/launch.py examples/demo.py --local
python tools/launch.py examples/orz_7b.py --slurm --nodes 4 --server-nodes 2
python tools/launch.py examples/orz_7b.py --ray --nodes 4 --server-nodes 2
"""

import sys

from megatron_orz.launch.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
