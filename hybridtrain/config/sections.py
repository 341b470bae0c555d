"""Options of training, one section each; schema.py puts them together.

The string under a field is its documentation; `--help` prints it. Plain dataclasses (frozen ones make OmegaConf
nodes read-only), `str` checked against a tuple instead of Literal or enums (OmegaConf refuses or mis-matches those).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class Suggested(int):
    """A number of a configuration file that nobody asked for on the command line: a vocabulary, which the corpus may enlarge."""


PRECISIONS = ("fp32", "bf16_mixed", "bf16_pure", "fp16_mixed")


@dataclass
class RunFolder:
    """The `run` section of commands that look at a run."""

    dir: str = ""
    """Run directory; empty: runs/<experiment>."""
    name: str = ""
    """Name of the run for trackers; empty: the experiment's name."""


@dataclass
class RunConfig(RunFolder):
    seed: int = 0
    """Seed of the initial weights and the data order."""
    resume: str = "auto"
    """auto: continue from the newest complete checkpoint if there is one; never: refuse a directory that holds a run;
    required: refuse to start without a checkpoint."""
    branch_from: str = ""
    """Run directory (its newest checkpoint) or checkpoint folder from which a new run takes weights, optimizer, loss scale, step and tokens;
    schedule, rate, data, batch and layout may be others, the model not. Its own checkpoints count once it has some."""
    takeover: bool = False
    """Take the run over from the process that the lock of the directory names, though it may be alive: only when you know that it is not."""
    allow_data_change: bool = False
    """Resume even though the data or its order differ from the checkpoint's."""
    stop_signal: str = "USR1"
    """Besides TERM and INT, the signal at which training stops after its step, with a checkpoint; a second signal ends it at once."""
    stop_before_s: float = 60.0
    """Stop so many seconds before the end of the job's time, if HYBRIDTRAIN_DEADLINE (seconds since 1970) tells it, as our job script does."""
    plugins: list[str] = field(default_factory=list)
    """Modules of yours to import before anything is checked, which register what other options name (docs/extending.md). From the command line and
    your own configuration files only: those of a run that is read are not imported."""
    callbacks: list[str] = field(default_factory=list)
    """Registered callbacks that the run calls, in this order."""
    profile: bool = False
    """Write a torch profiler trace of steps 3 to 5 into the run directory (profile/), and on GPUs a snapshot of the allocator's memory."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that run.profile is about."""


@dataclass
class ModelConfig:
    name: str = ""
    """A label for people."""
    from_pretrained: str = ""
    """Hugging Face folder or hub id to start from; empty: initialise from `config`."""
    revision: str = "main"
    """Revision of the hub repository."""
    trust_remote_code: bool = False
    """Let transformers run code that a model repository ships."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's config.json; with from_pretrained: fields to change."""
    freeze: list[str] = field(default_factory=list)
    """Shell-style patterns of parameter names that are not trained, e.g. 'model.embed_tokens.*'."""
    attention: str = "sdpa"
    """Attention implementation: sdpa or eager."""
    labels: list[str] = field(default_factory=list)
    """task=classification: names of the classes, in the order of the head's rows; empty: those of the data, or of from_pretrained."""


@dataclass
class TaskConfig:
    kind: str = "causal_lm"
    """What is learnt: causal_lm, the next token; classification, one label for each document, from its last token; or a task that a module of run.plugins
    registers."""
    label_smoothing: float = 0.0
    """Share of a label's probability that training spreads evenly over all tokens (or classes)."""
    z_loss: float = 0.0
    """Training adds so many times the squared log of the softmax's normaliser to each token's loss, which keeps logits small; PaLM: 1e-4."""


