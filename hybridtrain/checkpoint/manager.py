"""When to save, where, and which checkpoints to keep.

checkpoints/step-00000100            complete
checkpoints/step-00000200.partial    being written, or left by a crash
checkpoints/step-00000050.removed    being removed, or left by a crash
"""

from __future__ import annotations

import re
from pathlib import Path

from hybridtrain.checkpoint import marker
from hybridtrain.config.schema import CheckpointConfig
from hybridtrain.errors import refusal
from hybridtrain.runtime import log
from hybridtrain.runtime.files import discard

_log = log.get("checkpoint")

_NAME = re.compile(r"step-(\d{8,})")


class Manager:
    """The checkpoints of one run, in `folder`. `prune` and `sweep` are for rank 0."""

    def __init__(self, folder: Path, *, settings: CheckpointConfig) -> None:
        self.folder = folder
        self.settings = settings
        self._not_removed: set[str] = set()
        """Names of checkpoints that could not be removed, of which a warning was logged."""

    def due(self, step: int, *, last: bool) -> bool:
        """Whether to save after `step` steps: every checkpoint.every steps, and after the last."""
        return last or (self.settings.every > 0 and step > 0 and step % self.settings.every == 0)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of `step`."""
        return self.folder / f"step-{step:08d}"

    def latest(self) -> Path | None:
        """The newest complete checkpoint; None if there is none.

        Raises UserError if its content is of another step than its name.
        """
        steps = self.steps()
        if not steps:
            return None
        newest = self.path(steps[-1])
        marker.check_sizes(newest, files=[(marker.PROGRESS, marker.read(newest)[marker.PROGRESS])])
        if (actual := marker.read_progress(newest).step) != steps[-1]:
            its_own = self.path(actual)
            raise refusal(
                "checkpoint",
                newest,
                f"it holds step {actual}: it was renamed",
                allowed=f"the checkpoint of step {steps[-1]} under this name",
                instead=f"mv {newest} {'ELSEWHERE' if its_own.exists() else its_own}, or remove it",
            )
        return newest

    def prune(self) -> None:
        """Remove complete checkpoints, except the newest `keep_last` and those whose step is
        a multiple of `keep_every`.

        One that cannot be removed is logged as a warning, and tried again after the next save.
        """
        keep_last, keep_every = self.settings.keep_last, self.settings.keep_every
        if keep_last == 0:
            return
        for step in self.steps()[:-keep_last]:
            if not (keep_every > 0 and step % keep_every == 0):
                self._remove(self.path(step))

    def sweep(self) -> None:
        """Remove folders that a crash left half-written or half-removed. Not during a save.

        Warns of what cannot be removed.
        """
        for ending in (marker.PARTIAL, marker.REMOVED):
            for path in sorted(self.folder.glob(f"step-*{ending}")):
                if path.is_dir():
                    discard(path)
                else:
                    _log.warning("%s is not a folder, so hybridtrain did not write it: it stays", path)
        for path in sorted(self.folder.glob("step-*")):
            if _NAME.fullmatch(path.name) and path.is_dir() and not marker.is_complete(path):
                _log.warning(
                    "%s has lost its %s: it does not count as a checkpoint, and stays", path, marker.MARKER
                )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        names = ((path, _NAME.fullmatch(path.name)) for path in self.folder.iterdir())
        return sorted(int(name[1]) for path, name in names if name and marker.is_complete(path))

    def _remove(self, path: Path) -> None:
        """Rename, then remove: a kill in between must not leave part of a checkpoint under its name.

        Removes a link, not its target.
        """
        try:
            removed = marker.free_name(path, ending=marker.REMOVED)
            path.rename(removed)
        except OSError as error:
            if path.name not in self._not_removed:
                _log.warning("%s cannot be removed and stays (%s)", path, error.strerror or error)
            self._not_removed.add(path.name)
            return
        discard(removed)
