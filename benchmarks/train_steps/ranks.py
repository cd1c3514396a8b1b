"""One process as rank 0 of several that do not exist: collectives change nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as td
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel, distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from dinogen.distributed import process_group


def pretend(num: int) -> None:
    """Join a process group of ``num`` ranks, which says that it is NCCL's."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(num)}
    td.init_process_group("fake", store=FakeStore(), rank=0, world_size=num)
    td.get_backend = lambda group=None: "nccl"
    # They read shapes and weights of the other ranks.
    distributed._verify_param_shape_across_processes = lambda *args: True
    distributed._sync_module_states = lambda *args, **more: None
    gather = process_group.gather_counts
    process_group.gather_counts = lambda num: [num for _ in gather(num)]
    build = DistributedDataParallel.__init__

    def build_with_hook(self: DistributedDataParallel, *args: Any, **more: Any) -> None:
        build(self, *args, **more)
        self.register_comm_hook(None, _reduce)
        self.logger = mock.Mock()  # DDP's own would measure time by events of the device

    DistributedDataParallel.__init__ = build_with_hook


@contextmanager
def objects_arrive() -> Iterator[None]:
    """Context in which what rank 0 broadcasts as JSON arrives, for a device without values."""
    with mock.patch.object(
        process_group, "broadcast_object", lambda obj: json.loads(json.dumps(obj))
    ):
        yield


# torch looks at the annotations of a hook, which would have to be types and not their names.
def _reduce(state, bucket):  # noqa: ANN001, ANN202
    """What DDP does by itself, but for the result, which a fake process group does not have."""
    td.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
