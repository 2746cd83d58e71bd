import pytest
import torch
from conftest import batch, small_net
from torch import nn

from genotypes import DARTS_V1, DARTS_V2, Genotype, parse
from models.augment_cells import AugmentCell
from models.augment_cnn import AugmentCNN, AuxiliaryHead
from models.ops import DropPath_, Identity
from models.search_cells import SearchCell
from models.search_cnn import SearchCNN


def count(parameters):
    return sum(p.numel() for p in parameters)


def test_networks_have_the_known_numbers_of_parameters():
    for C_in, weights in ((3, 1_930_618), (1, 1_929_754)):
        net = SearchCNN(C_in, 16, 10, 8, nn.CrossEntropyLoss())
        assert (count(net.weights()), count(net.alphas())) == (weights, 224)
    for genotype, with_head, without in ((DARTS_V2, 3_827_928, 3_351_502), (DARTS_V1, 3_648_000, 3_171_574)):
        assert count(AugmentCNN(32, 3, 36, 10, 20, True, genotype).parameters()) == with_head
        assert count(AugmentCNN(32, 3, 36, 10, 20, False, genotype).parameters()) == without


def test_alphas_start_as_a_thousandth_of_normal_noise():
    alphas = torch.cat([a.flatten() for a in small_net(n_nodes=12).alphas()])
    assert [tuple(a.shape) for a in small_net(n_nodes=4).alpha_normal] == [(2, 8), (3, 8), (4, 8), (5, 8)]
    # of 1440 values: the standard deviation's own is 1 / sqrt(2 n) = 1.9 %, the mean's 1e-3 / sqrt(n); five of each
    assert abs(alphas.std().item() / 1e-3 - 1) < 0.1
    assert abs(alphas.mean().item()) < 1.4e-4


def test_weights_and_alphas_are_all_parameters_and_share_none():
    net = small_net()
    weights, alphas = set(map(id, net.weights())), set(map(id, net.alphas()))
    assert not weights & alphas
    assert weights | alphas == set(map(id, net.parameters()))


@pytest.mark.parametrize("size", [8, 9, 13, 15, 32])
@pytest.mark.parametrize("C", [1, 3])
def test_search_network_takes_any_size_from_8_up_and_any_channels(size, C):
    net = small_net(C_in=3, C=C, n_layers=4, dtype=torch.float32)
    X, y = batch(n=2, channels=3, size=size, dtype=torch.float32)
    assert net(X).shape == (2, 3)
    net.loss(X, y).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("size", [8, 9, 13, 15, 28, 32])
@pytest.mark.parametrize("n_layers", [1, 2, 3, 5])
def test_augment_network_takes_any_size_from_8_up_and_any_depth(size, n_layers):
    net = AugmentCNN(size, 1, 3, 4, n_layers, True, DARTS_V2)
    logits, aux_logits = net(torch.randn(2, 1, size, size))
    assert logits.shape == aux_logits.shape == (2, 4)
    net.eval()
    logits, aux_logits = net(torch.randn(2, 1, size, size))
    assert logits.shape == (2, 4)
    assert aux_logits is None