@dataclass
class DataConfig:
    kind: str = "prepared"
    """prepared: the token files at `path` or `blend`; or the name of rows that a module of run.plugins registers, in their place."""
    path: str = ""
    """Folder of token files, written by `hybridtrain prepare`; or PREFIX of PREFIX.bin and PREFIX.idx, as Megatron writes them."""
    blend: dict[str, float] = field(default_factory=dict)
    """Instead of `path`: paths of several corpora, and their weights in the rows; an epoch is as many rows as all have together."""
    eval_path: str = ""
    """PREFIX of token files to evaluate on, for corpora without held-out documents; empty: those that `prepare` held out."""
    document_mask: bool = False
    """Documents in a row do not attend to each other, and positions count from each one's first token. Conversations always do so."""
    source: list[str] = field(default_factory=list)
    """What `prepare` reads: files, folders, patterns or Hugging Face datasets; 'stdlib' is the source of Python's own standard library."""
    format: str = "auto"
    """auto: by a file's ending; text (a file is a document), jsonl, parquet, datasets (what `save_to_disk` wrote, or what `load_dataset` takes:
    a folder or a hub id), chat (conversations, in any of the last three), labelled (texts with a label, in any of the same three). Text and
    JSONL may be compressed by gzip or zstd; JSON may also be one array of objects, or indented objects."""
    pattern: str = ""
    """Which files of a folder in `source` are read; empty: those with an ending of `format`, e.g. *.txt, *.jsonl, *.parquet."""
    encoding: str = "utf-8"
    """Encoding of text and JSONL files: any that Python knows, such as latin-1, cp1251, koi8-r, gb18030 or utf-16."""
    text_key: str = "text"
    """Field of a JSONL record, or column, that holds the text of a document."""
    label_key: str = "label"
    """labelled: field or column that holds the label of a text: one of `labels`, or its number."""
    labels: list[str] = field(default_factory=list)
    """labelled: names of the classes; their order numbers them from 0."""
    messages_key: str = "messages"
    """chat: field that holds the list of messages, each with role and content. With its default also read: conversations of from and value
    (ShareGPT), prompt and completion, instruction and output (Alpaca)."""
    dataset_config: str = ""
    """datasets: configuration of the dataset; empty: its default."""
    dataset_split: str = "train"
    """datasets: split to read."""
    deduplicate: bool = False
    """Of identical documents keep the first only."""
    tokenizer: str = "train"
    """Tokenizer folder or hub id; 'train': train a byte-level BPE on the source."""
    vocab_size: int = 4096
    """Vocabulary of the tokenizer that 'train' makes."""
    eval_fraction: float = 0.02
    """Share of documents held out for evaluation, chosen by a hash: of a text file's name, of a record's content."""
    append_eos: bool = True
    """Put the tokenizer's end-of-text token after each document; conversations end as their template says."""
    seq_len: int = 256
    """Tokens per row."""
    chat_template: str = "own"
    """Conversations: 'own' is the tokenizer's chat template; 'plain' gives it a simple one, for a tokenizer that has none."""
    chat_turns: str = "all"
    """Conversations: all answers are learnt, or the last one only. Where a template renders earlier answers otherwise than the last (Qwen3's
    takes their thinking out), each answer that is learnt is a sample of its own, with the messages up to it."""


@dataclass
class BatchConfig:
    global_batch_size: int = 8
    """Rows per optimizer step over all ranks."""
    micro_batch_size: int = 1
    """Rows per forward and backward on one data rank; grad_accum follows from the two."""


@dataclass
class TrainConfig:
    steps: int = 0
    """End after so many optimizer steps (0: not by steps)."""
    tokens: int = 0
    """End after so many tokens (0: not by tokens)."""
    epochs: float = 0.0
    """End after so many passes over the data (0: not by epochs)."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 0
    """Steps between evaluations on held-out rows (0: never)."""
    eval_rows: int = 64
    """Held-out rows per evaluation."""
    max_step_s: float = 1200.0
    """A step, or an evaluation or checkpoint after it, that takes longer is a hang: each rank writes its stacks and ends (0: never)."""
    max_nonfinite: int = 20
    """Stop after so many steps in a row without a finite gradient."""


@dataclass
class ParallelConfig:
    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = -1
    """Data-parallel replicas; -1 (one axis only): what the world size leaves."""
    dp_shard: int = 1
    """Data-parallel ranks that share one sharded copy (ZeRO 1 to 3)."""
    cp: int = 1
    """Context-parallel ranks; only 1 yet."""
    tp: int = 1
    """Tensor-parallel ranks."""
    zero_stage: int = 0
    """What dp_shard shards: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    sequence_parallel: bool = True
    """With tp > 1, shard activations outside attention and MLP over the sequence."""
    schedule: str = "1f1b"
    """Pipeline schedule: gpipe, 1f1b, interleaved_1f1b, looped_bfs, interleaved_zero_bubble, zbv_zero_bubble, dualpipev."""
    virtual_stages: int = 0
    """Stages per pipeline rank; 0: the fewest that the schedule works with."""


