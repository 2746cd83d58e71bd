"""Signals that ask a run to stop: it finishes its step, saves itself, and exits with 128 + the signal's number."""

import os
import signal

from running import ranks

# SIGUSR1 is what Slurm sends ahead of a preemption
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StoppedError(Exception):
    """A signal asked the run to stop, and its state is saved."""


class StopSignals:
    """Notes, inside `with`, the signals that ask this process to stop, instead of ending at once.

    received: the first that this process got; agreed: the one that all ranks stop for; both None until there is one.
    A SIGINT after another signal stops the process at once.
    """

    def __init__(self):
        self.received = self.agreed = None

    def __enter__(self):
        self.handlers_before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def __exit__(self, *exception):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        repeated = self.received is not None and number == signal.SIGINT
        if repeated and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun repeats a Ctrl-C that its ranks have had
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = self.received or signal.Signals(number)
        if ranks.size() == 1:
            self.agreed = self.received

    def flags(self):
        """A 1 for the signal of `STOP_SIGNALS` that this rank received, else zeros: to be added over the ranks."""
        return [float(self.received == number) for number in STOP_SIGNALS]

    def agree(self, sums):
        """Choose the signal that all ranks stop for: the first that any received. sums: of all ranks' `flags`."""
        self.agreed = next((number for number, total in zip(STOP_SIGNALS, sums) if total > 0), None)
