"""A run that real ranks trained and saved, and its export."""

import dataclasses
from pathlib import Path

import torch

from hybridtrain import engine as engines
from hybridtrain.config import schema
from hybridtrain.data.blend import open_data
from hybridtrain.data.loader import Loader, eval_batches
from hybridtrain.plan import layout as layouts
from hybridtrain.plan.batch import plan_batch
from hybridtrain.types import Progress
from tests.cases import model as model_fields

SEQ_LEN, EVAL_ROWS = 32, 5  # 5 rows do not fill the last step of 2 ranks x 2 micro-batches
PARALLEL = {"tp": 2, "dp_replicate": 1, "dp_shard": 2, "zero_stage": 2}


def settings(root: Path) -> schema.Config:
    config = schema.Config()
    config.run.dir, config.run.name = str(root / "run"), "run"
    config.data = schema.DataConfig(
        path=str(root / "data"),
        source=[str(root / "text")],
        vocab_size=300,
        eval_fraction=0.3,
        seq_len=SEQ_LEN,
    )
    config.model.config = model_fields(vocab_size=300, max_position_embeddings=64, tie_word_embeddings=True)
    config.batch = schema.BatchConfig(global_batch_size=4, micro_batch_size=1)
    config.train.eval_rows = EVAL_ROWS
    config.parallel = schema.ParallelConfig(**PARALLEL)
    return config


def train_and_save(root: Path) -> tuple[float, int]:
    """On each rank: two steps, training's own evaluation, a checkpoint.

    Returns loss sum and tokens of the evaluation.
    """
    config = settings(root)
    layout = layouts.resolve(config.parallel, world_size=4)
    plan = plan_batch(config.batch, layout=layout, seq_len=SEQ_LEN)
    engine = engines.build(config, layout=layout, plan=plan, device=torch.device("cpu"))
    data = open_data(config.data, timeout_s=0)
    share = {
        "plan": plan,
        "dp_rank": engine.mesh.dp_rank,
        "dp_size": layout.dp,
        "vocab": 300,
        "collate": engine.task.collate,
    }
    loader = Loader(data, seed=0, **share)
    for step in range(2):
        engine.train_step(loader.micro_batches(step), lr=1e-2)
    steps = eval_batches(data, rows=EVAL_ROWS, micro_batches_per_step=plan.grad_accum, **share)
    results = [engine.eval_step(batches) for batches in steps]
    engine.save(
        root / "run" / "checkpoints" / "step-00000002", Progress(step=2, tokens_seen=256, fingerprints={})
    ).result()
    return sum(result.values["loss"] for result in results), sum(result.counts["loss"] for result in results)


@dataclasses.dataclass(frozen=True)
class Trained:
    root: Path
    loss: float
    tokens: int

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / "step-00000002"
