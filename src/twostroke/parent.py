"""Ties a child process to the life of its parent.

``up`` passes its pid to every process it starts, and the child calls ``follow`` first thing in its own main. That is
preferred to a ``preexec_fn``, which runs Python between fork and exec and can deadlock once the parent has threads.
"""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def follow(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` dies, however it dies. No-op where there is no prctl.

    SIGKILL, because nobody would be left to end a process that hangs while it stops. A worker's KV pool is an anonymous
    memory file and goes with the process, so nothing is left behind.

    Raises:
        SystemExit: the parent died before this call, so the signal will never come.
    """
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except AttributeError:  # not Linux
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)