@pytest.mark.parametrize(("n_layers", "expected"), [(8, {2, 5}), (20, {6, 13}), (3, {1, 2}), (2, {0, 1}), (1, {0})])
def test_cells_at_a_third_and_two_thirds_halve_the_size_and_double_the_channels(n_layers, expected):
    net = small_net(n_layers=n_layers, C=2, dtype=torch.float32)
    sizes, channels = [8], [2]
    for cell in net.cells:
        cell.register_forward_hook(lambda _, __, out: sizes.append(out.size(2)) or channels.append(out.size(1) // 2))
    net(batch(dtype=torch.float32)[0])
    for layer in range(n_layers):
        factor = 2 if layer in expected else 1
        assert sizes[layer + 1] * factor == sizes[layer]
        assert channels[layer + 1] == channels[layer] * factor


def test_search_cell_is_the_sum_of_its_weighted_edges():
    torch.manual_seed(0)
    cell = SearchCell(2, 3, 5, 4, False, True).double().eval()
    s0, s1 = torch.randn(2, 3, 6, 6).double(), torch.randn(2, 5, 6, 6).double()
    weights = [torch.rand(2, 8).double(), torch.rand(3, 8).double()]
    p0, p1 = cell.preproc0(s0), cell.preproc1(s1)
    node0 = sum(w * op(p) for p, row, e in zip((p0, p1), weights[0], cell.dag[0]) for w, op in zip(row, e._ops))
    inputs = (p0, p1, node0)
    node1 = sum(w * op(p) for p, row, e in zip(inputs, weights[1], cell.dag[1]) for w, op in zip(row, e._ops))
    assert torch.allclose(cell(s0, s1, weights), torch.cat([node0, node1], 1), rtol=1e-12)


@pytest.mark.parametrize("size", [8, 13])
@pytest.mark.parametrize("stage", ["search", "augment"])
def test_networks_give_the_same_channels_last(stage, size):
    X, _ = batch(size=size)
    values = {}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = small_net(C=3) if stage == "search" else AugmentCNN(size, 1, 4, 3, 4, True, DARTS_V2).double()
        output = net.to(memory_format=memory_format)(X.to(memory_format=memory_format))
        logits = torch.cat(output) if stage == "augment" else output
        logits.square().sum().backward()
        values[memory_format] = [logits, *(p.grad for p in net.parameters()), *net.buffers()]
    for a, b in zip(*values.values()):
        assert torch.allclose(a.double(), b.double(), rtol=1e-8, atol=1e-11)


def test_genotype_is_read_off_softmax_weights_not_raw_alphas():
    net = small_net(n_nodes=2)
    with torch.no_grad():
        for alpha in net.alphas():
            alpha.zero_()
        node = net.alpha_normal[1]
        # edge 0: the largest raw alpha, but a rival beside it (and none) shares its softmax weight out
        node[0] = torch.tensor([3.0, 0, 0, 2.9, 0, 0, 0, 2.9])
        node[1] = torch.tensor([0.0, 0, 2.5, 0, 0, 0, 0, 0])
        node[2] = torch.tensor([0.0, 0, 0, 0, 2.6, 0, 0, 0])
    assert net.genotype().normal[1] == [("sep_conv_5x5", 2), ("skip_connect", 1)]
    assert parse(net.alpha_normal, k=2)[1] != net.genotype().normal[1]  # raw alphas would pick another cell
    assert net.genotype().normal_concat == net.genotype().reduce_concat == range(2, 4)


def test_networks_refuse_numbers_below_one_and_unknown_executions():
    with pytest.raises(ValueError, match="fused, plain"):
        small_net(execution="faster")
    with pytest.raises(ValueError, match="n_layers must be a whole number of at least 1"):
        small_net(n_layers=0)
    with pytest.raises(ValueError, match="C must be"):
        AugmentCNN(8, 1, 0, 2, 2, False, DARTS_V2)


def test_auxiliary_head_stands_after_cell_two_thirds_and_pools_to_2x2():
    net = AugmentCNN(32, 3, 4, 10, 20, True, DARTS_V2)
    assert net.aux_pos == 13
    assert net.aux_head.net[2].in_channels == 4 * 4 * 4  # 4 nodes of C = 4, doubled twice
    for size, stride in ((7, 2), (8, 3)):
        pool = AuxiliaryHead(size, 4, 10).net[1]
        assert (pool.kernel_size, pool.stride) == (5, stride)
        assert pool(torch.randn(1, 4, size, size)).shape == (1, 4, 2, 2)
    for size in (2, 3, 6, 9, 16):
        assert AuxiliaryHead(size, 4, 10)(torch.randn(2, 4, size, size)).shape == (2, 10)


def test_drop_path_probability_reaches_every_op_but_the_identity():
    net = AugmentCNN(8, 1, 2, 2, 3, False, DARTS_V2)
    net.drop_path_prob(0.3)
    ops = [op for cell in net.cells for node in cell.dag for op in node]
    dropped = [op for op in ops if not isinstance(op, Identity)]
    assert all(isinstance(op[-1], DropPath_) and op[-1].p == 0.3 for op in dropped)
    assert 0 < len(dropped) < len(ops)


def test_augment_cell_concatenates_the_named_nodes_and_feeds_sources():
    genotype = Genotype([[("skip_connect", 0)], [("skip_connect", 1)], [("skip_connect", 2)]], [4, 3], [], [])
    cell = AugmentCell(genotype, 2, 2, 4, False, False).eval()
    s0, s1 = torch.randn(1, 2, 5, 5), torch.randn(1, 2, 5, 5)
    expected = torch.cat([cell.preproc0(s0), cell.preproc1(s1)], dim=1)  # node 4 is input 0, node 3 is input 1
    assert torch.equal(cell(s0, s1), expected)
