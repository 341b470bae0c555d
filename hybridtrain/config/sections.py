"""Options of training, one section each; schema.py combines them.

The docstring of an option is its help text. Dataclasses are not frozen, since OmegaConf would make their
nodes read-only. Options with fixed choices are `str`, checked in config/checks.py: OmegaConf does not support
Literal, and converts enums.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from hybridtrain.config.options import Options, options


class Suggested(int):
    """A vocabulary size from a configuration file, not the command line: a larger one of
    the corpus replaces it.
    """


@options
class RunFolder(Options):
    """The `run` section of commands that read a run."""

    dir: str = ""
    """Run directory; empty: runs/<run.name>."""
    name: str = ""
    """Name of the run, of its directory and in trackers; empty: the experiment's name."""


@options
class RunConfig(RunFolder):
    seed: int = 0
    """Seed of the initial weights and the data order."""
    resume: str = "auto"
    """auto: continue from the newest complete checkpoint if there is one; never: refuse a
    directory that holds a run;
    required: refuse to start without a checkpoint."""
    branch_from: str = ""
    """Run directory (its newest checkpoint) or checkpoint folder from which a new run takes weights,
    optimizer state, loss scale, step and token count. Schedule, learning rate, data, batch size and layout
    may differ, the model may not. Once the new run has checkpoints, it resumes from those."""
    takeover: bool = False
    """Ignore the lock of another process on the run directory. Use it only if you know that
    this process is dead."""
    allow_data_change: bool = False
    """Resume even though the data or its order differ from the checkpoint's."""
    stop_signal: str = "USR1"
    """Signal, besides TERM and INT, on which training finishes its step, writes a checkpoint and stops; a
    second signal ends it at once."""
    stop_before_s: float = 60.0
    """Seconds before the job's time limit at which training stops with a checkpoint. The limit is read from
    HYBRIDTRAIN_DEADLINE (seconds since 1970), which the job script of `hybridtrain submit` sets."""
    plugins: list[str] = field(default_factory=list)
    """Your own Python modules, which register tasks, data, callbacks ... under names for other options
    (docs/extending.md). Read only from the command line and your own configuration files: commands that read
    a run directory do not import the modules named in it."""
    callbacks: list[str] = field(default_factory=list)
    """Names of registered callbacks, called in this order."""
    profile: bool = False
    """Write a torch profiler trace of steps 3 to 5 into the run directory (profile/), and on GPUs a snapshot
    of the allocator's memory."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that run.profile traces."""


@options
class ModelConfig(Options):
    name: str = ""
    """Name of the model in printed output; changes nothing."""
    from_pretrained: str = ""
    """Hugging Face folder or hub id whose weights to start from; empty: new weights for the
    architecture in `config`."""
    revision: str = "main"
    """Revision of the hub repository."""
    trust_remote_code: bool = False
    """Let transformers run code that a model repository ships."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the Hugging Face config.json of the model; with from_pretrained: the fields to change."""
    freeze: list[str] = field(default_factory=list)
    """Shell-style patterns of parameter names that are not trained, e.g. 'model.embed_tokens.*'."""
    attention: str = "sdpa"
    """Attention implementation: sdpa or eager."""
    labels: list[str] = field(default_factory=list)
    """task=classification and token_classification: names of the classes, in the order of the head's rows;
    empty: those of the data, or of from_pretrained."""


@options
class TaskConfig(Options):
    kind: str = "causal_lm"
    """causal_lm: next-token prediction; classification: one label per document, predicted from its last token
    by a decoder, from all of them by an encoder; token_classification: one label per word, predicted at its
    first token; question_answering: an encoder finds the first and the last token of an answer in a context;
    masked_lm: an encoder predicts tokens that are masked; or the name of a task that a module of run.plugins
    registers."""
    label_smoothing: float = 0.0
    """Label smoothing in training: probability that is spread evenly over all tokens (or classes);
    evaluation uses none."""
    z_loss: float = 0.0
    """Coefficient of the z-loss, (log of the sum of exp(logits))^2, added to each token's loss in training to
    keep logits small; PaLM: 1e-4."""
    mask_rate: float = 0.15
    """masked_lm: share of the tokens that are predicted: of these, 80 % are masked, 10 % replaced by a random
    token, and 10 % left. Other ones each time that a row is seen; in evaluation always the same."""
    tokens: dict[str, int] = field(default_factory=dict)
    """masked_lm: ids of special tokens by name, which are never predicted: mask, and cls, which begins each
    row of text if there is one; classification of texts or words, and question answering, by an encoder: cls,
    which begins each text, and pad, which fills its row; empty: those of the data's tokenizer."""
    whole_words: bool = False
    """masked_lm: all tokens of a word are predicted, or none; what continues a word is told by the tokenizer
    (## before it, or no space before letters and digits)."""
    next_sentence: bool = False
    """masked_lm: also tell whether the second part of a row follows the first, as in the pre-training of
    BERT: a model ...ForPreTraining, and data prepared with data.sentences=true."""