@dataclass
class EngineConfig:
    kind: str = "torch"
    """Training engine: torch or deepspeed."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    compile_backend: str = "inductor"
    """Backend of torch.compile: inductor (wants a C++ compiler on CPU), aot_eager or eager."""
    timeout_s: int = 1800
    """Seconds after which a collective that a rank never joined fails."""
    check_memory: bool = True
    """Refuse a layout whose weights, gradients and optimizer state are larger than the memory there is, before anything is allocated."""
    loss_chunk: int = 0
    """Tokens of a micro-batch whose logits are held at once; 0: as many as fit 8 MiB (a GPU: 256 MiB), but 256 at least."""
    fp32_matmul: str = "auto"
    """fp32 matrix products: highest, high (TF32 on GPUs) or medium (bf16 where the hardware has it), as
    torch.set_float32_matmul_precision takes them; auto: highest, on a CPU by oneDNN where that is measured to be as exact."""
    threads: int = 0
    """CPU: threads of each process; 0: the cores of the machine shared by its processes (an OMP_NUM_THREADS above 1 is obeyed)."""
    keep_freed_memory: bool = True
    """CPU: have glibc keep freed memory for the next step instead of returning it to the system."""
    offload_optimizer: str = "none"
    """engine=deepspeed: where fp32 weights and Adam moments live; none (the training device) or cpu."""
    offload_parameters: str = "none"
    """engine=deepspeed with zero_stage 3: where parameters live between uses; none (the training device) or cpu."""
    config_overrides: dict[str, Any] = field(default_factory=dict)
    """engine=deepspeed: keys added to DeepSpeed's own config; those that another field decides are refused."""


@dataclass
class PrecisionConfig:
    kind: str = "fp32"
    """fp32, bf16_mixed, bf16_pure or fp16_mixed. bf16_pure has no fp32 master weights: updates below 2^-9 of a weight are lost."""
    init_scale: float = 65536.0
    """fp16_mixed: first loss scale."""
    growth_factor: float = 2.0
    """fp16_mixed: factor after growth_interval finite steps."""
    backoff_factor: float = 0.5
    """fp16_mixed: factor after a step that was not finite."""
    growth_interval: int = 2000
    """fp16_mixed: finite steps in a row before the scale grows."""
    min_scale: float = 1.0
    """fp16_mixed: floor of the loss scale."""


@dataclass
class OptimConfig:
    kind: str = "adamw"
    """Optimizer: adamw, or one that a module of run.plugins registers."""
    lr: float = 3e-4
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices that no_decay does not name."""
    no_decay: list[str] = field(default_factory=lambda: ["*norm*", "*.bias"])
    """Shell-style patterns of parameter names without weight decay."""
    clip: float = 1.0
    """Clip the global gradient norm to this; 0: do not clip."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a registered optimizer, which its factory reads, e.g. {momentum: 0.9}."""


@dataclass
class ScheduleConfig:
    kind: str = "cosine"
    """Learning-rate schedule after warm-up: constant, linear, cosine, wsd (warm-up, stable, decay), or one that a module of run.plugins registers."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of optim.lr (linear, cosine, wsd)."""
    decay_steps: int = 0
    """wsd: steps of the final decay; 0: a tenth of the run."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a registered schedule, which it reads."""


@dataclass
class RecomputeConfig:
    kind: str = "none"
    """Activations recomputed in backward: none, selective (all but matrix products and attention) or full."""


@dataclass
class CheckpointConfig:
    every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Keep the newest so many; 0: all."""
    keep_every: int = 0
    """Also keep those whose step is a multiple of this; 0: none."""
    asynchronous: bool = True
    """Write while training goes on."""


@dataclass
class TrackerConfig:
    kinds: list[str] = field(default_factory=list)
    """Trackers besides metrics.jsonl: wandb, tensorboard, mlflow, trackio, dvclive, swanlab, comet_ml, clearml, or registered ones. Their files lie in
    the run directory; what wants a server works offline unless logged in."""
    project: str = "hybridtrain"
    """Project name for trackers that have one."""
