"""The DeepSpeed engine: implements the Engine protocol with ZeRO 1-3, offload, layers
of AutoTP and PipelineModule.

    pp = 1   Stage -> AutoTP layers -> deepspeed.initialize (ZeRO 1, 2, 3)
    pp > 1   Stage -> AutoTP layers -> PipelineModule -> deepspeed.initialize (ZeRO 1)

Only this package imports deepspeed. Stages, initial weights, batches and checkpoints are those
of the torch engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.analysis.slices import slicing_for_linears
from hybridtrain.checkpoint import origin, sharded
from hybridtrain.checkpoint.fragments import Fragment
from hybridtrain.config.schema import Config
from hybridtrain.engine import deepspeed_config
from hybridtrain.engine.common import agreed_slicing, global_counts, loss_of, named_sums
from hybridtrain.engine.deepspeed import state, tensor
from hybridtrain.engine.deepspeed.monitored import OfDeepSpeed
from hybridtrain.engine.deepspeed.replay import replay, watching
from hybridtrain.engine.deepspeed.start import quiet, start
from hybridtrain.engine.deepspeed.state import FlatShard, ShardedTensor
from hybridtrain.models.build import hf_config, saved_buffers
from hybridtrain.models.init import fill_buffers, reset_buffers
from hybridtrain.models.load import initial as initial_weights
from hybridtrain.models.source import read_config
from hybridtrain.models.stage import Stage
from hybridtrain.optim.optimizer import adamw
from hybridtrain.optim.shards import set_rate
from hybridtrain.parallel import apply
from hybridtrain.parallel.grad_norm import agreed
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.plan.capabilities import of_engine
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.precision.loss_scale import OLDER, LossScaler
from hybridtrain.precision.policy import policy
from hybridtrain.runtime.flags import Flags
from hybridtrain.tasks.head import Head
from hybridtrain.tasks.task import Task
from hybridtrain.types import Batch, Progress, Saving, StepResult, Sums


class DeepSpeedEngine:
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
        self.capabilities = of_engine("deepspeed")
        self.config, self.layout, self.plan, self.device, self.task = config, layout, plan, device, task
        self.loss_weights = torch.tensor(list(task.weights.values()), device=device)
        self.flags = Flags(())
        self.spike_limits: tuple[float, float] | None = None  # always: config.checks refuses them
        self.updates = True
        self._after_step: list[Callable[[], None]] = []
        self.precision = policy(config.precision)
        self.adaptive = None
        self.settings = deepspeed_config.build(config, plan=plan)
        self.mesh = Mesh(layout, device=device, timeout_s=config.engine.timeout_s)
        self.stage_group = self.mesh.group("stage")
        fields = read_config(config.model)
        self.model_config = hf_config(fields, chosen=config.model.config, attention=config.model.attention)
        self.deepspeed = start(device)
        with quiet():
            self.grid = self._grid()
        self.stage, self.parts = self._stage()
        self.structure = self.stage.structure  # before DeepSpeed wraps it
        self.named = list(self.stage.named_parameters())  # ZeRO keeps these objects, and changes their data
        self.owner: Callable[[str], str] = self.stage.owner  # before DeepSpeed wraps it
        self.optimizer = adamw(
            [(self.owner(name), len(self.parts[name].shape), parameter) for name, parameter in self.named],
            config.optim,
        )
        self.pipe, self.engine = self._initialize()
        reset_buffers(self.stage, device=device)  # DeepSpeed casts them to 16 bits: an error of 0.4 % in RoPE
        self.buffers = saved_buffers(self.stage)
        # On the CPU: DeepSpeed waits for each step.
        self.scaler = LossScaler(config.precision, device=torch.device("cpu"))
        if self.scaler.enabled:
            with quiet():
                from hybridtrain.engine.deepspeed.scale import Scaler
            self.zero.loss_scaler = Scaler(self.scaler, dp=layout.dp)
        self.shards = state.flat_shards(self.zero, self.named, parts=self.parts)
        if initial:
            source = initial_weights(config.model, self.model_config, seed=config.run.seed)
            state.fill(self.shards, source, owner=self.owner)
            fill_buffers(self.buffers, source)
            state.update_model(self.zero)

    @property
    def zero(self) -> Any:
        """DeepSpeed's ZeRO optimizer, which wraps ours."""
        return self.engine.optimizer

    def _stage(self) -> tuple[Stage, dict[str, tensor.Part]]:
        """(this rank's stage with AutoTP layers and uninitialized weights, name -> its
        part of each parameter).
        """
        layout, config = self.layout, self.model_config
        index, group = self.mesh.coordinates["pp"], self.mesh.group("tp")
        slicing = slicing_for_linears(config, tp=layout.tp)
        slicing = agreed_slicing(slicing, parallel=self.config.parallel, tp=layout.tp)
        context = apply.Context.of(
            self.config,
            mesh=self.mesh,
            plan=self.plan,
            precision=self.precision,
            task=self.task,
            slicing=slicing,
        )
        head = partial(Head, task=self.task, loss_chunk=self.config.engine.loss_chunk)
        stage = Stage(
            config,
            layers=context.cut.layers[index],
            first=index == 0,
            last=index == layout.pp - 1,
            head=head,
        )
        parts = tensor.parts_of(stage, slicing, rank=self.mesh.coordinates["tp"], size=layout.tp)
        if group is not None:
            with quiet():
                tensor.replace_linears(stage, slicing, group=group)
            stage.dropouts.share(self.mesh.coordinates["tp"], cut=slicing.dropped)
        transforms = (apply.RECOMPUTE,)
        apply.transform(stage, context, order=transforms)
        if deepspeed_config.zero_stage(self.config) == 3:
            with quiet():
                state.allocate_sharded(
                    stage, dtype=self.precision.compute, settings=self.settings, mpu=self.grid
                )
        else:
            stage.to(self.precision.compute).to_empty(device=self.device)
        stage.tie()
        reset_buffers(stage, device=self.device)
        if group is not None:
            tensor.mark(stage, slicing, parts, group=group)
        apply.check(stage, context, order=transforms)
        return stage, parts

    def _grid(self) -> Any:
        """The groups of tensor parallelism in DeepSpeed's form (collective); with pp >
        1, PipelineModule creates them.
        """
        if self.layout.tp == 1 or self.layout.pp > 1:
            return None
        from deepspeed.runtime.pipe.topology import PipelineParallelGrid

        from hybridtrain.engine.deepspeed import pipe

        return PipelineParallelGrid(topology=pipe.topology(self.layout))

    def _initialize(self) -> tuple[Any, Any]:
        """(our layer in the pipeline or None, DeepSpeed's engine) (collective)."""
        with quiet():
            from hybridtrain.engine.deepspeed import pipe

            options: dict[str, Any] = {
                "config": self.settings,
                "optimizer": self.optimizer,
                "model_parameters": [p for _, p in self.named],
            }
            if self.layout.pp > 1:
                layer = pipe.StageLayer(self.stage)
                group = self.mesh.embedding_group()
                module = pipe.TiedPipelineModule(
                    layer, layout=self.layout, embedding_group=group, tied=self._tied()
                )
                return layer, self.deepspeed.initialize(model=module, **options)[0]
            options["mpu"] = self.grid
            return None, self.deepspeed.initialize(model=self.stage, **options)[0]

    def _tied(self) -> nn.Parameter | None:
        """This rank's copy of a tied matrix, on the first and the last stage."""
        if not self.stage.tied or not (self.stage.first or self.stage.last):
            return None
        module: Any = self.stage.part(self.structure.embed if self.stage.first else self.structure.head)
        return module.weight

    # -- the Engine protocol ---------------------------------------------------------------------------------

    def train_step(self, micro_batches: Sequence[Batch], *, lr: float) -> StepResult:
        """Forward, backward and update with this data rank's micro-batches (collective)."""
        if self.stage.last:
            head: Any = self.stage.part(self.structure.head)
            head.clear()
        batches = [batch.to(self.device) for batch in micro_batches]
        counts = global_counts(batches, task=self.task, mesh=self.mesh, flags=self.flags)
        # x dp: DeepSpeed averages over data ranks
        factor = self.loss_weights * self.layout.dp / counts.clamp(min=1)
        scale = self.scaler.scale.to(self.device)
        set_rate(self.optimizer, lr)
        empty = (counts.sum() == 0).float()
        # With found_inf = 1, torch's fused AdamW skips the update.
        found_inf = empty if self.updates else torch.ones_like(empty)
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        if self.scaler.enabled:
            self.zero.loss_scaler.empty = empty.cpu()
        sums = self._run_pipeline(batches, factor) if self.pipe else self._accumulate(batches, factor)
        self.mesh.sum(sums, over="loss")
        after, self._after_step = self._after_step, []
        for call in after:
            call()
        skipped = torch.tensor(float(bool(self.zero.overflow)), device=self.device)
        norm = torch.as_tensor(
            float("inf") if self.zero.overflow else self.engine.get_global_grad_norm(),
            dtype=torch.float32,
            device=self.device,
        )
        loss = loss_of(sums, counts, weights=self.loss_weights)
        loss, norm = agreed(torch.stack([loss, norm]), mesh=self.mesh).unbind()
        next_scale = self.scaler.scale.to(self.device)
        return StepResult(loss, sums, counts, norm, skipped * (1 - empty), empty, scale, next_scale)

    replay, watching = replay, watching

    @torch.no_grad()
    def eval_step(self, micro_batches: Sequence[Batch]) -> Sums:
        """Forward pass of grad_accum micro-batches; sums over all ranks (collective)."""
        batches = [batch.to(self.device) for batch in micro_batches]
        counts = global_counts(batches, task=self.task, mesh=self.mesh, flags=Flags(()))
        self.engine.eval()
        if self.pipe:
            self.pipe.begin(batches, factor=torch.ones_like(self.loss_weights))
            self.engine.eval_batch(self._inputs(batches), num_micro_batches=len(batches))
            losses = self.pipe.losses
        else:
            losses = [self._forward(batch) for batch in batches]
        self.engine.train()
        total = self._sum(losses)
        self.mesh.sum(total, over="loss")
        return named_sums(total, counts, task=self.task)

    def save(self, path: Path, progress: Progress) -> Saving:
        """Start writing a complete checkpoint in the format of the torch engine (collective)."""
        return sharded.save(
            self.state(),
            path=path,
            progress=progress,
            group=self.mesh.checkpoint_group,
            asynchronous=self.config.checkpoint.asynchronous,
        )

    def load(self, path: Path) -> Progress:
        """Load a complete checkpoint of any layout and engine (collective)."""
        stored = sharded.stored_keys(path)
        state.check_moments(stored, path=path)
        loaded: dict[str, Any] = {
            **state.tensors(self.shards, self.optimizer, owner=self.owner),
            **{key: buffer for key, buffer in self._saved_buffers().items() if key in stored},
            **self.scaler.state(),
            **self.scaler.older_state(),
        }
        loaded = {
            key: value for key, value in loaded.items() if key in stored or not key.startswith("scaler.")
        }
        progress = sharded.load(loaded, path=path, group=self.mesh.checkpoint_group)
        self.scaler.adopt(loaded, dp=origin.data_ranks(path) if OLDER in loaded else 1)
        self.read_scale()
        state.update_model(self.zero)
        return progress

    def weights(self) -> Iterator[tuple[str, ShardedTensor]]:
        """(Hugging Face name, fp32 master weight) of this rank's stage."""
        return self._sharded(lambda shard: shard.flat)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(self.stage.named_modules())

    def on_gradients(self, call: Callable[[Iterator[tuple[str, Any]]], None]) -> None:
        """Call once in the next step with (name, gradient) pairs: reduced, unscaled, before clipping."""
        gradients: dict[nn.Parameter, Tensor] = {}

        def copy(found: dict[nn.Parameter, Tensor], excess: float) -> None:
            gradients.update({flat: gradient * excess for flat, gradient in found.items()})

        self.on_update(copy)
        self._after_step.append(lambda: call(self._sharded(lambda shard: gradients[shard.flat])))

    def on_update(self, call: Callable[[dict[nn.Parameter, Tensor], float], None]) -> None:
        """Call before updates of the next step with (clipped gradients, the factor that undoes clipping)."""

        def before(optimizer: torch.optim.Optimizer, *_: object) -> None:
            norm, clip = float(self.zero._global_grad_norm), self.config.optim.clip
            found = {
                p: p.grad.detach() for g in optimizer.param_groups for p in g["params"] if p.grad is not None
            }
            call(found, max(1.0, (norm + 1e-6) / clip) if clip > 0 else 1.0)

        self._after_step.append(self.optimizer.register_step_pre_hook(before).remove)

    def monitored(self) -> OfDeepSpeed:
        return OfDeepSpeed(self)

    def close(self) -> None:
        """Free what DeepSpeed holds; the caller leaves the process group."""
        with quiet():
            self.engine.destroy()

    # -- state -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor | Fragment]:
        """Everything in a checkpoint, as fragments that share memory with the training."""
        shards = [shard for shard in self.shards if not self._is_copy(shard.name)]
        weights = state.tensors(shards, self.optimizer, owner=self.owner)
        return {**weights, **self._saved_buffers(), **self.scaler.state()}

    def read_scale(self) -> None:
        """Give DeepSpeed the scale of `scaler`, after it was set."""
        if self.scaler.enabled:
            self.zero.loss_scaler.read()

    def _saved_buffers(self) -> dict[str, Tensor]:
        return {f"model.{name}": buffer for name, buffer in self.buffers.items()}

    def _is_copy(self, name: str) -> bool:
        """Whether it is a tied head on another stage than the embedding, which is saved for both."""
        return self.layout.pp > 1 and self.owner(name) != name

    def _sharded(self, values: Callable[[FlatShard], Tensor]) -> Iterator[tuple[str, ShardedTensor]]:
        named = [(name, self.parts[name]) for name, _ in self.named]
        contributes = lambda part: part.sharded or self.mesh.coordinates["tp"] == 0  # noqa: E731
        for name, value in state.sharded_tensors(
            self.shards, named, values=values, contributes=contributes, group=self.stage_group
        ):
            yield self.owner(name), value

    # -- the step --------------------------------------------------------------------------------------------

    def _forward(self, batch: Batch) -> Tensor:
        return self.engine(batch.input_ids_BT, batch=batch)

    def _accumulate(self, batches: Sequence[Batch], factor: Tensor) -> Tensor:
        losses = []
        for batch in batches:
            sums = self._forward(batch)
            self.engine.backward((sums * factor).sum(), scale_wrt_gas=False)
            self.engine.step()
            losses.append(sums.detach())
        return self._sum(losses)

    def _run_pipeline(self, batches: Sequence[Batch], factor: Tensor) -> Tensor:
        self.pipe.begin(batches, factor=factor * len(batches))  # PipelineEngine averages over micro-batches
        self.engine.train_batch(self._inputs(batches))
        return self._sum(self.pipe.losses)

    def _inputs(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """The (ids, labels) that DeepSpeed loads on the first and the last stage; the labels are not used."""
        return zip(
            [batch.input_ids_BT for batch in batches],
            itertools.repeat(torch.zeros(1, device=self.device)),
            strict=False,
        )

    def _sum(self, losses: Sequence[Tensor]) -> Tensor:
        total = torch.zeros_like(self.loss_weights)
        for sums in losses:
            total += sums
        return total
