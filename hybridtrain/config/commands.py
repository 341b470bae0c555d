"""Options of the commands beside training, one section each; schema.py puts them beside the training's own."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ExportConfig:
    checkpoint: str = ""
    """Checkpoint folder; empty: the newest complete one of the run."""
    out: str = ""
    """Folder to write; empty: <run>/export."""
    dtype: str = "float32"
    """dtype of the exported weights: float32, bfloat16 or float16."""
    max_shard_gb: float = 5.0
    """Largest safetensors file, in GB (10^9 bytes)."""


@dataclass
class EvaluateConfig:
    source: str = ""
    """Export folder, Hugging Face folder or hub id; empty: <run>/export."""
    rows: int = 0
    """Held-out rows; 0: as many as training's own evaluation."""


@dataclass
class GenerateConfig:
    source: str = ""
    """Export folder, checkpoint folder, Hugging Face folder or hub id; empty: <run>/export."""
    prompt: str = "def "
    """Text to continue."""
    prompts: list[str] = field(default_factory=list)
    """Several texts, instead of `prompt`."""
    prompts_file: str = ""
    """A UTF-8 file with a text on each line, instead of `prompt`."""
    chat: bool = False
    """The text is a message of a user, which the model's chat template turns into a prompt; the answer alone is printed."""
    system: str = ""
    """chat: the system message before it; empty: none."""
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer, besides the model's end tokens; what follows from there on is cut off."""
    seed: int = -1
    """Seed of the sampling; -1: run.seed."""
    max_new_tokens: int = 128
    """Tokens to sample."""
    temperature: float = 0.8
    """0: greedy."""
    top_p: float = 0.95
    """Nucleus sampling mass."""


@dataclass
class ParityConfig:
    layouts: list[str] = field(default_factory=list)
    """Layouts such as pp2-dp_shard2-tp2-zero3; empty: a set that fits the model and max_processes."""
    engines: list[str] = field(default_factory=list)
    """Engines to compare, each under every layout: torch, deepspeed; empty: engine.kind."""
    max_processes: int = 4
    """Largest layout of the default set, in processes."""
    steps: int = 3
    """Optimizer steps per layout."""
    shrink: bool = False
    """Cut the model's layers and width to laptop size, head ratios kept, and say so."""


@dataclass
class BenchConfig:
    warmup: int = 3
    """Steps of each side before the first round; compilation falls into them."""
    steps: int = 4
    """Steps per round."""
    rounds: int = 15
    """Rounds; in each both sides take a turn."""
    plain: bool = True
    """Also time a plain PyTorch loop over the same Hugging Face model: one process on rank 0's device, alone while it computes."""
    plain_compile: str = "layer"
    """What engine.compile compiles of the plain loop's model: each layer, or the whole model."""
    corpus: bool = False
    """Train on the corpus at data.path instead of random tokens, and tell which share of a step waits for it."""
    parts: bool = False
    """Profile two steps after the rounds and list the operations that take longest."""
    out: str = ""
    """JSON file for everything, each step's time included; empty: none."""


@dataclass
class PrepareConfig:
    overwrite: bool = False
    """Write again what is already prepared."""
    workers: int = 0
    """Processes that read and tokenise; 0: one per core, and none besides this one for a small corpus. One compressed file is read by one of them."""
    skip_bad: bool = False
    """Leave out and count records that cannot be read, instead of stopping at the first."""


@dataclass
class ReportConfig:
    out: str = ""
    """Folder for page and pictures; empty: <run>/report, or a folder in runs/compare for several runs. Files in it that no report wrote are not touched."""
    compare: list[str] = field(default_factory=list)
    """Runs to lay over one another, two or more; `--compare RUN RUN ...` is short for it. Empty: the one run."""


@dataclass
class ClusterConfig:
    partition: str = ""
    """Slurm partition; empty: the cluster's default. So are account, qos, constraint, exclude and mem."""
    account: str = ""
    """Account that is charged."""
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
    """Processes on each node; 0: one for each GPU, without GPUs one."""
    cpus_per_node: int = 0
    """CPUs of each node (0: what the cluster gives)."""
    time: str = "01:00:00"
    """Time limit, as sbatch takes it; training stops with a checkpoint before it is up, and goes on in a new attempt of the job."""
    signal_before_s: int = 120
    """Seconds before the time limit at which Slurm signals the job (run.stop_signal)."""
    max_restarts: int = 3
    """Restarts after failures; not counted: preemption and the time limit. After two attempts without a new checkpoint there is no third."""
    health_timeout_s: int = 120
    """How long nodes may take to find each other before training (0: no check)."""
    container_image: str = ""
    """Image for srun's --container-image (pyxis); `python` must be the image's."""
    container_mounts: str = ""
    """For srun's --container-mounts."""
    python: str = ""
    """Python on the nodes; empty: the one that runs `hybridtrain submit`."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job, e.g. NCCL_SOCKET_IFNAME."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Any other option of sbatch: {reservation: maintenance, exclusive: ''}."""
    dry_run: bool = False
    """Print the job's script and ask Slurm when it would run, and queue nothing; --dry-run is short for it."""
    array_at_once: int = 0
    """With --multirun: runs at the same time (0: as many as fit)."""


@dataclass
class RunsConfig:
    folder: str = "runs"
    """Folder whose run directories are listed."""


@dataclass
class LogsConfig:
    lines: int = 20
    """Lines to begin with."""
    follow: bool = True
    """Go on until the run has ended."""
