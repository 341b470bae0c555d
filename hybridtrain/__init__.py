"""hybridtrain: hybrid-parallel training of Hugging Face language models, proven against one plain process.

    import hybridtrain as ht

    config = ht.compose("experiment=smoke", "parallel=ddp")     # the words of the command line
    result = ht.Trainer(config, data=MyRows(), callbacks=[MyCallback()]).fit()
    ht.export(result.run_dir, dtype="bfloat16")

The public names are imported when they are first used: `import hybridtrain` does not import torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridtrain.api import compose, export, parity
    from hybridtrain.errors import UserError
    from hybridtrain.registry import register
    from hybridtrain.run.trackers.kinds import Tracker
    from hybridtrain.tasks.causal_lm import CausalLM
    from hybridtrain.tasks.task import Task
    from hybridtrain.training.callbacks import Callback, Run, StepInfo
    from hybridtrain.training.trainer import Result, Trainer

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "CausalLM",
    "Result",
    "Run",
    "StepInfo",
    "Task",
    "Tracker",
    "Trainer",
    "UserError",
    "compose",
    "export",
    "parity",
    "register",
]
_HOME = {
    **dict.fromkeys(("compose", "export", "parity"), "hybridtrain.api"),
    **dict.fromkeys(("Callback", "Run", "StepInfo"), "hybridtrain.training.callbacks"),
    **dict.fromkeys(("Result", "Trainer"), "hybridtrain.training.trainer"),
    "UserError": "hybridtrain.errors",
    "register": "hybridtrain.registry",
    "Tracker": "hybridtrain.run.trackers.kinds",
    "CausalLM": "hybridtrain.tasks.causal_lm",
    "Task": "hybridtrain.tasks.task",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


class _Package(ModuleType):
    """Keeps `export` and `parity` functions: importing a subpackage of the same name would replace
    them by the module.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
