"""Full float32 for what would be lost in fewer digits."""

import contextlib

import torch


@contextlib.contextmanager
def full_float32():
    """Inside, convolutions and matrix products of float32 round to float32; afterwards they do as the user has set.

    On CUDA cuDNN's convolutions use TF32 unless told otherwise, matrix products where a user allows it: 10 bits in
    place of 23. Autocast has no part in that, and goes on as it is.
    """
    before = _settings()
    try:
        for write, _, full in before:
            write(full)
        yield
    finally:
        for write, value, _ in before:
            write(value)


def _settings():
    """All that decides on float32's precision: (a function that sets it, its value now, the value for all digits).

    From torch 2.9 on there are two interfaces, which must agree; the older one raises RuntimeError where a user has
    set the newer one alone, and is then left alone.
    """
    settings = []
    with contextlib.suppress(RuntimeError):
        settings.append((_allow_in_cudnn, torch.backends.cudnn.allow_tf32, False))
    with contextlib.suppress(RuntimeError):
        settings.append((torch.set_float32_matmul_precision, torch.get_float32_matmul_precision(), "highest"))
    for parent, names in (("cudnn", ("conv", "rnn")), ("cuda", ("matmul",)), ("mkldnn", ("conv", "rnn", "matmul"))):
        for name in names:
            part = getattr(getattr(torch.backends, parent), name, None)
            if hasattr(part, "fp32_precision"):
                settings.append((_writer(part), part.fp32_precision, "ieee"))
    return settings


def _allow_in_cudnn(allowed):
    torch.backends.cudnn.allow_tf32 = allowed


def _writer(part):
    return lambda precision: setattr(part, "fp32_precision", precision)
