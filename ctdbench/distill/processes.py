"""Several processes train one network: by DDP or by FSDP2, as `accelerate launch` was told.

Under FSDP2 every process holds a share of the student, of its gradient and of the optimizer's
state. A layer is whole while it computes. Embeddings, head and the method's modules are one unit,
which is whole throughout a step, since blocks of rows read it outside of any forward.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, disable_fsdp_ram_efficient_loading
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from ctdbench.distill import models
from ctdbench.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ctdbench.distill.view import Network

UNSERVED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


def check(accelerator: Accelerator) -> None:
    """Raise UserError for a way to train that is not served; before the first model is loaded."""
    kind, started = accelerator.distributed_type, int(os.environ.get("WORLD_SIZE", "1"))
    if "LOCAL_RANK" in os.environ and started > 1 and accelerator.num_processes == 1:
        raise UserError(
            f"{started} processes were started, and accelerate finds no GPU for them",
            "set ACCELERATE_USE_CPU=true to train on processors",
        )
    if kind in UNSERVED or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        name = "FSDP version 1" if kind == DistributedType.FSDP else kind.value
        raise UserError(
            f"accelerate launch: {name} is not served",
            "use --multi_gpu, or --use_fsdp --fsdp_version 2",
        )
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy) or plugin.activation_checkpointing:
            raise UserError(
                "accelerate launch: FSDP's offloading and checkpointing of activations are not "
                "served",
                "leave out --fsdp_offload_params and --fsdp_activation_checkpointing",
            )
        plugin.cpu_ram_efficient_loading = False
    # Else only the first process gets weights from transformers. Teachers are never sharded, and a
    # tokenizer that moves in reads the student's: all processes need them.
    disable_fsdp_ram_efficient_loading()


def wrap(
    network: Network, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[nn.Module, Callable[[], Network]]:
    """The network to train, and what gives it whole: itself, or under FSDP2 a copy each time.

    Under FSDP2 both arguments change in place, and all processes have to ask for a copy together.
    """
    if not accelerator.is_fsdp2:
        return accelerator.prepare(network), lambda: network
    outline = _copy(network, [torch.empty_like(p, device="meta") for p in network.parameters()])
    _shard(network, optimizer, accelerator)
    return network, lambda: _copy(outline, map(whole, network.parameters()))


def _shard(network: Network, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    layers = models.layers(network.model)
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
    # Of a model whose layers return views. Nothing here changes them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    accelerator.prepare(network, optimizer)
    if layers and isinstance(layers[-1], FSDPModule):  # backward, and gradmag, begin with it
        layers[-1].set_reshard_after_forward(False)


def _copy(network: Network, values: Any) -> Network:
    """The network with these parameters; buffers and what is shared between modules as there."""
    memo = {
        id(parameter): nn.Parameter(value.detach(), parameter.requires_grad)
        for parameter, value in zip(network.parameters(), values, strict=True)
    }
    return copy.deepcopy(network, memo)  # type: ignore[arg-type]


def is_sharded(network: nn.Module) -> bool:
    """Whether processes hold shares of it; then all of them must call it equally often."""
    return isinstance(network, FSDPModule)


def gather(network: nn.Module) -> None:
    """Make embeddings, head and extra modules whole until the next backward; else no effect."""
    if isinstance(network, FSDPModule):
        network.unshard()


@contextmanager
def kept_whole(network: nn.Module) -> Iterator[None]:
    """Within, a backward leaves whole what it found or made whole."""
    if not isinstance(network, FSDPModule):
        yield
        return
    network.set_reshard_after_backward(False)
    try:
        yield
    finally:
        network.set_reshard_after_backward(True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which processes may hold shares; all of them must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, laid out as a parameter of its shape."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def clip(parameters: list[nn.Parameter], largest: float) -> Tensor:
    """Scale gradients to a norm of at most `largest`, over all of them; returns their norm."""
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(found))
    torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
