"""Signals that stop a run: it finishes the step, saves a checkpoint, and exits with 128 + the signal's number."""

import os
import signal

from machine import ranks

# Slurm can send SIGUSR1 before it preempts a job; a terminal that is closed sends SIGHUP
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


class StoppedError(Exception):
    """A signal asked the run to stop, and its state is saved."""


class StopSignals:
    """Inside `with`, records the signals of `STOP_SIGNALS` instead of ending the process.

    A signal that was ignored when the program began, such as SIGHUP by nohup, stays ignored.

    received: the first signal of this process; agreed: the signal that all ranks stop for. Both are None until a signal
    comes. A SIGINT after another signal ends the process at once.
    """

    def __init__(self):
        self.received = self.agreed = None

    def __enter__(self):
        recorded = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.handlers_before = {number: signal.signal(number, self._record) for number in recorded}

    def __exit__(self, *exception):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def _record(self, number, frame):
        repeated = self.received is not None and number == signal.SIGINT
        if repeated and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun sends a second SIGINT for one Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = self.received or signal.Signals(number)
        if ranks.size() == 1:
            self.agreed = self.received

    def flags(self):
        """A number for each of `STOP_SIGNALS`: 1 if this rank received it, else 0. To be summed over the ranks."""
        return [float(self.received == number) for number in STOP_SIGNALS]

    def agree(self, sums):
        """Set `agreed` to the first of `STOP_SIGNALS` that any rank received. sums: the sum of all ranks' `flags`."""
        self.agreed = next((number for number, total in zip(STOP_SIGNALS, sums) if total > 0), None)
