"""Options of the other commands, one section each. The docstring of an option is its help text."""

from __future__ import annotations

from dataclasses import field

from hybridtrain.config.options import Options, options


@options
class ExportConfig(Options):
    checkpoint: str = ""
    """Checkpoint folder; empty: the newest complete one of the run."""
    out: str = ""
    """Folder to write; empty: <run>/export."""
    dtype: str = "float32"
    """dtype of the exported weights: float32, bfloat16 or float16."""
    weights: str = "last"
    """last: those of the last step; ema: their average (optim.ema)."""
    merge: bool = False
    """Of a run with adapters: write the whole model with the adapters added to its weights, in place of a
    folder of adapters (as of peft)."""
    max_shard_gb: float = 5.0
    """Largest safetensors file, in GB (10^9 bytes)."""


@options
class EvaluateConfig(Options):
    source: str = ""
    """Export folder, Hugging Face folder or hub id; empty: <run>/export."""
    rows: int = 0
    """Held-out rows to use; 0: as many as the evaluations during training."""


@options
class LmEvalConfig(Options):
    tasks: list[str] = field(default_factory=list)
    """Tasks of EleutherAI's lm-evaluation-harness (pip install lm_eval), in which `hybridtrain evaluate`
    measures a model, `hybridtrain compare` each, and run.callbacks=[lm_eval] the last checkpoint of a run;
    empty: none."""
    task_folder: str = ""
    """Folder with task files of your own, which tasks may name too."""
    limit: int = 0
    """Examples of each task that are measured; 0: all."""
    batch_size: int = 8
    """Rows of a forward pass."""


@options
class GenerateConfig(Options):
    source: str = ""
    """Export folder, checkpoint folder, Hugging Face folder or hub id; empty: <run>/export."""
    prompt: str = "def "
    """Text to continue."""
    prompts: list[str] = field(default_factory=list)
    """Several texts, instead of `prompt`."""
    prompts_file: str = ""
    """A UTF-8 file with a text on each line, instead of `prompt`."""
    chat: bool = False
    """Treat the text as a user message: format it with the chat template of the model, and
    print only the answer."""
    system: str = ""
    """With chat: the system message; empty: none."""
    stop: list[str] = field(default_factory=list)
    """Stop strings, besides the end tokens of the model; the output is cut before the first of them."""
    seed: int = -1
    """Seed for sampling; -1: run.seed."""
    max_new_tokens: int = 128
    """Maximum number of new tokens."""
    temperature: float = 0.8
    """Sampling temperature; 0: greedy decoding."""
    top_p: float = 0.95
    """Probability mass of nucleus (top-p) sampling."""


@options
class InferenceConfig(Options):
    max_memory_gb: float = 0.0
    """Main memory for weights, in GB (10^9 bytes). What is beyond it and the memory of GPUs stays on disk and
    is read each time that it is needed; 0: what is free."""
    offload_folder: str = ""
    """Folder for weights on disk that are not used as the model's own files hold them, such as experts that
    are joined; empty: none."""
    guard: bool = True
    """Of a quantised folder whose layers round their inputs: compute a call with inputs as they are where
    these saturate or the output is not finite, and print how often."""


@options
class ParityConfig(Options):
    layouts: list[str] = field(default_factory=list)
    """Layouts to test, such as pp2-dp_shard2-tp2-zero3; empty: a default set that suits the
    model and max_processes."""
    engines: list[str] = field(default_factory=list)
    """Engines to test under every layout: torch, deepspeed; empty: engine.kind."""
    max_processes: int = 4
    """Largest number of processes in the default set of layouts."""
    steps: int = 3
    """Optimizer steps per layout."""
    shrink: bool = False
    """Test a smaller model: fewer layers and less width, with the same ratios of heads;
    the output says so."""


@options
class BenchConfig(Options):
    warmup: int = 3
    """Untimed steps of each side before the first round, which include compilation."""
    steps: int = 4
    """Steps per round."""
    rounds: int = 15
    """Rounds; in each, both sides are timed in turn."""
    plain: bool = True
    """Also time a plain PyTorch loop with the same Hugging Face model: one process on the device of rank 0,
    while all other ranks wait."""
    plain_compile: str = "layer"
    """With engine.compile: what is compiled in the plain loop, each layer (layer) or the
    whole model (model)."""
    corpus: bool = False
    """Train on the corpus at data.path instead of random tokens, and report the share of a step
    spent waiting for data."""
    parts: bool = False
    """Profile two steps after the rounds and list the operations that take the most time."""
    out: str = ""
    """JSON file for all results, including the time of each step; empty: none."""


@options
class InspectConfig(Options):
    tp: int = 2
    """Tensor-parallel ranks for which the model is examined; 1: not at all."""


@options
class PrepareConfig(Options):
    overwrite: bool = False
    """Prepare again, replacing an existing corpus."""
    workers: int = 0
    """Processes that read and tokenize; 0: one per core, or for a small corpus no additional process. A
    compressed file is read by a single process."""
    skip_bad: bool = False
    """Skip and count records that cannot be read, instead of stopping at the first one."""


@options
class ReportConfig(Options):
    out: str = ""
    """Folder for the page and plots; empty: <run>/report, or a folder in runs/compare for several runs. Other
    files in it are left alone."""
    compare: list[str] = field(default_factory=list)
    """Two or more runs to plot together; `--compare RUN RUN ...` is short for it. Empty:
    a report of one run."""


@options
class ClusterConfig(Options):
    partition: str = ""
    """Slurm partition; empty: the default of the cluster. The same holds for account, qos,
    constraint, exclude and mem."""
    account: str = ""
    """Slurm account to charge."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Features that nodes must have."""
    exclude: str = ""
    """Nodes not to use."""
    mem: str = ""
    """Memory of a node."""
    nodes: int = 1
    """Nodes of a job."""
    gpus_per_node: int = 0
    """GPUs of each node (0: train on its CPU)."""
    ranks_per_node: int = 0
    """Processes on each node; 0: one per GPU, or one without GPUs."""
    cpus_per_node: int = 0
    """CPUs of each node (0: the default of the cluster)."""
    time: str = "01:00:00"
    """Time limit, as for sbatch. Before it is reached, training stops with a checkpoint; the job is then
    requeued and resumes."""
    signal_before_s: int = 120
    """Seconds before the time limit at which Slurm signals the job (run.stop_signal)."""
    max_restarts: int = 3
    """Restarts after failures; preemption and the time limit do not count. A restarted attempt that saved no
    new checkpoint (if preempted: two in a row) is not restarted again."""
    health_timeout_s: int = 120
    """Seconds that nodes may take to reach each other in a check before training (0: no check)."""
    container_image: str = ""
    """Image for srun --container-image (pyxis); `python` must then be the path of Python in the image."""
    container_mounts: str = ""
    """Value for srun --container-mounts."""
    python: str = ""
    """Python on the nodes; empty: the one that runs `hybridtrain submit`."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job, e.g. NCCL_SOCKET_IFNAME."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Other sbatch options, e.g. {reservation: maintenance, exclusive: ''}."""
    dry_run: bool = False
    """Only print the job script and when Slurm expects to start it; queue nothing.
    --dry-run is short for it."""
    array_at_once: int = 0
    """With --multirun: largest number of runs at the same time (0: no limit)."""


@options
class RunsConfig(Options):
    folder: str = "runs"
    """Folder whose run directories are listed."""


@options
class LogsConfig(Options):
    lines: int = 20
    """Number of last lines to print first."""
    follow: bool = True
    """Keep printing new lines until the run ends."""
