"""The torch-native engine: implements the Engine protocol with DTensor, FSDP2 and torch pipelining.

One step:  count targets -> forward and backward of all micro-batches -> gradients of shared parameters
           -> global norm -> update with clipping, unscaling and skipping (non-finite, no targets) inside
           the fused optimizer -> loss scale
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.analysis.slices import slicing_of_layout
from hybridtrain.checkpoint import origin, sharded
from hybridtrain.config.schema import Config
from hybridtrain.engine.common import agreed_slicing, global_counts, loss_of, named_sums
from hybridtrain.engine.monitored import OfTorch
from hybridtrain.models import adapters
from hybridtrain.models.build import hf_config, saved_buffers
from hybridtrain.models.init import fill
from hybridtrain.models.load import check_new
from hybridtrain.models.load import initial as initial_weights
from hybridtrain.models.source import read_config
from hybridtrain.models.structure import Structure
from hybridtrain.optim import matrices, optimizer
from hybridtrain.optim.average import Average
from hybridtrain.optim.shards import (
    LocalShard,
    Update,
    in_host_memory,
    like,
    local,
    read_weights,
    write_weights,
)
from hybridtrain.parallel.apply import Context, build_stages, converter, zero_stage_of
from hybridtrain.parallel.convert import adaptive_of
from hybridtrain.parallel.fsdp import ReducedSums, before_backward, reshard
from hybridtrain.parallel.grad_norm import agreed, gradient_norm
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.pipeline import Pipeline
from hybridtrain.parallel.shared import Shared, add_shared_gradients
from hybridtrain.parallel.slicing import add_partial_gradients
from hybridtrain.parallel.watch import Watcher, watching
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.plan.capabilities import of_engine
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.plan.schedules import stages_per_rank
from hybridtrain.plan.tensor import sequence_parallel
from hybridtrain.precision.loss_scale import OLDER, LossScaler
from hybridtrain.precision.policy import policy
from hybridtrain.runtime.flags import Flags
from hybridtrain.tasks.head import Head
from hybridtrain.tasks.task import Task
from hybridtrain.types import Batch, Progress, Saving, StepResult, Sums


class TorchEngine:
    """See types.Engine. Collective: every rank makes the same calls in the same order."""

    def __init__(
        self,
        config: Config,
        *,
        layout: ParallelLayout,
        plan: BatchPlan,
        device: torch.device,
        initial: bool,
        task: Task,
    ):
        self.capabilities = of_engine("torch")
        self.config, self.layout, self.plan, self.device, self.task = config, layout, plan, device, task
        self.flags = Flags(())
        self.spike_limits: tuple[float, float] | None = None
        self.precision = policy(config.precision)
        dtype = torch.promote_types(torch.float32, self.precision.compute)  # of losses and norms
        self.loss_weights = torch.tensor(list(task.weights.values()), device=device, dtype=dtype)
        self.mesh = Mesh(layout, device=device, timeout_s=config.engine.timeout_s)
        fields = read_config(config.model)
        self.model_config = hf_config(fields, chosen=config.model.config, attention=config.model.attention)
        sequence = sequence_parallel(config.parallel, plan=plan, tp=layout.tp)
        slicing = slicing_of_layout(self.model_config, tp=layout.tp, sequence=sequence)
        self.slicing = agreed_slicing(slicing, parallel=config.parallel, tp=layout.tp)
        self.adapted = config.adapters.kind != "none"
        if self.adapted and layout.tp > 1:
            self.slicing = adapters.sliced(self.slicing, config.adapters, config=self.model_config)
        context = Context.of(
            config, mesh=self.mesh, plan=plan, precision=self.precision, task=task, slicing=self.slicing
        )
        self.ids, self.stages = build_stages(self.model_config, context=context)
        self.converter = converter(context)
        self.adaptive = adaptive_of(config.precision, self.model_config)
        if initial or self.adapted:  # whose checkpoints do not have the model's own weights
            weights = initial_weights(config.model, self.model_config, seed=config.run.seed)
            if self.adapted:
                check_new(config.model, self.model_config, adapters=config.adapters)
                stored: Any = {"config": self.model_config, "dtype": self.precision.compute}
                weights = adapters.source(weights, config.adapters, **stored, seed=config.run.seed)
                weights = adapters.with_codes(weights, config.adapters, **stored)
            fill(self.stages, weights)
        self.place = torch.device("cpu") if config.engine.offload_optimizer == "cpu" else device
        """Where updates are computed."""
        self.optimizer = self._optimizer()
        decay = config.optim.ema
        self.average = Average(self.optimizer, decay=decay, device=self.place) if decay else None
        self.zero_stage = zero_stage_of(config.engine, config.parallel)
        in_parts = self.zero_stage >= 2 and self.precision.param != self.precision.reduce
        self.reduced = ReducedSums(parameter for _, parameter in self._named() if in_parts)
        self.scaler = LossScaler(config.precision, device=device)
        self.pipelines: dict[tuple[int, ...], Pipeline] = {}
        """(micro-batches, rows, length, sums) -> pipeline; several only if the batch grows with the step, and
        for samples."""
        if layout.pp > 1:
            self._pipeline(plan.grad_accum, plan.micro_batch_size, plan.seq_len)
        self.shared = Shared(
            self.stages,
            count=layout.pp * stages_per_rank(config.parallel),
            schedule=config.parallel.schedule,
            mesh=self.mesh,
        )

    def _optimizer(self) -> Update:
        config, shards = self.config, optimizer.local_shards(self._named())
        if config.engine.offload_optimizer == "cpu" and config.engine.offload_parameters == "none":
            shards = in_host_memory(shards)
        return optimizer.build(
            shards,
            config.optim,
            formats=optimizer.Formats.of(config.precision, seed=config.run.seed),
            parts=matrices.of_model(self.model_config) if config.optim.kind == "muon" else {},
            group=self.mesh.group("stage"),
        )

    def _pipeline(self, micro_batches: int, rows: int, length: int) -> Pipeline:
        shape, full = (
            (micro_batches, rows, length, len(self.task.weights)),
            (self.plan.grad_accum, self.plan.micro_batch_size, self.plan.seq_len),
        )
        if shape in self.pipelines:
            return self.pipelines[shape]
        parallel, layout, group = self.config.parallel, self.layout, self.mesh.group("pp")
        assert group is not None
        # A batch never shrinks: smaller pipelines are not needed again, and evaluations use the full one.
        self.pipelines = {key: pipeline for key, pipeline in self.pipelines.items() if key[:3] == full}
        self.pipelines[shape] = Pipeline(
            self.stages,
            ids=self.ids,
            count=layout.pp * stages_per_rank(parallel),
            schedule=parallel.schedule,
            micro_batches=micro_batches,
            group=group,
            zero_stage=parallel.zero_stage,
            device=self.device,
            dtype=self.precision.compute,
            rows=rows,
            length=length,
            positions=length // layout.tp if self.slicing.sequence else length,
            sums=shape[-1],
        )
        return self.pipelines[shape]

    # -- the Engine protocol
    # -----------------------------------------------------------------------------------

    def train_step(self, micro_batches: Sequence[Batch], *, lr: float) -> StepResult:
        """Forward, backward and update with this data rank's micro-batches (collective)."""
        return self._step(micro_batches, lr=lr, flags=self.flags, update=True)

    def replay(self, micro_batches: Sequence[Batch], *, loss_scale: Tensor, watcher: Watcher) -> StepResult:
        """Repeat a step without an update, and show `watcher` what it computes (collective).

        `loss_scale`: that of the step. Weights, optimizer and loss scaler stay as they are.
        """
        kept, self.scaler = self.scaler, copy.copy(self.scaler)  # whose tensors are replaced, not changed
        self.scaler.scale = loss_scale
        with self.watching(watcher):
            result = self._step(micro_batches, lr=0.0, flags=Flags(()), update=False)
        self.scaler = kept
        return result

    def _step(self, micro_batches: Sequence[Batch], *, lr: float, flags: Flags, update: bool) -> StepResult:
        for head_module in self._heads():
            head_module.clear()
        batches = [batch.to(self.device) for batch in micro_batches]
        counts = global_counts(batches, task=self.task, mesh=self.mesh, flags=flags)
        scale = self.scaler.scale
        factor = self.loss_weights * scale / counts.clamp(min=1)
        sums = (
            self._run_pipeline(batches, factor) if self.layout.pp > 1 else self._accumulate(batches, factor)
        )
        self.reduced.finish()
        self.mesh.sum(sums, over="loss")
        loss = loss_of(sums, counts, weights=self.loss_weights)
        if self.layout.tp > 1:
            add_partial_gradients(self.stages, group=self.mesh.group("tp"))
        add_shared_gradients(self.shared)
        scaled_norm = gradient_norm(self.shared.counted(), mesh=self.mesh, dtype=sums.dtype)
        loss, scaled_norm = agreed(torch.stack([loss, scaled_norm]), mesh=self.mesh).unbind()
        empty = (counts.sum() == 0).float()  # without targets: no update, and the loss scale stays
        nonfinite = (~torch.isfinite(scaled_norm + loss)).float() * (1 - empty)
        norm = scaled_norm / scale
        clip = self.config.optim.clip
        excess = (norm + 1e-6) / clip if clip > 0 else norm.new_zeros(())
        divide = scale * excess.clamp(min=1.0)
        spike, held = None, nonfinite + empty
        if self.spike_limits is not None:
            most_loss, most_norm = self.spike_limits
            spike = ((loss > most_loss) & (norm > most_norm)).float() * (1 - held)
            held = held + spike
        skip = (held if update else torch.ones_like(held)).to(self.place)
        self.optimizer.step(lr=lr, divide=divide.to(self.place), skip=skip)
        write_weights(self.optimizer.shards)
        if self.average is not None:
            self.average.update(skip=skip)
        self.scaler.update(nonfinite, empty=empty)
        return StepResult(loss, sums, counts, norm, nonfinite, empty, scale, self.scaler.scale, spike)

    @torch.no_grad()
    def eval_step(self, micro_batches: Sequence[Batch]) -> Sums:
        """Forward pass of grad_accum micro-batches; sums over all ranks (collective)."""
        batches = [batch.to(self.device) for batch in micro_batches]
        counts = global_counts(batches, task=self.task, mesh=self.mesh, flags=Flags(()))
        total = torch.zeros_like(self.loss_weights)
        for stage in self.stages:
            stage.eval()
        for sums in (
            self._pipeline_for(batches).evaluate(batches)
            if self.layout.pp > 1
            else [self._forward(batch) for batch in batches]
        ):
            total += sums
        for stage in self.stages:
            stage.train()
            reshard(stage)
        self.mesh.sum(total, over="loss")
        return named_sums(total, counts, task=self.task)

    def save(self, path: Path, progress: Progress) -> Saving:
        """Start writing a complete checkpoint (collective)."""
        return sharded.save(
            self.state(),
            path=path,
            progress=progress,
            group=self.mesh.checkpoint_group,
            asynchronous=self.config.checkpoint.asynchronous,
        )

    def load(self, path: Path) -> Progress:
        """Load a complete checkpoint of any layout (collective)."""
        stored = sharded.stored(path)
        self.optimizer.prepare(stored)
        state = {**self.state(), **self.scaler.older_state()}
        # Checkpoints of fp32 runs have no scaler, and older ones no buffers.
        missing = {f"model.{name}" for name in self._buffers()} - stored.keys()
        state = {
            key: value
            for key, value in state.items()
            if key in stored or not (key in missing or key.startswith(("scaler.", "ema")))
        }
        progress = sharded.load(state, path=path, group=self.mesh.checkpoint_group)
        read_weights(self.optimizer.shards)
        self.optimizer.adopt(state)
        write_weights(self.optimizer.shards)
        self.scaler.adopt(state, dp=origin.data_ranks(path) if OLDER in state else 1)
        self.shared.copy(self.optimizer)
        read_weights(self.optimizer.shards)
        if self.average is not None:
            self.average.adopt(stored)
        return progress

    def weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(Hugging Face name, parameter) of this rank's stages; a tied head has the embedding's
        name, and each name occurs once.
        """
        seen = set()
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                if (owner := stage.owner(name)) not in seen:
                    seen.add(owner)
                    yield owner, parameter

    def on_gradients(self, call: Callable[[Iterator[tuple[str, Any]]], None]) -> None:
        """Call once in the next step with (name, gradient) pairs: reduced, unscaled, before clipping."""

        def before() -> None:
            scale = float(self.scaler.scale)
            call(
                (item.name, self._on_device(item.parameter.grad, item) / scale)
                for item in self.optimizer.shards
                if item.parameter.grad is not None
            )

        self.optimizer.watch.append(before)

    def _on_device(self, gradient: Tensor, item: LocalShard) -> Tensor:
        """A gradient on the device, which can gather it."""
        return like(local(gradient).to(self.device), item.parameter, shape=item.parameter.shape)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        for stage in self.stages:
            yield from stage.named_modules()

    def change_formats(self, names: Mapping[str, str]) -> None:
        """Let linear layers of this rank, by path, multiply in other formats from the next step on."""
        for stage in self.stages:
            self.converter.change(stage, names)

    def watching(self, watcher: Watcher) -> AbstractContextManager[None]:
        """Show `watcher` what the modules of this rank compute in the steps inside (parallel/watch.py)."""
        return watching(self.stages, self.ids, watcher)

    def monitored(self) -> OfTorch:
        return OfTorch(self)

    def close(self) -> None:
        """Free everything that holds process groups; the caller leaves the process group."""
        self.pipelines.clear()
        self.stages.clear()

    # -- state -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything in a checkpoint, as tensors that share memory with the training."""
        model = {
            f"model.{name}": parameter.detach()
            for name, parameter in self.weights()
            if parameter.requires_grad or not self.adapted
        }
        model |= {f"model.{name}": buffer for name, buffer in self._buffers().items() if not self.adapted}
        average = self.average.state() if self.average is not None else {}
        return {**model, **self.optimizer.state(), **self.scaler.state(), **average}

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in checkpoints, parameter) for every parameter object of this rank."""
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                yield stage.owner(name), parameter

    def _buffers(self) -> dict[str, Tensor]:
        """Of this rank's stages, the buffers that are saved with the model."""
        return {name: buffer for stage in self.stages for name, buffer in saved_buffers(stage).items()}

    def _heads(self) -> Iterator[Head]:
        """The head module, on the rank that has it."""
        for stage in self.stages:
            if stage.last:
                head = stage.part(stage.structure.head)
                assert isinstance(head, Head)
                yield head

    @property
    def structure(self) -> Structure:
        return self.stages[0].structure

    # -- the step --------------------------------------------------------------------------------------------

    def _forward(self, batch: Batch) -> Tensor:
        return self.stages[0](batch.input_ids_BT, batch=batch)

    def _accumulate(self, batches: Sequence[Batch], factor: Tensor) -> Tensor:
        total = torch.zeros_like(self.loss_weights)
        for index, batch in enumerate(batches):
            sums = self._forward(batch)
            loss = (sums * factor).sum()
            before_backward(self.stages[0], zero_stage=self.zero_stage, last=index == len(batches) - 1)
            loss.backward()
            total += sums.detach()
        return total

    def _pipeline_for(self, batches: Sequence[Batch]) -> Pipeline:
        return self._pipeline(len(batches), *batches[0].input_ids_BT.shape)

    def _run_pipeline(self, batches: Sequence[Batch], factor: Tensor) -> Tensor:
        total = torch.zeros_like(self.loss_weights)
        for sums in self._pipeline_for(batches).step(batches, factor=factor):
            total += sums
        return total
