"""torchrun --standalone --nproc-per-node N -m hybridtrain.train [key=value ...]"""

import sys

from hybridtrain.cli.commands import run_command
from hybridtrain.runtime.launch import leave

if __name__ == "__main__":
    leave(run_command("train", sys.argv[1:]))
