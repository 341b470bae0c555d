"""A private Slurm on this machine: munged, slurmctld and a few slurmd, in a folder and on ports of its own,
as whoever runs the tests.

Debian's packages are enough; no systemd, no root, no cgroups. Nodes are n1, n2 ...; their host
name is this machine's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

COMMANDS = (
    "munged",
    "munge",
    "slurmctld",
    "slurmd",
    "slurmstepd",
    "sbatch",
    "srun",
    "scontrol",
    "squeue",
    "sinfo",
)
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
INSTALL = "apt-get install slurm-wlm munge"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
CONFIG = """
ClusterName=hybridtrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={slurmd}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
JobRequeue=1
KillWait=5
UnkillableStepTimeout=30
SlurmctldTimeout=30
SlurmdTimeout=15
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,requeue_delay=0,sched_min_interval=0
CompleteWait=0
"""


def missing() -> list[str]:
    """Commands of Slurm that are not installed."""
    return [command for command in COMMANDS if shutil.which(command, path=PATH) is None]


def _free(first: int, *, count: int) -> int:
    """The first port of `count` free ones, from `first` on: another session may have a cluster of its own."""
    for start in range(first, first + 1000, 100):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(start, start + count):
                    stack.enter_context(socket.socket()).bind(("0.0.0.0", port))
            except OSError:
                continue
        return start
    raise RuntimeError(f"no {count} free ports from {first} on")


class Slurm:
    """Started by the constructor; `stop` ends every process it started, and nothing else."""

    def __init__(self, *, nodes: int, port: int):
        # short: the path of a unix socket has 107 characters at most
        self.folder = Path(tempfile.mkdtemp(prefix="hts.", dir="/tmp"))
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.node_daemons: dict[str, subprocess.Popen[bytes]] = {}
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM_", "SBATCH_", "SRUN_"))
        }
        self.env = {**environment, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._configure(_free(port, count=10 + nodes))
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _configure(self, port: int) -> None:
        for name in ("log", "state", "munge", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        host = socket.gethostname().partition(".")[0]
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        lines = [CONFIG.format(host=host, port=port, slurmd=port + 1, user=user, folder=self.folder)]
        for number, node in enumerate(self.nodes):
            what = "CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN"
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 10 + number} {what}"
            )
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _daemon(self, *command: str) -> subprocess.Popen[bytes]:
        """In the foreground, so that the process we started is the daemon itself."""
        with (self.folder / "log" / f"{command[0]}-{len(self.daemons)}.out").open("wb") as out:
            process = subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.daemons.append(process)
        return process

    def _start(self) -> None:
        munge, files = self.folder / "munge", ("pid", "seed", "log")
        self._daemon(
            "munged",
            "-F",
            f"--socket={munge}/sock",
            f"--key-file={munge}/key",
            *(f"--{name}-file={munge}/{name}" for name in files),
        )
        self._until(
            lambda: (
                subprocess.run(
                    ["munge", "-S", munge / "sock", "-n"], env=self.env, capture_output=True, check=False
                ).returncode
                == 0
            )
        )
        self._daemon("slurmctld", "-D", "-i")
        for node in self.nodes:
            self.start_node(node)
        self._until(lambda: len(self.idle()) == len(self.nodes))

    def start_node(self, node: str) -> None:
        self.node_daemons[node] = self._daemon("slurmd", "-D", "-N", node)

    def idle(self) -> set[str]:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"],
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
        )
        return set(done.stdout.split())

    def _until(self, holds) -> None:
        end = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < end, "\n".join(
                path.read_text(errors="replace")[-2000:] for path in (self.folder / "log").iterdir()
            )
            time.sleep(0.05)

    def run(self, *command: str) -> str:
        """With this process's environment, as a user's shell."""
        environment = {**os.environ, "PATH": PATH, "SLURM_CONF": self.env["SLURM_CONF"]}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *, timeout_s: float) -> dict[str, str]:
        """The job once it has ended, however it did."""
        end = time.monotonic() + timeout_s
        while (found := self.job(job))["JobState"] not in ENDED:
            assert time.monotonic() < end, found
            time.sleep(0.1)
        return found

    def clear(self) -> None:
        """Cancel what is left, and have all nodes again."""
        subprocess.run(
            ["scancel", "-u", str(os.getuid())], env=self.env, capture_output=True, check=False, timeout=30
        )
        for node in self.nodes:
            subprocess.run(
                ["scontrol", "update", f"nodename={node}", "state=resume"],
                env=self.env,
                capture_output=True,
                check=False,
                timeout=30,
            )
        self._until(lambda: len(self.idle()) == len(self.nodes))

    def stop(self) -> None:
        subprocess.run(
            ["scancel", "-f", "-u", str(os.getuid())],
            env=self.env,
            capture_output=True,
            check=False,
            timeout=30,
        )
        time.sleep(0.5)
        for daemon in reversed(self.daemons):
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            if daemon.poll() is None:
                daemon.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
