"""The training loop, shared by every trainer."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from studio.config import OptimizerConfig, ScheduleConfig, TrainConfig
from studio.errors import StudioError
from studio.runs import Run
from trainers.checkpoint import load_checkpoint, save_checkpoint
from trainers.optim import make_optimizer, make_schedule
from trainers.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


class Batches:
    """Which samples belong to which micro-batch of which step: arithmetic, no state.

    A micro-batch of all processes together is one batch of the task; process p takes every
    `processes`-th sample of it, so one process and many see the same samples at the same step.
    """

    def __init__(self, task: Task, config: TrainConfig, process: int, processes: int) -> None:
        self._task = task
        self._size = config.batch_size * processes
        self._accumulation = config.gradient_accumulation
        self._process, self._processes = process, processes
        self._epoch: tuple[int, list[list[Any]]] = (-1, [])

    def _micro_batch(self, index: int) -> list[Any]:
        if self._epoch[0] < 0:
            self._epoch = (0, self._task.batches(0, self._size))
        epoch, place = divmod(index, len(self._epoch[1]))
        if epoch != self._epoch[0]:
            self._epoch = (epoch, self._task.batches(epoch, self._size))
        return self._epoch[1][place]

    def of_step(self, step: int) -> list[tuple[list[Any], float]]:
        """(samples of this process, what their summed loss counts) for each micro-batch of a step.

        Gradients of processes are averaged, hence the factor `processes`; a process without samples
        in a short batch computes one with weight 0, since all must take part.
        """
        first = step * self._accumulation
        batches = [self._micro_batch(index) for index in range(first, first + self._accumulation)]
        weight = self._processes / sum(map(len, batches))
        shares = [batch[self._process :: self._processes] for batch in batches]
        return [(share, weight) if share else (batch[:1], 0.0) for share, batch in zip(shares, batches, strict=True)]


def fit(
    task: Task,
    run: Run,
    accelerator: Accelerator,
    train: TrainConfig,
    optimizer_config: OptimizerConfig,
    schedule_config: ScheduleConfig,
) -> int:
    """Trains `task.adapters` to `train.steps`, or until the run is asked to stop; returns the last step.

    Resumes from the newest checkpoint of the run to the same bits. Raises StudioError when the
    loss is no longer finite.
    """
    optimizer = make_optimizer(optimizer_config, task.adapters.parameter_groups(optimizer_config.lr))
    schedule = make_schedule(schedule_config, optimizer, train.steps)
    wrapped, optimizer = accelerator.prepare(task, optimizer)
    batches = Batches(task, train, accelerator.process_index, accelerator.num_processes)
    state = _TrainingState(task, optimizer, schedule, accelerator)
    step = state.restore(run)
    run.update_status(step=step, total=train.steps, message="training")
    task.check(batches.of_step(0)[0][0])  # resumed runs too: it also decides which layers read together
    stop = _requests(run, accelerator)[0]
    if not stop and _sample_is_due(step, train):  # also where a run was killed before it had drawn
        _preview(task, run, step, accelerator)
    task.adapters.train()
    while step < train.steps and not stop:
        loss = _step(wrapped, task, batches, step, optimizer, schedule, accelerator, train.max_grad_norm)
        step += 1
        if not math.isfinite(loss):
            raise StudioError(
                f"the loss is {loss} at step {step}: lower the learning rate ({optimizer_config.lr:g}), or use "
                f"bf16 or fp32 instead of fp16. The last checkpoint is before it: {run.checkpoints}"
            )
        _record(run, accelerator, step, loss, optimizer)
        stop, save, sample = _requests(run, accelerator)
        last = step == train.steps
        if stop or save or last or (train.checkpoint_every and step % train.checkpoint_every == 0):
            state.save(run, step)
        if sample or (_sample_is_due(step, train) and (last or not stop)):
            _preview(task, run, step, accelerator)
    return step


def _sample_is_due(step: int, train: TrainConfig) -> bool:
    """At the start, at the end, and every so many steps: the same rule for a run that resumes."""
    return step in (0, train.steps) or bool(train.sample_every and step % train.sample_every == 0)


def _step(
    wrapped: torch.nn.Module,
    task: Task,
    batches: Batches,
    step: int,
    optimizer: Any,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    accelerator: Accelerator,
    max_grad_norm: float,
) -> float:
    """One optimizer step; returns the mean loss over all samples of all processes."""
    shares = batches.of_step(step)
    total = torch.zeros((), device=accelerator.device)
    for place, (items, weight) in enumerate(shares):
        last = place == len(shares) - 1
        with nullcontext() if last else accelerator.no_sync(wrapped):
            loss = wrapped(items, step).sum() * weight
            penalty = task.adapters.penalty()
            accelerator.backward(loss if penalty is None else loss + penalty / len(shares))
        total += loss.detach()
    if max_grad_norm and accelerator.sync_gradients:
        accelerator.clip_grad_norm_(task.adapters.parameters(), max_grad_norm)
    optimizer.step()
    if accelerator.optimizer_step_was_skipped:
        optimizer.zero_grad(set_to_none=True)  # fp16 gradients overflowed: a method's statistics don't see them
    else:
        schedule.step()
    task.adapters.after_step(step, optimizer)
    if task.rank_schedule is not None:
        task.rank_schedule.after_step(task.adapters, step, optimizer)
    optimizer.zero_grad(set_to_none=True)
    return float(accelerator.reduce(total, "mean"))


def _record(run: Run, accelerator: Accelerator, step: int, loss: float, optimizer: Any) -> None:
    """`lr` is the rate that the next step uses, one entry for each group of parameters."""
    metrics = {"loss": loss, **{group["name"]: group["lr"] for group in optimizer.param_groups}}
    if accelerator.optimizer_step_was_skipped:  # fp16 gradients overflowed; the scaler lowers its scale
        log.warning("step %d changed nothing: its fp16 gradients overflowed", step)
    run.log_metrics(step=step, **metrics)
    run.update_status(step=step, loss=loss, message="training")
    accelerator.log(metrics, step=step)


def _requests(run: Run, accelerator: Accelerator) -> tuple[bool, bool, bool]:
    """(stop, save, sample), as the main process sees them and all obey."""
    asked = [run.should("stop"), run.should("save"), run.should("sample")]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(asked)
    return asked[0], asked[1], asked[2]


def _preview(task: Task, run: Run, step: int, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        run.update_status(message="drawing samples")
        task.adapters.eval()
        task.preview(run, step)
        task.adapters.train()
        run.update_status(message="training")
    accelerator.wait_for_everyone()


class _TrainingState:
    """What a checkpoint holds, gathered from and put back into the objects that train."""

    def __init__(self, task: Task, optimizer: Any, schedule: Any, accelerator: Accelerator) -> None:
        self._task, self._optimizer, self._schedule, self._accelerator = task, optimizer, schedule, accelerator

    def save(self, run: Run, step: int) -> None:
        if not self._accelerator.is_main_process:
            return
        scaler = self._accelerator.scaler
        state = {
            "adapters": self._task.adapters.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
        }
        place = save_checkpoint(run.checkpoints, step, state)
        self._task.save(place / f"{run.id}-{step:06d}", step)

    def restore(self, run: Run) -> int:
        """Puts the newest checkpoint back; returns its step, 0 without one."""
        saved = load_checkpoint(run.checkpoints)
        if saved is None:
            run.rewind(0)  # killed before its first checkpoint: its metrics are of steps that come again
            return 0
        self._task.adapters.load_state_dict(saved["adapters"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self._schedule.load_state_dict(saved["schedule"])
        if self._accelerator.scaler and saved["scaler"]:
            self._accelerator.scaler.load_state_dict(saved["scaler"])
        run.rewind(saved["step"])
        log.info("resuming at step %d", saved["step"])
        return saved["step"]
