"""One arm of `compare.py` in a process of its own: `python -m benchmarks.worker job.json`."""

import sys

import torch

from benchmarks.gate import OURS, Done, Gate, Job


def main() -> None:
    """Do updates until told to stop. Each side imports only what it needs."""
    job = Job.read(sys.argv[1])
    gate = Gate(job.device)
    torch.set_num_threads(1)
    if job.arm in OURS:
        from benchmarks.ours import run
    else:
        from benchmarks.theirs import run
    try:
        run(job, gate)
    except Done:
        return
    raise SystemExit(f"{job.arm}: ran out of updates")


if __name__ == "__main__":
    main()
