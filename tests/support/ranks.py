"""A script for processes that share fake batches, to see how they start and how they end.

`python ranks.py raise|die`, with what a launcher sets in the environment. The one that dies makes
its own process group, as scripts do that train.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from emlens import _distributed


@dataclass
class Batch:
    input_ids: torch.Tensor
    index: tuple[int, ...]


@dataclass
class Model:
    name: str
    module: torch.nn.Module
    active_adapter: str | None = None


def main(ending: str) -> None:
    if ending == "die":
        dist.init_process_group("gloo")
    model = Model("fake", torch.nn.ReLU())
    batches = [Batch(torch.ones(1, 9 - i, dtype=torch.long), (i,)) for i in range(5)]
    rank = int(os.environ["RANK"])

    def read(mine):
        return [batch.index[0] for batch in mine]

    print(rank, _distributed.shared(model, batches, read, "places"), flush=True)

    def fail(mine):
        if ending == "raise" and rank == 1:
            raise ValueError(f"batch {mine[0].index} is odd")
        if ending == "die" and rank == 1:
            os._exit(3)
        return read(mine)

    _distributed.shared(model, batches, fail, "places")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    finally:
        if sys.argv[1] == "die":
            dist.destroy_process_group()
