"""Runs as child processes: started, stopped with their parent, and named where they fail.

This module does not import torch.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time

PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent ends


class Child:
    """The process of a `Task`.

    gpu: its entry in CUDA_VISIBLE_DEVICES, or None to leave that as it is. The standard output is dropped, since the
    run has a log. The child stays in the process group of its parent, so that a terminal's Ctrl-C reaches it too.
    """

    def __init__(self, task, gpu=None, n_slots=1):
        self.task, self.gpu = task, gpu
        self.started, self.epochs_before = time.monotonic(), task.epochs_done()
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 -- read when the process is over
        environment = dict(os.environ)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_slots)))
        self.process = subprocess.Popen(
            task.command(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.stderr,
            env=environment,
            # there are no threads that it could be unsafe with
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
        )

    def is_over(self):
        return self.process.poll() is not None

    def seconds_per_epoch(self):
        """Since this process began; None before it has gone through a part of an epoch."""
        epochs = self.task.epochs_done() - self.epochs_before
        return (time.monotonic() - self.started) / epochs if epochs > 0 else None

    def stop(self):
        """Ask the run to save and to stop. SIGTERM, since a second SIGINT after a terminal's would end it at once."""
        if not self.is_over():
            self.process.send_signal(signal.SIGTERM)

    def error(self):
        """Why the run failed, in one line; None if it did not."""
        code = self.process.returncode
        if code == 0:
            return None
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {code}"


def _die_with_parent():
    """A run whose protocol was killed must not go on: started again, the protocol would start it a second time."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class ForwardedSignals:
    """Inside `with`, SIGINT, SIGTERM and SIGUSR1 stop the children instead of this process.

    received: the first signal, or None; children: a list of `Child`, kept by the user of this class. A second SIGINT
    kills them.
    """

    def __init__(self):
        self.received, self.children = None, []

    def __enter__(self):
        names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        self.before = {name: signal.signal(getattr(signal, name), self._note) for name in names}
        return self

    def __exit__(self, *exception):
        for child in self.children:
            child.process.kill()
        for name, handler in self.before.items():
            signal.signal(getattr(signal, name), handler)

    def _note(self, number, frame):
        if self.received is not None and number == signal.SIGINT:
            for child in self.children:
                child.process.kill()
        self.received = self.received or signal.Signals(number)
        self.stop_children()

    def stop_children(self):
        for child in self.children:
            child.stop()
