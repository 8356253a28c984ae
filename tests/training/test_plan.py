"""The plan that a run prints: what depends on the machine alone."""

import os

import pytest
import torch

from medqa.training import plan


@pytest.mark.parametrize(
    "cpus, threads, processes, said",
    [
        (2, 2, 1, ""),
        (2, 1, 2, ""),
        (1, 2, 1, ""),
        (8, 1, 1, " with 1 of 8 CPUs (all of them: accelerate launch --num_cpu_threads_per_process 8 train.py ...)"),
        (8, 1, 2, " with 2 of 8 CPUs (all of them: accelerate launch --num_cpu_threads_per_process 4 train.py ...)"),
    ],
)
def test_idle_cpus_are_said_with_the_command_that_uses_them(cpus, threads, processes, said, monkeypatch):
    """`accelerate launch` sets one thread unless it is told otherwise."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert plan._idle_cpus(processes) == said
