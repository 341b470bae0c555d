"""The plain loop: an ordinary PyTorch training loop around a Hugging Face model, and the process it runs in.

fp32 master weights under autocast, fused AdamW, torch's own clipping, gradients accumulated over the
micro-batches of the whole global batch. It shares initial weights, tokens and settings with the engine, but
none of its code.

    this process  --pipe-->  serve()        a separate process, for its own memory, threads and settings
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridtrain import reference
from hybridtrain.bench.rounds import Memory, ProfiledOp, Round, Side, tokens_of
from hybridtrain.config.schema import BenchRoot
from hybridtrain.errors import refusal
from hybridtrain.models import adapters
from hybridtrain.models.build import hf_config
from hybridtrain.models.keyed import keyed
from hybridtrain.models.load import initial
from hybridtrain.models.patterns import is_frozen
from hybridtrain.models.source import read_config
from hybridtrain.models.structure import structure_of
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.precision.policy import policy
from hybridtrain.precision.rules import has_loss_scale
from hybridtrain.training import metrics
from hybridtrain.types import IGNORE_INDEX, Batch

_LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
)
_LEAVE_S = 10.0


@dataclass(frozen=True)
class PlainSettings:
    """Settings of the plain loop, which its process receives pickled."""

    config: BenchRoot
    plan: BatchPlan
    """All rows of the global batch in one process."""
    vocab: int
    threads: int
    """CPU threads: as many as all ranks of this host have together."""


class PlainLoop:
    """The model, its optimizer, and the training step."""

    def __init__(self, config: BenchRoot, *, device: torch.device) -> None:
        settings, self._device = config.optim, device
        precision = policy(config.precision)
        built = hf_config(
            read_config(config.model), chosen=config.model.config, attention=config.model.attention
        )
        source = initial(config.model, built, seed=config.run.seed)
        if config.adapters.kind != "none":
            stored: Any = {"config": built, "dtype": precision.compute}
            source = adapters.source(source, config.adapters, **stored, seed=config.run.seed)
            source = adapters.as_stored(source, config.adapters, **stored)
        self.model = reference.build_model(
            built, config.adapters, source=source, param=precision.param, device=device
        )
        self._dropouts = keyed(self.model, built, adapters=config.adapters)
        for name, parameter in self.model.named_parameters():
            frozen = is_frozen(name, freeze=config.model.freeze, adapters=config.adapters)
            parameter.requires_grad_(parameter.requires_grad and not frozen)
        if config.recompute.kind == "full":  # Hugging Face has no `selective`, which here is `none`
            # its older name
            recompute: Any = (
                getattr(self.model, "activation_checkpointing_enable", None)
                or self.model.gradient_checkpointing_enable
            )
            recompute({"use_reentrant": False})
        if config.engine.compile:
            layers = (
                self.model.get_submodule(structure_of(built).layers).children()
                if config.bench.plain_compile == "layer"
                else [self.model]
            )
            for module in layers:
                module.compile(backend=config.engine.compile_backend)
        self._autocast = precision.compute if precision.compute != precision.param else None
        self._scaler = torch.amp.GradScaler(
            device.type,
            init_scale=config.precision.static_scale or config.precision.init_scale,
            enabled=has_loss_scale(config.precision),
        )
        first, second = settings.betas
        groups = reference.parameter_groups(self.model, settings)
        self._optimizer = torch.optim.AdamW(
            groups, lr=settings.lr, betas=(first, second), eps=settings.eps, fused=True
        )
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._clip = settings.clip

    def step(self, micro_batches: list[Batch]) -> Tensor:
        """One optimizer step; the mean loss per valid token, 0-d on the device."""
        tokens = sum(int((batch.labels_BT != IGNORE_INDEX).sum()) for batch in micro_batches)
        total = torch.zeros((), device=self._device)
        for batch in (each.to(self._device) for each in micro_batches):
            ids_BT, labels_BT = batch.input_ids_BT, batch.labels_BT
            positions = {"position_ids": batch.position_ids_BT} if batch.packed else {}
            with self._dropouts.of(batch.keys_B, start=0, length=ids_BT.shape[1]):
                with self._casting():
                    logits_BTV = self.model(input_ids=ids_BT, use_cache=False, **positions).logits
                    loss = F.cross_entropy(
                        logits_BTV.float().flatten(0, 1),
                        labels_BT.flatten(),
                        ignore_index=IGNORE_INDEX,
                        reduction="sum",
                    ) / max(1, tokens)
                self._scaler.scale(loss).backward()
            total += loss.detach()
        self._scaler.unscale_(self._optimizer)
        if self._clip > 0:
            torch.nn.utils.clip_grad_norm_(self._trained, self._clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _casting(self) -> contextlib.AbstractContextManager[object]:
        return (
            torch.autocast(self._device.type, dtype=self._autocast)
            if self._autocast
            else contextlib.nullcontext()
        )


# -- its process ---------------------------------------------------------------------------------------------


class PlainProcess:
    """The plain loop in its own process, with the methods of a Side.

    Each raises UserError if that process fails.
    """

    def __init__(self, settings: PlainSettings) -> None:
        self._connection, theirs = Pipe()
        code = "import sys; from hybridtrain.bench.plain import serve; serve(int(sys.argv[1]))"
        environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHERS} | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path))
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment
        )
        theirs.close()
        self._ask(pickle.dumps(settings))

    def run(self, count: int) -> Round:
        return self._ask(("run", count))

    def profile(self, count: int) -> list[ProfiledOp]:
        return self._ask(("profile", count))

    def memory(self) -> Memory:
        return self._ask(("memory",))

    def close(self) -> None:
        """End the process, which exits when the pipe is closed."""
        self._connection.close()
        try:
            self._process.wait(timeout=_LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, question: Any) -> Any:
        try:
            self._connection.send(question)
            holds, answer = self._connection.recv()
        except (EOFError, OSError):
            holds, answer = False, f"its process died (exit code {self._process.wait()})"
        if not holds:
            self.close()
            raise refusal(
                "bench.plain",
                "true",
                f"the plain loop failed: {answer}",
                allowed="a model that one device can train, while this run is in memory, too",
                instead="bench.plain=false, or a smaller batch.micro_batch_size",
            )
        return answer


def serve(descriptor: int) -> None:
    """Build the plain loop from the settings in the first message, then answer requests until
    the pipe is closed.
    """
    connection: Connection = Connection(descriptor)
    try:
        side = _side(pickle.loads(connection.recv()))
        answer: Any = None
        while True:
            connection.send((True, answer))
            question, *arguments = connection.recv()
            answer = getattr(side, question)(*arguments)
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        connection.send(
            (False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        )


def _side(settings: PlainSettings) -> Side:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(settings.threads)
    before_gib = metrics.max_memory_gib(device)
    loop = PlainLoop(settings.config, device=device)
    tokens = tokens_of(
        settings.config,
        corpus=settings.config.bench.corpus,
        vocab=settings.vocab,
        plan=settings.plan,
        dp_rank=0,
        dp_size=1,
    )
    return Side(loop.step, tokens=tokens, device=device, before_gib=before_gib)
