"""The C code for the CPU against PyTorch's operations, where it is kept, and what happens without a compiler."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from models.fast import native

CC = os.environ.get("CC") or "cc"
COMPILE = native._library.__wrapped__
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-4}


needs_compiler = pytest.mark.skipif(not native.knows(torch.float32), reason="needs a C compiler")
pytestmark = needs_compiler


@pytest.fixture(scope="module", autouse=True)
def keeps_threads():
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
    "W": st.integers(1, 14),
    "C": st.integers(1, 37),
    "seed": st.integers(0, 2**31),
    "dtype": st.sampled_from(list(DTYPES)),
    "threads": st.integers(1, 7),
}


@settings(max_examples=60, deadline=None)
@given(
    K=st.integers(1, 37),
    edges=st.integers(1, 4),
    terms=st.integers(1, 3),
    with_bases=st.booleans(),
    with_shifts=st.booleans(),
    **sizes,
)
def test_mix_is_a_sum_of_matrix_products(N, H, W, C, K, edges, terms, with_bases, with_shifts, seed, dtype, threads):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    channels = [K + i for i in range(terms)]
    given_terms = [
        ([images(N, k, H, W, dtype) for _ in range(edges)], torch.randn(edges, k, C, dtype=dtype)) for k in channels
    ]
    bases = [images(N, C, H, W, dtype) for _ in range(edges)] if with_bases else None
    shifts = torch.randn(edges, C, dtype=dtype) if with_shifts else None
    found = native.mix(given_terms, bases, shifts)
    assert len(found) == edges
    for e, y in enumerate(found):
        expected = sum(torch.einsum("nkhw,kc->nchw", xs[e].double(), A[e].double()) for xs, A in given_terms)
        expected = expected + (bases[e].double() if with_bases else 0)
        close(y, expected + (shifts[e].double()[:, None, None] if with_shifts else 0), dtype)


@settings(max_examples=60, deadline=None)
@given(K=st.integers(1, 37), pairs=st.integers(1, 4), **sizes)
def test_products_are_sums_over_pixels(N, H, W, C, K, pairs, seed, dtype, threads):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    a, b = ([images(N, channels, H, W, dtype) for _ in range(pairs)] for channels in (K, C))
    sums, products = native.products(a, b)
    a, b = torch.stack(a).double(), torch.stack(b).double()
    close(sums, a.sum((1, 3, 4)), dtype, a.abs().sum((1, 3, 4)))
    exact, magnitudes = (torch.einsum("enkhw,enchw->ekc", *pair) for pair in ((a, b), (a.abs(), b.abs())))
    close(products, exact, dtype, magnitudes)


@pytest.mark.parametrize("pixels", [1, 127, 128, 129, 1023, 1024, 1025, 1153, 2500])
def test_products_of_many_pixels(pixels):
    torch.manual_seed(0)
    a, b = images(1, 3, 1, pixels), images(pixels, 5, 1, 1)
    b = b.permute(2, 1, 3, 0)  # as a's, but not channels-last
    sums, products = native.products([a], [b])
    close(sums[0], a.sum((0, 2, 3)), torch.float64)
    close(products[0], torch.einsum("nkhw,nchw->kc", a, b), torch.float64)
    (y,) = native.mix([([a], products)], [b], sums.new_ones(1, 5))
    close(y, torch.einsum("nkhw,kc->nchw", a, products[0]) + b + 1, torch.float64)


@settings(max_examples=60, deadline=None)
@given(T=st.integers(1, 4), edges=st.integers(1, 4), **sizes)
def test_blends_and_dots_are_weighted_sums_and_their_gradient(N, H, W, C, T, edges, seed, dtype, threads):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    xs, gs = ([images(N, C, H, W, dtype) for _ in range(n)] for n in (T, edges))
    weights = torch.randn(T, edges, dtype=dtype).T  # not contiguous
    ys = native.blend(xs, weights)
    expected = torch.einsum("et,tnchw->enchw", weights.double(), torch.stack(xs).double())
    assert len(ys) == edges
    for y, exact in zip(ys, expected):
        close(y, exact, dtype)
    g, x = torch.stack(gs).double(), torch.stack(xs).double()
    dots, magnitudes = (torch.einsum("enchw,tnchw->et", *pair) for pair in ((g, x), (g.abs(), x.abs())))
    close(native.dots(gs, xs), dots, dtype, magnitudes)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 60),
    C=st.integers(1, 18),
    K=st.integers(1, 18),
    edges=st.integers(1, 3),
    terms=st.integers(1, 3),
    scales=st.sampled_from(["none", "one", "each"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_fold_is_batch_normalisation_of_products_and_its_gradient(
    n, C, K, edges, terms, scales, with_bias, seed, dtype
):
    """z are numbers of float32, so that both types see the same, and of a mean apart from 0."""

    def near(one, other):
        """Of numbers around 1, small ones are differences."""
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
    expected = y.unflatten(0, (terms, edges)).sum(0)
    near(found, expected if bias is None else expected + bias[:, None])

    dz, dM, dscale = torch.autograd.grad(y, (exact_z, exact_M, exact_scale), g.double())
    of_g = g.double().sum(1), g.double().mT @ z.double()
    wants_scale = scale is not None
    found_dscale, found_dM, A, D, shift = native.fold_gradients(
        *of_g, float(n), M, scale, moments, wants_scale, True, True
    )
    near(found_dM, dM)
    if wants_scale:
        near(found_dscale, dscale)
    near(g.double() @ A.double() + z.double() @ D.double() + shift.double()[:, None], dz)


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(
    kernels=st.lists(
        st.tuples(
            st.sampled_from([1, 3, 5, 7]), st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(0, 2), min_size=1)
        ),
        min_size=1,
        max_size=4,
    ),
    relus=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    **sizes,
)
def test_depthwise_convolutions_and_their_gradients(N, H, W, C, kernels, relus, seed, dtype, threads):
    """Three images; each of the kernels' rows convolves one of them."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    xs = [images(N, C, H, W, dtype) for _ in relus]
    weights = [torch.randn(len(rows), C, 1, k, k, dtype=dtype) for k, _, _, rows in kernels]
    convolutions = [
        (image, place, row, (stride, dilation * (k // 2), dilation))
        for place, (k, stride, dilation, rows) in enumerate(kernels)
        for row, image in enumerate(rows)
    ]
    exact = [tensor.double().requires_grad_() for tensor in (*xs, *weights)]
    activated = [x.relu() if relu else x for x, relu in zip(exact, relus)]
    zs = [
        F.conv2d(activated[image], exact[3 + place][row], None, *geometry, C)
        for image, place, row, geometry in convolutions
    ]
    for found, z in zip(native.depthwise(xs, relus, weights, convolutions), zs):
        close(found, z, dtype)
    dzs = [torch.randn_like(z) for z in zs]
    expected = torch.autograd.grad(zs, exact, dzs, materialize_grads=True)
    given_dzs, some = [dz.to(dtype) for dz in dzs], [seed % 2 == 0, True, False]
    for wants_xs, wants_weights in ((some, [True] * len(weights)), ([True] * 3, [False] * len(weights))):
        found = native.depthwise_gradients(xs, relus, weights, convolutions, given_dzs, wants_xs, wants_weights)
        for one, gradient, wanted in zip([*found[0], *found[1]], expected, [*wants_xs, *wants_weights]):
            if wanted:
                close(one, gradient, dtype)
            else:
                assert one is None


def only(weight, geometry):
    """For `native.depthwise` the convolution of one image with a weight."""
    return [weight], [(0, 0, 0, geometry)]


def test_relu_lets_nan_pass_and_its_gradient_too():
    x = images(2, 9, 5, 5, torch.float32)
    x[1, 3, 2, 2] = float("nan")
    convolution = only(torch.ones(9, 1, 3, 3), (1, 1, 1))
    (z,) = native.depthwise([x], [True], *convolution)
    assert z.isnan().sum() == 9
    (dx,), _ = native.depthwise_gradients([x], [True], *convolution, [torch.ones_like(z)], [True], [False])
    assert torch.equal(dx != 0, (x > 0) | x.isnan())
    infinite = torch.full_like(z, float("inf"))
    (dx,), _ = native.depthwise_gradients([x], [True], *convolution, [infinite], [True], [False])
    assert torch.equal(dx == 0, x <= 0)


def test_the_number_of_threads_changes_nothing():
    x, weight = images(9, 17, 11, 7, torch.float32), torch.randn(17, 1, 5, 5)
    sums, M = (torch.rand(12, 17).double(), 9 * torch.eye(17).double().repeat(12, 1, 1)), torch.randn(12, 17, 17)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        convolution = only(weight, (1, 2, 1))
        (z,) = native.depthwise([x], [True], *convolution)
        (dx,), (dweight,) = native.depthwise_gradients([x], [True], *convolution, [z], [True], [True])
        found.append(
            (
                z,
                dx,
                dweight,
                *native.products([x], [x]),
                *native.mix([([x], weight[None, :, 0, 0])]),
                *(fold := native.fold(*sums, 9.0, M, None, None, 0.1, 12)),
                *native.fold_gradients(*sums, 9.0, M, None, fold[-1], False, True, True)[1:],
                native.dots([x], [x]),
            )
        )
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others))


def test_an_empty_batch_gives_an_empty_batch():
    empty = images(0, 5, 6, 6)
    (z,) = native.depthwise([empty], [False], *only(torch.randn(5, 1, 3, 3).double(), (2, 1, 1)))
    assert z.shape == (0, 5, 3, 3)
    convolution = only(torch.randn(5, 1, 3, 3).double(), (1, 1, 1))
    (dx,), (dweight,) = native.depthwise_gradients([empty], [False], *convolution, [empty], [True], [True])
    assert dx.shape == (0, 5, 6, 6)
    assert not dweight.any()
    assert native.mix([([empty], torch.randn(1, 5, 2).double())])[0].shape == (0, 2, 6, 6)
    assert not any(found.any() for found in native.products([empty], [empty]))


@pytest.mark.parametrize(
    ("weight", "padding"),
    [
        (torch.randn(4, 1, 3, 3), 1),
        (torch.randn(9, 1, 3, 3).double(), 1),
        (torch.randn(9, 1, 3, 5), 1),
        (torch.randn(9, 1, 4, 4), 1),
        (torch.randn(9, 1, 3, 3), 0),
        (torch.randn(9, 1, 3, 3).mT, 1),
    ],
)
def test_kernels_that_do_not_fit_are_refused(weight, padding):
    x = images(2, 9, 6, 6, torch.float32)
    with pytest.raises(ValueError, match="must be"):
        native.depthwise([x], [False], *only(weight, (1, padding, 1)))


def test_a_kernel_may_convolve_several_images():
    xs, kernel = [images(2, 9, 6, 6), images(2, 9, 6, 6)], torch.randn(9, 1, 3, 3).double()
    both = [(0, 0, 0, (1, 1, 1)), (1, 0, 0, (1, 1, 1))]
    dzs = [torch.randn_like(x) for x in xs]
    _, (found,) = native.depthwise_gradients(xs, [False] * 2, [kernel], both, dzs, [False] * 2, [True])
    each = [
        native.depthwise_gradients([x], [False], *only(kernel, (1, 1, 1)), [dz], [False], [True])[1][0]
        for x, dz in zip(xs, dzs)
    ]
    close(found, sum(each), torch.float64)


def test_tensors_that_do_not_fit_together_are_refused():
    x, A = images(2, 9, 6, 6, torch.float32), torch.randn(1, 9, 3)
    y, shift = images(2, 3, 6, 6, torch.float32), torch.randn(1, 3)
    native.mix([([x], A)], [y], shift)
    for xs, matrices in (([x], A[:, :4]), ([x, x], A), ([x, x[:1]], torch.randn(2, 9, 3)), ([x], A.double())):
        with pytest.raises(ValueError, match="must be"):
            native.mix([(xs, matrices)])
    for bases, shifts in (([y[:1]], None), ([x], None), ([y.double()], None), ([y, y], None), (None, shift[:, :2])):
        with pytest.raises(ValueError, match="must be"):
            native.mix([([x], A)], bases, shifts)
    for wrong in (
        lambda: native.blend([x], shift),
        lambda: native.blend([x, y], shift[:, :2]),
        lambda: native.dots([x], [y]),
    ):
        with pytest.raises(ValueError, match="must be"):
            wrong()
    for a, b in (([x, x], [x]), ([x], [x[:1]]), ([x, x[..., 1:]], [x, x]), ([x], [x.double()])):
        with pytest.raises(ValueError, match="must be"):
            native.products(a, b)
    kernels, convolutions = only(torch.randn(9, 1, 3, 3), (1, 1, 1))
    with pytest.raises(ValueError, match="must be"):
        native.depthwise([x, x[..., 1:]], [False, False], kernels, convolutions)
    sums, grams, M = torch.rand(1, 9).double(), torch.rand(1, 9, 9).double(), torch.randn(1, 3, 9)
    scale, bias = torch.rand(1, 3), torch.rand(1, 3)
    *_, moments = native.fold(sums, grams, 9.0, M, scale, bias, 0.1, 1)
    for wrong in (
        (sums[:, :8], grams, M, scale, bias),
        (sums.float(), grams, M, scale, bias),
        (sums, grams[:, :8], M, scale, bias),
        (sums, grams, M.to("meta"), scale, bias),
        (sums, grams, M, scale[:, :2], bias),
        (sums, grams, M, scale.double(), bias),
        (sums, grams, M, scale, bias[:, :2]),
        (sums, grams, M, scale, bias.double()),
    ):
        with pytest.raises(ValueError, match="must be"):
            native.fold(*wrong[:2], 9.0, *wrong[2:], 0.1, 1)
    for wrong in ((scale[:, :2], sums[:, :3]), (scale, sums[:, :2]), (scale.double(), sums[:, :3])):
        with pytest.raises(ValueError, match="must be"):
            native.fold_gradients(wrong[1], M.double(), 9.0, M, wrong[0], moments, True, True, True)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "darts"


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "true", "'unbalanced", "silent", "empty", "slow"])
def test_without_a_compiler_one_line_says_so(compiler, cache, tmp_path, monkeypatch, log_lines):
    """Missing, failing with and without a message, building a library without the functions, hanging."""
    scripts = {
        "silent": "exit 3",
        "empty": f'[ "$1" = --version ] && exit; for last; do :; done; echo | {CC} -x c - -shared -o "$last"',
        "slow": "sleep 60",
    }
    if compiler in scripts:
        compiler = str(script(tmp_path / compiler, scripts[compiler]))
    monkeypatch.setattr(native, "COMPILE_SECONDS", 1)
    monkeypatch.setenv("CC", compiler)
    assert COMPILE(torch.float32) is None
    (line,) = log_lines
    assert compiler in line
    assert "\n" not in line


