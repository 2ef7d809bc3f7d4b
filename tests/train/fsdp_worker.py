"""One process of ``test_fsdp``: trains a tiny model under FSDP and writes what it computed.

python fsdp_worker.py RANK WORLD FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard

from hyaena.config import ModelConfig
from hyaena.errors import UnsupportedError
from hyaena.filters import LongFilter
from hyaena.layers import Layer
from hyaena.model import StripedHyena
from hyaena.train.filters import parametrize_filters

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    layer_types=("hyena", "attention", "hyena"),
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    state_size=2,
    tie_embeddings=False,
)


def make_model(trainable: bool) -> StripedHyena:
    """Make the same model in every process, with raw poles or with poles as training has them."""
    torch.manual_seed(0)
    model = StripedHyena(CONFIG)
    if trainable:
        parametrize_filters(model)
    return model


def shard_1(model: StripedHyena, narrow: bool) -> nn.Module:
    """FSDP 1: filters are units of their own in float32, layers and the rest in the type of the policy."""
    policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if narrow else None
    options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
    for layer in model.layers:
        for name, module in layer.mixer.named_children():
            if isinstance(module, LongFilter):
                setattr(layer.mixer, name, FullyShardedDataParallel(module, **options))
    for index, layer in enumerate(model.layers):
        model.layers[index] = FullyShardedDataParallel(layer, mixed_precision=policy, **options)
    return FullyShardedDataParallel(model, mixed_precision=policy, **options)


def shard_2(model: StripedHyena, narrow: bool) -> nn.Module:
    """FSDP 2, the same."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mp_policy": policy} if narrow else {}
    for module in list(model.modules()):
        if isinstance(module, LongFilter):
            fully_shard(module, mesh=mesh)
    for module in list(model.modules()):
        if isinstance(module, Layer):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def refusal_1(model: StripedHyena) -> str:
    """What a forward pass says where FSDP 1 has one bfloat16 policy for the whole model."""
    policy = MixedPrecision(param_dtype=torch.bfloat16)
    wrapped = FullyShardedDataParallel(model, mixed_precision=policy, device_id=torch.device("cpu"))
    return refusal_of(wrapped)


def refusal_2(model: StripedHyena) -> str:
    """The same of FSDP 2."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return refusal_of(fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)))


def refusal_of(model: nn.Module) -> str:
    try:
        model(torch.zeros(1, 4, dtype=torch.long))
    except UnsupportedError as error:
        return str(error)
    return "nothing"


def losses_of(model: nn.Module, ids: Tensor, world: int, count: int = 3) -> list[float]:
    """Losses of a few SGD steps on these rows, averaged over the processes."""
    # Before the first forward: what FSDP 2 gathers replaces the parameters for a while.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(count):
        logits = model(ids).float()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def filter_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Return the dtypes of poles and residues while the model runs."""
    seen: set[torch.dtype] = set()

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.update({output.poles.dtype, output.residues.dtype})

    handles = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, LongFilter)]
    assert handles
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    for handle in handles:
        handle.remove()
    return seen


def main(rank: int, world: int, folder: Path) -> None:
    """Run every case, one after another; rank 0 writes ``result.pt``."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(1)
    ids = torch.randint(CONFIG.vocab_size, (2 * world, 40))
    mine = ids[rank::world]
    result: dict[str, Any] = {"ids": ids, "mine": mine}
    for trainable in (False, True):
        for name, shard in (("fsdp1", shard_1), ("fsdp2", shard_2)):
            for narrow in (False, True):
                model = shard(make_model(trainable), narrow)
                stored = {parameter.dtype for parameter in model.parameters()}
                losses = losses_of(model, mine, world)
                with torch.no_grad():
                    logits = model(mine).float()
                case = {"losses": losses, "logits": logits, "stored": stored, "filters": filter_dtypes(model)}
                result[f"{name}, {'bfloat16' if narrow else 'float32'}, {'trainable' if trainable else 'raw'}"] = case
    result["refusals"] = [
        refusal(make_model(trainable)) for refusal in (refusal_1, refusal_2) for trainable in (False, True)
    ]
    if rank == 0:
        torch.save(result, folder / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    sys.stderr.flush()
    os._exit(0)  # at an ordinary exit, a thread of the process group's sometimes aborts: "terminate called …"
