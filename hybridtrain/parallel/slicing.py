"""Tensor parallelism of one stage, with sequence parallelism and a vocabulary-parallel head.

    embed (rows of the vocabulary) -> [norm -> attention (heads) -> norm -> MLP (columns, rows)] -> norm
        -> head (vocabulary)
    hidden states between the blocks: Shard(1) over positions with sequence parallelism, else Replicate

All parameters become DTensors of one mesh, including those of norms, so that the gradient norm needs no
special case. Megatron-LM: arXiv 1909.08053; sequence parallelism: arXiv 2205.05198.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

from hybridtrain.models.stage import Stage
from hybridtrain.parallel.mesh import Mesh


def apply_tensor_parallel(stage: Stage, *, mesh: Mesh, sequence_parallel: bool) -> None:
    """Shard a stage on meta over the tp axis, in place. Call before fully_shard."""
    if mesh.layout.tp == 1:
        return
    parallelize_module(stage, mesh.tp, _plan(stage, tp=mesh.layout.tp, sequence_parallel=sequence_parallel))
    stage.tie()  # parallelize_module unties the weights
    missing = [name for name, parameter in stage.named_parameters() if not isinstance(parameter, DTensor)]
    assert not missing, f"no tensor-parallel style for {missing}"


def parameters_to_slice(stage: Stage, *, tp: int) -> set[str]:
    """Names of the parameters that are sharded over tp, according to the family's plan."""
    if tp == 1:
        return set()
    family = stage.family
    replicated = family.kv_projections if tp > stage.config.num_key_value_heads else ()
    kinds = {"colwise": ("weight", "bias"), "rowwise": ("weight",)}
    in_layer = [
        f"{path}.{kind}"
        for path, style in family.tp_plan.items()
        if path not in replicated
        for kind in kinds.get(style, ())
    ]
    names = {f"{family.layers}.{index}.{name}" for index in stage.layers for name in in_layer}
    names |= {f"{family.embed}.weight", f"{family.head}.weight"}
    return names & {name for name, _ in stage.named_parameters()}


def _plan(stage: Stage, *, tp: int, sequence_parallel: bool) -> dict[str, ParallelStyle]:
    family, config = stage.family, stage.config
    between = Shard(1) if sequence_parallel else Replicate()
    norm = SequenceParallel(use_local_output=False) if sequence_parallel else ReplicatedNorm()
    styles: dict[str, ParallelStyle] = {
        "colwise": ColwiseParallel(),
        "rowwise": RowwiseParallel(output_layouts=between),
        "norm": norm,
        "head_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
        "attention_input": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": between},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        ),
        "mlp_input": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),)),
    }
    plan: dict[str, ParallelStyle] = {}
    kv_heads = config.num_key_value_heads
    for index, layer in stage.layer_modules():
        path = f"{family.layers}.{index}"
        plan |= {f"{path}.{name}": styles[style] for name, style in family.tp_plan.items()}
        if tp > kv_heads:
            plan |= {
                f"{path}.{name}": RepeatedHeads(heads=kv_heads, repeats=tp // kv_heads)
                for name in family.kv_projections
            }
            layer.get_submodule(family.attention).num_key_value_groups = config.num_attention_heads // tp
    if stage.first:
        plan[family.embed] = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
    if stage.last:
        plan[family.norm] = norm
        plan[family.head] = VocabularyParallelHead()
    return plan


# the signature distribute_module calls
def _replicate(name: str, module: nn.Module, mesh: DeviceMesh) -> None:  # noqa: ARG001
    for key, parameter in list(module.named_parameters(recurse=False)):
        replicated = DTensor.from_local(parameter.data, mesh, [Replicate()], run_check=False)
        module.register_parameter(key, nn.Parameter(replicated, requires_grad=parameter.requires_grad))


class VocabularyParallelHead(ParallelStyle):
    """A head sharded over rows of the vocabulary.

    The loss does the communication (tasks/linear_cross_entropy.py).
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        weight: Any = module.weight
        module.register_parameter(
            "weight",
            nn.Parameter(
                distribute_tensor(weight, device_mesh, [Shard(0)]), requires_grad=weight.requires_grad
            ),
        )
        return module


class ReplicatedNorm(ParallelStyle):
    """A norm with a replicated DTensor weight, on replicated hidden states; converts
    local inputs to DTensors.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, _replicate, self._input, None)

    @staticmethod
    def _input(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:  # noqa: ARG004
        x = inputs[0]
        return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Replicate()], run_check=False)


class RepeatedHeads(ParallelStyle):
    """A replicated key or value projection with fewer heads than tp ranks: each head is
    used by `repeats` ranks.
    """

    def __init__(self, *, heads: int, repeats: int):
        super().__init__()
        self.heads, self.repeats = heads, repeats

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # an output hook may return
        return distribute_module(module, device_mesh, _replicate, None, self._output)  # type: ignore[arg-type]

    def _output(self, module: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:  # noqa: ARG002
        heads = output.unflatten(-1, (self.heads, -1)).repeat_interleave(self.repeats, dim=-2).flatten(-2)
        return heads.redistribute(placements=[Shard(-1)]).to_local()


class _WaitForCollective(torch.autograd.Function):
    """Waits for an asynchronous collective, and returns a plain tensor; the gradient is unchanged.

    With an AsyncCollectiveTensor as its input, a compiled layer computes a wrong gradient
    of the embedding, silently.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return (x.wait() if hasattr(x, "wait") else x).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]  # noqa: ARG004
        return grad


def wait_for_embedding(stage: Stage) -> None:
    """Keep asynchronous tensors out of compiled layers. For tensor parallelism with compilation."""
    if stage.first:
        embed = stage.part(stage.family.embed)
        embed.register_forward_hook(lambda module, inputs, output: _WaitForCollective.apply(output))  # noqa: ARG005