@options
class DataConfig(Options):
    kind: str = "prepared"
    """prepared: the token files at `path` or `blend`; or the name of a dataset that a module of
    run.plugins registers."""
    path: str = ""
    """Folder of token files, written by `hybridtrain prepare`; or PREFIX, for token files PREFIX.bin and
    PREFIX.idx of Megatron."""
    blend: dict[str, float] = field(default_factory=dict)
    """Instead of `path`: several corpora, {path: weight}. The weights are shares of the rows; an epoch is as
    many rows as all corpora have together."""
    eval_path: str = ""
    """PREFIX of token files to evaluate on, for corpora without held-out documents; empty: the documents that
    `prepare` held out."""
    document_mask: bool = False
    """Documents in a row do not attend to each other, and positions restart at each document.
    Always on for conversations."""
    source: list[str] = field(default_factory=list)
    """What `prepare` reads: files, folders, glob patterns or Hugging Face datasets; 'stdlib' is the source
    code of Python's standard library."""
    format: str = "auto"
    """auto: by the file ending; text (each file is a document), jsonl, parquet, datasets (a folder of
    `save_to_disk`, or a folder or hub id for `load_dataset`), chat (conversations in jsonl, parquet or
    datasets), labelled (texts with a label in any of these three), labelled_words (lists of words, and of
    labels), answers (records of question, context, answer and answer_start, its first character). Text and
    JSONL may be compressed with gzip or zstd; JSON may also be one array of objects, or indented objects."""
    pattern: str = ""
    """Glob pattern of the files that are read in a folder of `source`; empty: those with an ending of
    `format`, e.g. *.txt, *.jsonl, *.parquet."""
    encoding: str = "utf-8"
    """Encoding of text and JSONL files: any that Python knows, such as latin-1, cp1251,
    koi8-r, gb18030 or utf-16."""
    text_key: str = "text"
    """Field of a JSONL record, or column, that holds the text of a document; labelled_words: its words."""
    label_key: str = "label"
    """labelled: field or column with the label of a text: a name in `labels`, or its number; labelled_words:
    with a list of these, one for each word."""
    labels: list[str] = field(default_factory=list)
    """labelled, labelled_words: names of the classes, numbered from 0 in this order."""
    messages_key: str = "messages"
    """chat: field with the list of messages, each with role and content. The default also reads ShareGPT
    (conversations of from and value), prompt and completion, and Alpaca (instruction and output)."""
    dataset_config: str = ""
    """datasets: configuration of the dataset; empty: its default."""
    dataset_split: str = "train"
    """datasets: split to read."""
    deduplicate: bool = False
    """Keep only the first of identical documents."""
    tokenizer: str = "train"
    """Tokenizer folder or hub id; 'train': train a byte-level BPE on the source."""
    vocab_size: int = 4096
    """Vocabulary size of the tokenizer that data.tokenizer=train trains."""
    encoder_tokens: bool = False
    """The tokenizer that data.tokenizer=train trains has the special tokens of an encoder's ([PAD], [UNK],
    [CLS], [SEP], [MASK]) instead of an end-of-text token; [SEP] ends each document."""
    eval_fraction: float = 0.02
    """Share of documents held out for evaluation, chosen by a hash: of a text file's name, of
    a record's content."""
    append_eos: bool = True
    """Append the tokenizer's end-of-text token, or the separator of one without, to each document;
    conversations end as their chat template says."""
    sentences: bool = False
    """Find the sentences of each document, and rows of data.seq_len tokens for task.next_sentence. Documents
    then have no end-of-text token."""
    seq_len: int = 256
    """Tokens per row."""
    chat_template: str = "own"
    """Conversations: 'own': the chat template of the tokenizer; 'plain': a simple template, for a
    tokenizer without one."""
    chat_turns: str = "all"
    """Conversations: all: train on every answer; last: only on the last one. If the template renders earlier
    answers differently from the last (Qwen3's removes their thinking), each trained answer is a sample of its
    own, with the messages before it."""

    @property
    def named(self) -> bool:
        """Whether there is data to train on: token files, or registered rows."""
        return bool(self.path or self.blend) or self.kind != "prepared"


