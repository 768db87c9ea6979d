"""Launches every CUDA kernel at awkward sizes, for compute-sanitizer to watch; compares nothing.

compute-sanitizer --tool memcheck python tests/ops/launch_every_kernel.py
"""

import sys
from itertools import product

import torch

from megatron_orz.ops.extension import has_kernel

ops = torch.ops.megatron_orz
DEVICE = torch.device("cuda")


def main() -> None:
    if not all(has_kernel(op, "cuda") for op in ("logits_stats", "dlogits", "packed_value_loss", "packed_gae")):
        sys.exit("the CUDA kernels are not built; see docs/install.md")

    # A warp a row and a block a row; rows that begin on 16 bytes and others; ragged ends.
    for n, v in product([0, 1, 5], [1, 31, 668, 4100, 4103]):
        logits = torch.randn(n, v, device=DEVICE)
        targets = torch.randint(0, v + 1, (n,), device=DEVICE)
        ops.logits_stats(logits, targets, 1, 0.7, True)
        of_rows = torch.randn(4, n, device=DEVICE).unbind()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            ops.dlogits(logits, targets, *of_rows, 1, 0.7, out=torch.empty_like(logits, dtype=dtype))
        ops.dlogits(logits, targets, *of_rows, 1, 0.7, out=logits)

    # One row and several turns of a block; one turn and several over the columns.
    for dtype, (num_tokens, hidden_size) in product(
        (torch.float32, torch.bfloat16, torch.float16), [(0, 64), (1, 1), (5, 101), (9, 896), (1100, 520), (3, 4104)]
    ):
        hidden = torch.randn(num_tokens, hidden_size, device=DEVICE, dtype=dtype)
        head = torch.randn(hidden_size, device=DEVICE, dtype=dtype)
        old_values, returns, weights = torch.randn(3, num_tokens, device=DEVICE)
        d_head = torch.zeros(hidden_size, device=DEVICE)
        ops.packed_value_loss(hidden, head, old_values, returns, weights.relu(), 0.2, d_head=d_head)

    # Around a thread's tokens, a warp's, a block's; no sequence; more of them than a block has threads.
    for dtype, lengths in product(
        (torch.float32, torch.float64), [[], [1], [4, 5, 0, 127, 128, 129], [1023, 1024, 1025, 3000], [2] * 300]
    ):
        rewards, values = torch.randn(2, sum(lengths), device=DEVICE, dtype=dtype)
        cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
        ops.packed_gae(rewards, values, cu_seqlens, rewards > 0, 0.99, 0.95)

    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
