"""Training on several devices: what Lightning leaves open.

Lightning starts a process for every further device and lets them work together (torch.distributed). Added here is that
a process which dies ends the run with a sentence; that fully sharded weights (FSDP2) lie in the same checkpoints as
whole ones, so that these move between numbers of devices and strategies; and that sharded weights can be averaged.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map_only

from convatlas.errors import Interrupted, Unsupported

__all__ = [
    "FullyShardedStrategy",
    "Launcher",
    "ShardedAveraging",
    "broadcast_buffers",
    "check_all_used",
    "end_with_parent",
    "every_process",
    "fix_buckets",
    "fully_sharded",
    "reshard",
    "together",
]

T = TypeVar("T")

_logger = logging.getLogger(__name__)


# -- processes ---------------------------------------------------------------------------------------------------------


class _Process(Protocol):
    returncode: int | None

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...


class Launcher(_SubprocessScriptLauncher):
    """Lightning's launcher; where one of the processes that it has started dies, this one says so and ends.

    Args:
        strategy: whose processes it starts.
        advice: how to go on, for the message.
    """

    #: Seconds that the broken connection to the dead process is given to end the training, before this process does.
    patience = 10.0

    def __init__(self, strategy: Any, advice: str) -> None:
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self.advice = advice
        self.helpers: Sequence[_Process] = ()
        self._left = threading.Event()

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        # Lightning's own observer is given this list next; it would kill this process without a word.
        self.helpers, self.procs = self.procs, []
        threading.Thread(target=self._watch, daemon=True, name="convatlas-watch").start()

    def ended(self, wait: float = 0.0) -> str:
        """How one of the processes has ended too early, and what to do; empty if none has within ``wait`` seconds."""
        until = time.monotonic() + wait
        while True:
            for number, helper in enumerate(self.helpers, 1):
                if code := helper.poll():
                    how = f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
                    return f"process {number} of the run {how}; {self.advice}"
            if time.monotonic() >= until:
                return ""
            time.sleep(0.05)

    def leave(self) -> None:
        """Stop watching: the training is over."""
        self._left.set()

    def stop(self) -> None:
        """Kill the processes that are still there."""
        for helper in self.helpers:
            if helper.poll() is None:
                helper.kill()

    def _watch(self) -> None:
        while not self._left.wait(0.5):
            message = self.ended()
            if message and not self._left.wait(self.patience):
                # The main thread waits for the dead process, within a collective that nothing can interrupt.
                _logger.error("error: %s", message)
                self.stop()
                os._exit(1)


_trained = threading.Event()


@contextmanager
def together(trainer: pl.Trainer, advice: str) -> Iterator[None]:
    """Within the context, the processes of ``trainer`` train; one that dies ends the run with a sentence.

    Args:
        trainer: whose strategy has not started its processes yet.
        advice: how to go on, for the message.

    Raises:
        Interrupted: a process has died.
        Unsupported: this process has trained with others before, which have ended.
    """
    strategy: Any = trainer.strategy
    if trainer.world_size > 1:
        if _trained.is_set():
            raise Unsupported("a process can train with several devices only once: start another one for this run")
        _trained.set()
    launcher = Launcher(strategy, advice) if isinstance(strategy.launcher, _SubprocessScriptLauncher) else None
    if launcher is not None:
        strategy._launcher = launcher
    joined = dist.is_available() and dist.is_initialized()
    try:
        yield
    except BaseException as error:
        broken = isinstance(error, RuntimeError)
        message = launcher.ended(wait=5.0) if launcher is not None and broken else ""
        if launcher is not None:
            launcher.stop()
        if message or isinstance(error, dist.DistError) or (broken and "by peer" in str(error)):
            raise Interrupted(message or f"another process of the run has ended; {advice}", 1) from error
        if broken and "Expected to have finished reduction" in str(error):
            raise Unsupported(_UNUSED.format("some parameters")) from error
        raise
    finally:
        if launcher is not None:
            launcher.leave()
    if not joined and dist.is_available() and dist.is_initialized():  # the first process goes on alone
        dist.destroy_process_group()


def end_with_parent() -> None:
    """End this process soon after the one that has started it, however that ends."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="convatlas-watch").start()


