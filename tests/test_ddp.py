"""Two processes train as one: also methods that share buffers (VeRA) and that remember what they computed (DoRA)."""

from __future__ import annotations

from pathlib import Path

import torch
from layers import close, config_of, randomise
from torch import Tensor, nn

from studio.adapters import AdapterPlan, inject

METHODS = ("dora", "vera")
BATCH = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(4))


class Task(nn.Module):
    """What DistributedDataParallel wraps: the base and its adapters, one set after the other on the same layers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).requires_grad_(False)
        plans = [AdapterPlan(("re:.*",), config=config_of(method)) for method in METHODS]
        self.sets = nn.ModuleList(inject({"model": self.model}, plan, {}) for plan in plans)
        for adapters in self.sets:
            randomise(adapters)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).square().mean()


def trained(task: Task, wrapped: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The adapters after three steps on `x`."""
    optimizer = torch.optim.AdamW([group for one in task.sets for group in one.parameter_groups(1e-2)])
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(x).backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in task.sets.named_parameters()}


def _process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    task = Task()
    torch.save(trained(task, nn.parallel.DistributedDataParallel(task), BATCH[rank::2]), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (tmp_path,), nprocs=2)
    task = Task()
    before = {name: parameter.detach().clone() for name, parameter in task.sets.named_parameters()}
    one = trained(task, task, BATCH)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, parameter in one.items():
        assert torch.equal(first[name], second[name]), name
        assert close(first[name], parameter) and not torch.equal(parameter, before[name]), name