def test_what_is_compiled_is_kept_and_found_again(cache, tmp_path, monkeypatch):
    assert COMPILE(torch.float32) is not None
    (kept,) = cache.iterdir()
    run = subprocess.run

    def only_version(command, **options):
        assert command[-1] == "--version", "nothing is to be compiled"
        return run(command, **options)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", only_version)
        assert COMPILE(torch.float32) is not None
    assert list(cache.iterdir()) == [kept]
    failing = script(tmp_path / "cc", f'[ "$1" = --version ] && exec {CC} --version; exit 1')
    monkeypatch.setenv("CC", str(failing))  # another compiler, another library
    assert COMPILE(torch.float32) is None


@pytest.mark.parametrize("change", ["source", "options"])
def test_another_source_or_other_options_are_compiled_anew(change, cache, tmp_path, monkeypatch):
    COMPILE(torch.float32)
    if change == "source":
        changed = tmp_path / "native.c"
        changed.write_text(native.SOURCE.read_text() + "/* changed */\n")
        monkeypatch.setattr(native, "SOURCE", changed)
    else:
        monkeypatch.setattr(native, "OPTIONS", (*native.OPTIONS, "-g"))
    COMPILE(torch.float32)
    assert len(list(cache.iterdir())) == 2


def test_a_folder_that_is_not_the_users_own_is_not_trusted(cache):
    cache.mkdir()
    cache.chmod(0o777)
    assert native._cache_folder() is None
    assert COMPILE(torch.float32) is not None  # for this process alone
    assert not list(cache.iterdir())


@pytest.mark.process
def test_many_processes_may_compile_at_once(cache):
    code = "import torch; from models.fast import native; assert native.knows(torch.float32)"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(3)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    assert [path.suffix for path in cache.iterdir()] == [".so"]
