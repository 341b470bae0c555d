"""torchrun --standalone --nproc-per-node N -m hybridtrain.bench [key=value ...]"""

import sys

from hybridtrain.command import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("bench", sys.argv[1:]))
