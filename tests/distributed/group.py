"""One process among several on this machine, as a launcher would have started it."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist


def join_group(rank: int, world: int, folder: Path, *, seconds: int) -> None:
    """Joins the default group, over gloo and a file in `folder`; a collective may take so many seconds."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for by accelerate; the store is what is used
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