@options
class BatchConfig(Options):
    global_batch_size: int = 8
    """Rows per optimizer step over all ranks."""
    micro_batch_size: int = 1
    """Rows per forward and backward pass on one data-parallel rank. Gradient accumulation follows:
    global_batch_size / (micro_batch_size x data ranks)."""
    ramp_start: int = 0
    """Batch-size ramp: rows of the first steps' global batch, which grows to
    global_batch_size; 0: no ramp."""
    ramp_increment: int = 0
    """Batch-size ramp: rows by which the global batch grows at a time."""
    ramp_steps: int = 0
    """Batch-size ramp: optimizer steps before the global batch has its full size; each size on the way
    lasts equally long."""
    seq_len_start: int = 0
    """Sequence-length warm-up: rows of the first steps are cut into pieces of this many tokens, which double
    in length up to data.seq_len; no token is left out. 0: rows stay whole."""
    seq_len_steps: int = 0
    """Sequence-length warm-up: optimizer steps before rows are whole; each length on the way
    lasts equally long."""


@options
class TrainConfig(Options):
    steps: int = 0
    """Number of optimizer steps to train for (0: no limit in steps)."""
    tokens: int = 0
    """Number of tokens to train for (0: no limit in tokens)."""
    epochs: float = 0.0
    """Number of passes over the data to train for (0: no limit in epochs)."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 0
    """Steps between evaluations on held-out rows (0: never)."""
    eval_rows: int = 64
    """Held-out rows per evaluation."""
    samples: list[str] = field(default_factory=list)
    """Prompts that the model continues at each evaluation, always with the most likely token; the texts are
    in samples.jsonl and in the report. For causal language models."""
    sample_tokens: int = 32
    """Tokens by which train.samples are continued. Each takes a forward pass over all of them."""
    guard_every: int = 0
    """Steps between checks that replicas of the parameters are bitwise equal on all ranks that have one
    (0: never). The run ends where they are not, and names parameter and ranks."""
    max_step_s: float = 1200.0
    """Seconds after which a step (or the evaluation or checkpoint after it) counts as hung: each rank writes
    its stack traces and exits (0: never)."""
    max_nonfinite: int = 20
    """Number of consecutive steps with a non-finite loss or gradient after which training stops. Those whose
    loss is finite do not count while the loss scale can still fall to precision.min_scale."""
    on_nonfinite: str = "skip"
    """When a loss or gradient is not finite, the step makes no update and is repeated to find where that
    began, which is an event of the run. Then: skip: go on, up to train.max_nonfinite; stop; rollback: to the
    last checkpoint, leaving out the data from there to this step, up to train.max_rollbacks. Gradients that
    overflow under a loss scale above its minimum are always skipped, and not repeated."""
    on_spike: str = "off"
    """Steps whose loss is far above that of the last 64: off: train on them; skip: make no update, up to
    train.max_spikes (on a GPU compared with the steps before the previous one); stop; rollback: as for
    train.on_nonfinite."""
    spike_threshold: float = 6.0
    """Smallest z of a loss spike: (log of the loss - median) / (1.4826 x median absolute deviation + 0.001)
    of the last 64 steps."""
    spike_grad_threshold: float = 0.0
    """z that the gradient norm of a spike must exceed too, which spares hard but sound batches: 3; 0: the
    loss decides alone."""
    max_spikes: int = 20
    """train.on_spike=skip: number of consecutive spikes after which training stops."""
    max_rollbacks: int = 3
    """Number of times that a run may go back to a checkpoint before it stops."""


@options
class ParallelConfig(Options):
    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = -1
    """Data-parallel replicas; -1 (on one axis only): world size divided by the other degrees."""
    dp_shard: int = 1
    """Data-parallel ranks over which ZeRO shards (see zero_stage)."""
    cp: int = 1
    """Context-parallel ranks; not supported yet, must be 1."""
    tp: int = 1
    """Tensor-parallel ranks."""
    zero_stage: int = 0
    """What is sharded over dp_shard: 0 nothing; 1 optimizer state; 2 also gradients; 3 also parameters."""
    sequence_parallel: str = "auto"
    """With tp > 1: also shard the activations outside attention and MLP, along the sequence; auto: if engine,
    model and rows allow it; true; false."""
    allow_replicated: bool = False
    """Run with tp > 1 although less than half of the layers' matrix products are cut; the rest is computed on
    every rank."""
    schedule: str = "1f1b"
    """Pipeline schedule: gpipe, 1f1b, interleaved_1f1b, looped_bfs, interleaved_zero_bubble,
    zbv_zero_bubble, dualpipev."""
    virtual_stages: int = 0
    """Stages per pipeline rank; 0: the smallest number that the schedule allows."""
    cut: list[int] = field(default_factory=list)
    """Layers, counted from 0, at which the second and later pipeline stages begin: [9, 17] for three stages;
    empty: the cut that takes the least time."""

    def __post_init__(self) -> None:
        self.sequence_parallel = str(self.sequence_parallel).lower()  # YAML has a true and false of its own


@options
class EngineConfig(Options):
    kind: str = "torch"
    """Training engine: torch or deepspeed."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    compile_backend: str = "inductor"
    """Backend of torch.compile: inductor (needs a C++ compiler on CPU), aot_eager or eager."""
    timeout_s: int = 1800
    """Timeout of collective operations, in seconds."""
    check_memory: bool = True
    """Refuse, before anything is allocated, a layout whose weights, gradients and optimizer state do
    not fit the memory."""
    loss_chunk: int = 0
    """Tokens per chunk in the computation of logits and loss; 0: as many as fit 8 MiB of logits (on a GPU 256
    MiB), but at least 256."""
    fp32_matmul: str = "auto"
    """Precision of fp32 matrix products, as in torch.set_float32_matmul_precision: highest, high (TF32 on
    GPUs) or medium (bf16 where the hardware has it); auto: highest, computed on CPUs by oneDNN where that was
    measured to be as exact."""
    threads: int = 0
    """CPU, and engine.offload_optimizer=cpu: threads per process; 0: the cores of the machine divided by its
    processes, or OMP_NUM_THREADS if that is above 1."""
    keep_freed_memory: bool = True
    """CPU: have glibc keep freed memory for the next step instead of returning it to the system."""
    offload_optimizer: str = "none"
    """Where optimizer state and master weights are kept, and the update is computed: none (the training
    device) or cpu. With engine=torch the device has the weights and their gradients, too."""
    offload_parameters: str = "none"
    """Where parameters are kept between uses: none (the training device) or cpu. engine=torch: with
    dp_shard=1 or zero_stage 3, and engine.offload_optimizer=cpu; then gradients are there, too.
    engine=deepspeed: with zero_stage 3."""
    config_overrides: dict[str, Any] = field(default_factory=dict)
    """engine=deepspeed: keys added to the DeepSpeed config; keys that another option sets are refused."""


@options
class RecomputeConfig(Options):
    kind: str = "none"
    """Activation checkpointing, recomputing activations in the backward pass: none, selective (all but matrix
    products and attention) or full."""


@options
class CheckpointConfig(Options):
    every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Number of newest checkpoints to keep; 0: all."""
    keep_every: int = 0
    """Also keep checkpoints whose step is a multiple of this; 0: none."""
    asynchronous: bool = True
    """Write checkpoints in the background while training continues."""


@options
class TrackerConfig(Options):
    kinds: list[str] = field(default_factory=list)
    """Trackers besides metrics.jsonl: wandb, tensorboard, mlflow, trackio, dvclive, swanlab, comet_ml,
    clearml, or registered ones. Their files are in the run directory; trackers that use a server work offline
    unless you are logged in."""
    project: str = "hybridtrain"
    """Project name for trackers that have one."""
