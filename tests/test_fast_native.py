"""The C code for the CPU against PyTorch's operations, where it is kept, and what happens without a compiler."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from models.fast import native
from models.fast.augment_cell import run
from models.ops import SepConv

COMPILE = native._library.__wrapped__
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-4}

pytestmark = pytest.mark.skipif(not native.knows(torch.float32), reason="needs a C compiler")


@pytest.fixture(scope="module", autouse=True)
def threads_of_other_tests():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def images(N, C, H, W, dtype=torch.float64):
    return torch.randn(N, C, H, W, dtype=dtype).to(memory_format=torch.channels_last)


def close(found, expected, dtype, magnitudes=None):
    """Check sums. magnitudes: the sums of magnitudes, to which the error is compared, since sums may cancel."""
    assert found.shape == expected.shape
    error = (found.double() - expected).norm()
    scale = (expected if magnitudes is None else magnitudes).norm()
    assert error <= DTYPES[dtype] * scale + 1e-30, (error, scale)


sizes = {
    "N": st.integers(1, 5),
    "H": st.integers(1, 14),
    "W": st.one_of(st.integers(1, 14), st.sampled_from([127, 128, 129, 1025])),  # C sums over blocks of pixels
    "C": st.integers(1, 37),
    "seed": st.integers(0, 2**31),
    "dtype": st.sampled_from(list(DTYPES)),
    "threads": st.integers(1, 7),
}
several = st.integers(1, 4)


@settings(max_examples=80, deadline=None)
@given(K=st.integers(1, 37), edges=several, terms=several, with_bases=st.booleans(), with_shifts=st.booleans(), **sizes)
def test_sums_and_products_of_images(N, H, W, C, K, edges, terms, with_bases, with_shifts, seed, dtype, threads):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    xs = [[images(N, K, H, W, dtype) for _ in range(edges)] for _ in range(terms)]
    gs = [images(N, C, H, W, dtype) for _ in range(edges)]
    A, weights = torch.randn(terms, edges, K, C, dtype=dtype), torch.randn(edges, terms, dtype=dtype).T
    shifts = torch.randn(edges, C, dtype=dtype) if with_shifts else None
    x, g = torch.stack([torch.stack(row) for row in xs]).double(), torch.stack(gs).double()

    ys = native.mix(list(zip(xs, A)), gs if with_bases else None, shifts)
    expected = torch.einsum("tenkhw,tekc->enchw", x, A.double()) + (g if with_bases else 0)
    close(torch.stack(ys), expected + (shifts.double()[:, None, :, None, None] if with_shifts else 0), dtype)

    sums, products = native.products(xs[0], gs)
    close(sums, x[0].sum((1, 3, 4)), dtype, x[0].abs().sum((1, 3, 4)))
    exact, magnitudes = (torch.einsum("enkhw,enchw->ekc", *pair) for pair in ((x[0], g), (x[0].abs(), g.abs())))
    close(products, exact, dtype, magnitudes)

    blends = native.blend([row[0] for row in xs], weights.T)
    close(torch.stack(blends), torch.einsum("te,tnkhw->enkhw", weights.double(), x[:, 0]), dtype)
    blends = native.blend(gs, weights)  # weights that are not contiguous
    close(torch.stack(blends), torch.einsum("te,enchw->tnchw", weights.double(), g), dtype)
    exact, magnitudes = (torch.einsum("enchw,fnchw->ef", pair, pair) for pair in (g, g.abs()))
    close(native.dots(gs, gs), exact, dtype, magnitudes)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 60),
    C=st.integers(1, 18),
    K=st.integers(1, 18),
    edges=several,
    terms=several,
    scales=st.sampled_from(["none", "one", "each"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_fold_is_batch_normalisation_of_products(n, C, K, edges, terms, scales, with_bias, seed, dtype):
    """And `fold_gradients` its gradient. z are numbers of float32, so that both types see the same."""

    def near(one, other):
        """Small numbers are differences of numbers around 1."""
        assert (one.double() - other).norm() <= DTYPES[dtype] * (other.norm() + other.numel() ** 0.5)

    torch.manual_seed(seed)
    count = edges * terms
    z, M, g = (torch.randn(count, *shape).to(dtype) for shape in ((n, K), (C, K), (n, C)))
    z = z + torch.randn(count, 1, K).to(dtype)
    scale = None if scales == "none" else torch.randn(count, 1 if scales == "one" else C).to(dtype)
    bias = torch.randn(edges, C).to(dtype) if with_bias else None
    exact_z, exact_M = z.double().requires_grad_(), M.double().requires_grad_()
    exact_scale = (torch.ones(count, 1) if scale is None else scale).double().requires_grad_()
    u = exact_z @ exact_M.mT
    y = (u - u.mean(1, keepdim=True)) * (u.var(1, keepdim=True, correction=0) + 0.1).rsqrt() * exact_scale[:, None]

    sums, grams = z.double().sum(1), z.double().mT @ z.double()
    A, shifts, mean, var, moments = native.fold(sums, grams, float(n), M, scale, bias, 0.1, edges)
    near(mean, u.mean(1))
    near(var, u.var(1))
    found = (z.double() @ A.double()).unflatten(0, (terms, edges)).sum(0) + shifts.double()[:, None]
    near(found, y.unflatten(0, (terms, edges)).sum(0) + (bias.double()[:, None] if with_bias else 0))

    dz, dM, dscale = torch.autograd.grad(y, (exact_z, exact_M, exact_scale), g.double())
    of_g = g.double().sum(1), g.double().mT @ z.double()
    found_dscale, found_dM, A, D, shift = native.fold_gradients(
        *of_g, float(n), M, scale, moments, scale is not None, True, True
    )
    near(found_dM, dM)
    if scale is not None:
        near(found_dscale, dscale)
    near(g.double() @ A.double() + z.double() @ D.double() + shift.double()[:, None], dz)


kernels = st.tuples(
    st.sampled_from([1, 3, 5, 7]),
    st.integers(1, 3),  # stride
    st.integers(1, 3),  # dilation
    st.lists(st.integers(0, 2), min_size=1),  # for each of several kernels the image that it convolves
)


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(kernels=st.lists(kernels, min_size=1, max_size=4), **sizes)
def test_depthwise_convolutions_and_their_gradients(N, H, W, C, kernels, seed, dtype, threads):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    xs = [images(N, C, H, min(W, 14), dtype) for _ in range(3)]
    weights = [torch.randn(len(rows), C, 1, k, k, dtype=dtype) for k, _, _, rows in kernels]
    convolutions = [
        (image, place, row, stride, dilation)
        for place, (k, stride, dilation, rows) in enumerate(kernels)
        for row, image in enumerate(rows)
    ]
    exact = [tensor.double().requires_grad_() for tensor in (*xs, *weights)]
    zs = [
        F.conv2d(
            exact[image].relu(), exact[3 + place][row], None, stride, dilation * (kernels[place][0] // 2), dilation, C
        )
        for image, place, row, stride, dilation in convolutions
    ]
    for found, z in zip(native.depthwise(xs, weights, convolutions), zs):
        close(found, z, dtype)
    dzs = [torch.randn_like(z) for z in zs]
    expected = torch.autograd.grad(zs, exact, dzs, materialize_grads=True)
    given_dzs, some = [dz.to(dtype) for dz in dzs], [seed % 2 == 0, True, False]
    for wants_xs, wants_weights in ((some, [True] * len(weights)), ([True] * 3, [False] * len(weights))):
        found = native.depthwise_gradients(xs, weights, convolutions, given_dzs, wants_xs, wants_weights)
        for one, gradient, wanted in zip([*found[0], *found[1]], expected, [*wants_xs, *wants_weights]):
            if wanted:
                close(one, gradient, dtype)
            else:
                assert one is None


def only(weight, dilation):
    """For `native.depthwise` the convolution of one image with a weight."""
    return [weight], [(0, 0, 0, 1, dilation)]


def test_relu_lets_nan_pass_and_its_gradient_too():
    x = images(2, 9, 5, 5, torch.float32)
    x[1, 3, 2, 2] = float("nan")
    convolution = only(torch.ones(9, 1, 3, 3), 1)
    (z,) = native.depthwise([x], *convolution)
    assert z.isnan().sum() == 9
    (dx,), _ = native.depthwise_gradients([x], *convolution, [torch.ones_like(z)], [True], [False])
    assert torch.equal(dx != 0, (x > 0) | x.isnan())
    infinite = torch.full_like(z, float("inf"))
    (dx,), _ = native.depthwise_gradients([x], *convolution, [infinite], [True], [False])
    assert torch.equal(dx == 0, x <= 0)


def test_the_number_of_threads_changes_nothing():
    x, weight = images(9, 17, 11, 7, torch.float32), torch.randn(17, 1, 5, 5)
    sums, M = (torch.rand(12, 17).double(), 9 * torch.eye(17).double().repeat(12, 1, 1)), torch.randn(12, 17, 17)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        convolution = only(weight, 1)
        (z,) = native.depthwise([x], *convolution)
        dimages, dkernels = native.depthwise_gradients([x], *convolution, [z], [True], [True])
        fold = native.fold(*sums, 9.0, M, None, None, 0.1, 12)
        gradients = native.fold_gradients(*sums, 9.0, M, None, fold[-1], False, True, True)[1:]
        mixed = native.mix([([x], weight[None, :, 0, 0])])
        found.append([z, *dimages, *dkernels, *native.products([x], [x]), *mixed, *fold, *gradients])
        found[-1].append(native.dots([x], [x]))
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others))


X, Y, A = images(2, 9, 6, 6, torch.float32), images(2, 3, 6, 6, torch.float32), torch.randn(1, 9, 3)
GRAMS, M = torch.rand(1, 9, 9).double(), torch.randn(1, 3, 9)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: native.depthwise([X], *only(torch.randn(4, 1, 3, 3), 1)),
        lambda: native.depthwise([X], *only(torch.randn(9, 1, 3, 3).double(), 1)),
        lambda: native.mix([([X], A[:, :4])]),
        lambda: native.blend([X, Y], torch.randn(1, 2)),
        lambda: native.dots([X], [Y]),
        lambda: native.products([X], [X[:1]]),
        lambda: native.fold(GRAMS[:, 0], GRAMS[:, :8], 9.0, M, None, None, 0.1, 1),
        lambda: native.fold(GRAMS[:, 0], GRAMS, 9.0, M, torch.rand(1, 3).double(), None, 0.1, 1),
        lambda: native.fold(GRAMS[:, 0], GRAMS, 9.0, M, None, torch.rand(1, 2), 0.1, 1),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused_before_c_reads_them(wrong):
    with pytest.raises(ValueError, match="tensors must be"):
        wrong()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "darts"


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "true"])
def test_without_a_compiler_one_line_says_so(compiler, cache, monkeypatch, log_lines):
    """Missing, failing, making nothing."""
    monkeypatch.setenv("CC", compiler)
    assert COMPILE(torch.float32) is None
    (line,) = log_lines
    assert compiler in line


def test_what_is_compiled_is_kept_for_the_same_source(cache, tmp_path, monkeypatch):
    changed = tmp_path / "native.c"
    changed.write_text(native.SOURCE.read_text() + "/* changed */\n")
    for source, files in ((native.SOURCE, 1), (native.SOURCE, 1), (changed, 2)):
        monkeypatch.setattr(native, "SOURCE", source)
        assert COMPILE(torch.float32) is not None
        assert len(list(cache.iterdir())) == files


@pytest.mark.process
def test_many_processes_may_compile_at_once(cache):
    code = "import torch; from models.fast import native; assert native.knows(torch.float32)"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_a_second_derivative_is_refused_rather_than_wrong():
    op, x = SepConv(3, 4, 3, 2, 1).double(), images(4, 3, 5, 6).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(run(op, x).pow(3).sum(), x, create_graph=True)
