"""Whether a run may be submitted: no other job has it, no process trains it, and it has steps left."""

from __future__ import annotations

from hybridtrain.errors import refusal
from hybridtrain.run import identity, lock
from hybridtrain.submit import attempts, slurm
from hybridtrain.training import resume
from hybridtrain.training.job import Job

_ENDED = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
    "REVOKED",
    "SPECIAL_EXIT",
)
"""Job states after which Slurm does not run the job again by itself."""


def check(job: Job) -> identity.Choice:
    """The directory of a run.

    Raises UserError if another job has it, a process trains there, or it is finished. Reads only.
    """
    choice = identity.choose(job.config)
    if choice.before is not None:
        steps = resume.finished_steps(choice.path)
        if steps >= job.total_steps:
            problem = f"the run is finished, {steps} of {job.total_steps} steps are done"
            instead = f"train.steps={2 * steps} to go on, or another run.dir (run.name=NAME)"
            raise refusal("run.dir", choice.path, problem, allowed="a run with steps left", instead=instead)
        number = attempts.job_id(choice.path)
        state = slurm.states([number]).get(number, "") if number else ""
        if state and state not in _ENDED:
            problem = f"job {number} has this run already, and is {state}"
            raise refusal(
                "run.dir",
                choice.path,
                problem,
                allowed="one job for a run",
                instead=f"wait for it; scancel {number}; another run.dir (run.name=NAME)",
            )
    if (holder := lock.holder_elsewhere(choice.path)) is not None:
        raise lock.in_use(choice.path, by=holder)
    return choice