def every_process(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks; every process takes part."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the buffers of the first, as DistributedDataParallel does before every forward pass."""
    if buffers := [buffer.detach() for buffer in module.buffers()]:
        group = dist.distributed_c10d._get_default_group()
        dist._broadcast_coalesced(group, buffers, 250 << 20, 0)  # type: ignore[attr-defined]


_UNUSED = (
    "{} got no gradient from a batch, for which the strategy ddp would wait: freeze what the loss does not depend on, "
    "or set unused_parameters of the task or the method"
)


def check_all_used(network: nn.Module) -> None:
    """Refuse parameters that the loss does not depend on, for which DistributedDataParallel would wait.

    Raises:
        Unsupported: there are some.
    """
    unused = [name for name, value in network.named_parameters() if value.requires_grad and value.grad is None]
    if unused:
        raise Unsupported(_UNUSED.format(", ".join(unused[:3]) + (" and others" if len(unused) > 3 else "")))


def fix_buckets(network: nn.Module) -> None:
    """Let DistributedDataParallel on CPUs sum the gradients in the same order in every step.

    Otherwise it groups them anew after its first step, and a run that goes on rounds in one step as it would not have
    done had it not been stopped. On GPUs, which do not round alike in any case, the grouping serves speed.
    """
    if isinstance(network, DistributedDataParallel) and network.device_type == "cpu":
        network.reducer._push_all_rebuilt_params()
        network.reducer._rebuild_buckets()


# -- fully sharded data parallelism ------------------------------------------------------------------------------------


def fully_sharded(module: pl.LightningModule, network: nn.Module, mesh: DeviceMesh) -> None:
    """Share out the parameters of ``module``, in place: of each layer that ``network`` names, and of the rest.

    A layer is whole only while it computes, so a network that names none is whole during each step.

    Raises:
        Unsupported: a parameter is a scalar.
    """
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0:
            raise Unsupported(f"the strategy fsdp cannot share out the scalar {name}: take ddp")
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no other order of memory
    layers: list[nn.Module] = network.layers() if hasattr(network, "layers") else []  # type: ignore[operator]
    for layer in layers:
        if type(layer).forward is not nn.Module.forward:  # containers do not compute
            fully_shard(layer, mesh=mesh)
    # What no layer holds stays whole until `reshard`: a method may make backward passes of its own within a step.
    fully_shard(module, mesh=mesh).set_reshard_after_backward(False, recurse=False)
    for step in ("training_step", "validation_step"):  # a task may call what it likes of its network within them
        register_fsdp_forward_method(module, step)


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices, with checkpoints that hold whole tensors in the layout of a single device."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Start the process group; all devices are one data-parallel group."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state of the module, whole, in the first process; every process takes part."""
        return _whole(_model(self).state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of the optimizer, whole, in the first process; every process takes part."""
        return _whole(optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint in every process."""
        return self.checkpoint_io.load_checkpoint(Path(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Share out the weights of a checkpoint."""
        _load_whole(_model(self), checkpoint["state_dict"])

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning restores the optimizers, by `load_optimizer_state_dict`."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Share out the optimizer states of a checkpoint."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            state = dict(saved["state"])
            for saved_group, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
                for number, parameter in zip(saved_group["params"], group["params"], strict=True):
                    if number in state:
                        state[number] = {key: _share(value, parameter) for key, value in state[number].items()}
            optimizer.load_state_dict({**saved, "state": state})


def _model(strategy: ModelParallelStrategy) -> nn.Module:
    model = strategy.model
    if model is None:
        raise RuntimeError("the strategy has no model yet")
    return model


def _whole(tree: Any) -> Any:
    """Whole tensors on the CPU in place of shared ones; empty in all but the first process."""
    first = dist.get_rank() == 0

    def gathered(tensor: Tensor) -> Tensor | None:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole.cpu() if first else None  # no device holds all of them at once

    found = tree_map_only(Tensor, gathered, tree)
    return found if first else {}


def _share(value: Any, like: Any) -> Any:
    """This process's share of a whole tensor that belongs to ``like``; anything else as it is."""
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _load_whole(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    current = model.state_dict()
    model.load_state_dict({key: _share(value, current.get(key)) for key, value in state.items()})


class ShardedAveraging(EMAWeightAveraging):
    """Lightning's moving average of the weights, for weights that are shared out."""

    @property
    def state_key(self) -> str:
        """That of Lightning's, so that its state is found by one device too."""
        return EMAWeightAveraging.__qualname__

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Copy the module while it is whole, and share out the copy like the module itself."""
        self._average_model = AveragedModel(pl_module, pl_module.device, use_buffers=self._use_buffers, **self._kwargs)
        copied: Any = self._average_model.module
        fully_sharded(copied, copied.network, pl_module.device_mesh["data_parallel"])

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the whole average in the place of the weights."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        for part in ("state_dict", "averaging_state"):
            checkpoint[part] = _whole(checkpoint[part])

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Share out the weights and their average."""
        average = {f"module.{name}": value for name, value in checkpoint["state_dict"].items()}
        _load_whole(self._averaged(), {**average, **checkpoint["averaging_state"]})
        _load_whole(pl_module, checkpoint["current_model_state"])

    def _averaged(self) -> nn.Module:
        if self._average_model is None:
            raise RuntimeError("there is no average before the training begins")
        return self._average_model

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        reshard(pl_module)
        super()._swap_models(pl_module)

    def _copy_average_to_current(self, pl_module: pl.LightningModule) -> None:
        reshard(pl_module)
        super()._copy_average_to_current(pl_module)


def reshard(module: nn.Module) -> None:
    """Share out the parameters that a training or validation step has left whole."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
