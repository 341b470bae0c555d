"""torchrun --standalone --nproc-per-node N -m hybridtrain.bench [key=value ...]"""

import sys

from hybridtrain.cli.commands import run_command
from hybridtrain.runtime.launch import leave, use_expandable_segments

if __name__ == "__main__":
    use_expandable_segments()
    leave(run_command("bench", sys.argv[1:]))
