"""Starts a recipe on this machine, on a SLURM cluster or on a Ray cluster. docs/launch.md tells more.

python tools/launch.py examples/demo.py --local                                           # this machine
python tools/launch.py examples/orz_0p5b.py --slurm --nodes 1 --partition h100             # one node, servers beside
python tools/launch.py examples/orz_7b.py --slurm --nodes 4 --server-nodes 2               # two train, two generate
python tools/launch.py examples/orz_7b.py --slurm --nodes 4 --server-nodes 2 --server-partition l40s   # of two kinds
python tools/launch.py examples/orz_7b.py --slurm --nodes 4 --server-nodes 2 --dry-run     # print the batch script
python tools/launch.py examples/orz_7b.py --ray --nodes 4 --server-nodes 2                 # on a Ray cluster
python tools/launch.py examples/demo.py --local -- --ppo.num-steps 10                      # options of the recipe

What is behind `--` goes to the recipe. A job that a signal stops is started again, and goes on from its checkpoint.
"""

import sys

from megatron_orz.launch.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
