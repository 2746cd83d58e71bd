import ast
import collections
import itertools
import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from short_runs import command, refused
from torch import nn

import genotypes as gt
from genotypes import (
    DARTS_V1,
    DARTS_V2,
    FORMS,
    PRIMITIVES,
    PUBLISHED,
    GenotypeError,
    from_str,
    parse,
    random_genotypes,
    resolve,
    to_dag,
    to_str,
)
from models.ops import DropPath_, FactorizedReduce
from models.spaces import SPACES

GOOD = str(DARTS_V2)


def strengths(**best):
    """An edge's strengths: 0.1 for every candidate but those given."""
    return [best.get(primitive, 0.1) for primitive in PRIMITIVES]


def test_parse_takes_the_two_strongest_edges_strongest_first():
    node0 = torch.tensor([strengths(sep_conv_3x3=0.3), strengths(max_pool_3x3=0.5)])
    node1 = torch.tensor([strengths(skip_connect=0.2), strengths(dil_conv_5x5=0.9), strengths(avg_pool_3x3=0.4)])
    assert parse([node0, node1], k=2) == [
        [("max_pool_3x3", 1), ("sep_conv_3x3", 0)],
        [("dil_conv_5x5", 1), ("avg_pool_3x3", 2)],
    ]
    assert parse([node1], k=1) == [[("dil_conv_5x5", 1)]]


def test_parse_ranks_the_strongest_candidate_other_than_none_wherever_none_stands():
    weights = [torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])]
    assert parse(weights, 2, ("none", "skip_connect", "sep_conv_3x3")) == [[("sep_conv_3x3", 1), ("skip_connect", 0)]]
    assert parse(weights, 1, ("skip_connect", "none", "sep_conv_3x3")) == [[("sep_conv_3x3", 1)]]


def test_parse_breaks_ties_by_order_and_takes_all_edges_where_there_are_fewer_than_k():
    assert parse([torch.full((2, 8), 0.125)], k=3) == [[("max_pool_3x3", 0), ("max_pool_3x3", 1)]]


def test_to_dag_strides_drop_path_and_sources():
    reduce = to_dag(4, [[("sep_conv_3x3", 0), ("skip_connect", 1)], [("skip_connect", 2), ("max_pool_3x3", 1)]], True)
    assert [[op.s_idx for op in node] for node in reduce] == [[0, 1], [2, 1]]
    (sep, reduced_skip), (skip, pool) = reduce
    assert isinstance(skip, nn.Identity)  # stride 1: no drop path
    for op in (sep, reduced_skip, pool):
        assert isinstance(op[-1], DropPath_)
    assert isinstance(reduced_skip[0], FactorizedReduce)
    x = torch.randn(2, 4, 9, 9)
    assert [op(x).shape[-1] for op in (sep, reduced_skip, skip, pool)] == [5, 5, 9, 5]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_form_of_every_published_cell_is_read_as_the_cell(name, form):
    genotype = PUBLISHED[name].genotype
    read = from_str(to_str(genotype, form))
    assert read == genotype
    assert str(read) == str(genotype)


@pytest.mark.parametrize(
    "pasted",
    [
        "2026-11-26 03:50:40  genotype = {}",
        "darts-v2",
        '"gt.DARTS = gt.{}"',
        "INFO:root:genotype = {}\nINFO:root:valid_acc 90.0",
        "\ufeffgenotype = Genotype()\ngenotype = {}",
        'genotype = Genotype()\npython augment.py --genotype "{}"',
        "```python\nDARTS: Genotype = {}\n```",
    ],
)
def test_genotypes_are_read_as_people_paste_them(pasted):
    assert from_str(pasted.format(GOOD)) == resolve(pasted.format(GOOD)) == DARTS_V2


@pytest.mark.parametrize(
    ("text", "mention"),
    [
        ("Genotype(", "column"),
        ("{}", "no normal"),
        ("DARTS_V9", "Genotype(normal="),
        (GOOD.replace(", reduce_concat=range(2, 6)", ""), "reduce_concat"),
        (GOOD.replace("sep_conv_3x3", "sep_conv_9x9", 1), "sep_conv_9x9"),
        (GOOD.replace("('sep_conv_3x3', 0)", "('sep_conv_3x3', 2)", 1), "0 to 1"),
        (GOOD.replace("('sep_conv_3x3', 0)", "('sep_conv_3x3',)", 1), "(operation, source)"),
        ("Genotype(normal=[], normal_concat=range(2, 6), reduce=[], reduce_concat=range(2, 6))", "list of nodes"),
        (GOOD.replace("range(2, 6)", "range(2, 7)", 1), "normal_concat"),
        (GOOD.replace("range(2, 6)", f"range({'9' * 400})", 1), "column"),
        ("[" * 5000, "genotype"),
        ("(" * 100_000, "genotype"),
    ],
)
def test_a_malformed_genotype_is_refused_with_what_is_allowed(text, mention):
    with pytest.raises(GenotypeError) as error:
        from_str(text)
    assert mention in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "code",
    [
        "__import__('pathlib').Path('ran').touch()",
        "Genotype(normal=__import__('pathlib').Path('ran').touch(), normal_concat=1, reduce=1, reduce_concat=1)",
        GOOD.replace("range(2, 6)", "open('ran', 'w')", 1),
        GOOD.replace("normal=", "normal=[x for x in [open('ran', 'w')]] or ", 1),
    ],
)
def test_code_in_a_genotype_is_not_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ast.parse(code, mode="eval")  # it is Python that eval would run
    with pytest.raises(GenotypeError):
        from_str(code)
    assert not (tmp_path / "ran").exists()


def test_names_strings_files_folders_and_seeds_are_resolved(tmp_path):
    assert from_str("darts_v2") == resolve("DARTS-V2") == DARTS_V2
    assert resolve("random:7") == random_genotypes(1, 7)[0]
    run = tmp_path / "run (1)"
    run.mkdir()
    content = {"last": {"string": str(DARTS_V1)}, "best": {"string": str(DARTS_V2)}}
    (run / "genotype.json").write_text(json.dumps(content), encoding="utf-8-sig")  # with a byte order mark
    (run / "log.txt").write_text(f"genotype = {DARTS_V2}\nmore\ngenotype = {DARTS_V1}\nmore")
    for text in (DARTS_V1, run, run / "genotype.json", run / "log.txt"):
        assert resolve(str(text)) == DARTS_V1


def test_a_file_of_several_genotypes_needs_a_name(tmp_path):
    path = tmp_path / "genotypes.py"
    flat = to_str(DARTS_V1, "flat").replace("reduce=", "\n  reduce=")
    head = "Genotype = namedtuple('Genotype', 'normal normal_concat reduce reduce_concat')\n"
    aliases = f"# DARTS_V2 = {DARTS_V1}\nDARTS = X\nDARTS = DARTS_V2  # new\n"
    path.write_text(f"{head}DARTS_V1 = {flat}\nDARTS_V2={DARTS_V2}\n{aliases}")
    assert resolve(f"{path}:DARTS_V1") == DARTS_V1
    assert resolve(f"{path}:DARTS_V2") == resolve(f"{path}:DARTS") == DARTS_V2
    for text in (path, f"{path}:PDARTS"):
        with pytest.raises(GenotypeError, match=r"genotypes\.py: .* DARTS_V1, DARTS_V2; .* FILE:NAME"):
            resolve(str(text))


def test_a_node_that_nothing_uses_is_named(capsys):
    text = to_str(DARTS_V1, "flat").replace("normal_concat=range(2, 6)", "normal_concat=range(2, 5)")
    assert resolve(text).normal == DARTS_V1.normal
    assert "node 3 of the normal cell" in capsys.readouterr().err
    resolve("AMOEBANET_A")  # whose concatenation leaves out only nodes that others use
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("alphas_learn", "summary", "warns"), [(True, None, True), (True, 2, False), (False, 2, True)])
def test_a_search_that_is_not_over_is_told_and_a_warm_up_is_refused(alphas_learn, summary, warns, tmp_path, capsys):
    entry = {"epoch": 2, "string": str(DARTS_V1), "alphas_learn": alphas_learn}
    files = {"config": {"epochs": 50}, "history": [entry], "genotype": {"last": entry, "best": entry}}
    for name, content in (files | ({"summary": {"epochs": summary}} if summary else {})).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    if not alphas_learn:
        with pytest.raises(GenotypeError, match="have not learned"):
            resolve(str(tmp_path))
        (tmp_path / "summary.json").write_text('{"epochs": 2, "genotype": "chosen by accuracy"}')
        assert resolve(str(tmp_path)) == DARTS_V1
    else:
        assert resolve(str(tmp_path)) == DARTS_V1
        assert ("stopped after epoch 2 of 50" in capsys.readouterr().err) == warns


@pytest.mark.parametrize("text", ["DARTS_V9", "", "nowhere/at/all", "x" * 5000, "a\0b", "random:-1"])
def test_resolve_says_what_may_be_given(text):
    with pytest.raises(GenotypeError, match=r"DARTS_V1, DARTS_V2|random:SEED"):
        resolve(text)


@pytest.mark.parametrize("content", ["", "{", '"x"', '{"last": 3}', '{"last": {"string": "x"}}'])
def test_resolve_refuses_files_without_a_genotype(content, tmp_path):
    (tmp_path / "genotype.json").write_text(content)
    with pytest.raises(GenotypeError, match=r"genotype\.json"):
        resolve(str(tmp_path))


# Chance.


def test_random_cells_have_every_operation_and_pair_of_sources_equally_often():
    nodes = [gene for genotype in random_genotypes(2000, seed=0) for gene in (genotype.normal, genotype.reduce)]
    for i in range(4):
        for place in range(2):
            drawn = collections.Counter(gene[i][place] for gene in nodes)
            assert set(drawn) == set(itertools.product(set(PRIMITIVES) - {"none"}, range(i + 2)))
            assert chisquare(list(drawn.values())).pvalue > 1e-3
        assert all(gene[i][0][1] != gene[i][1][1] for gene in nodes)
    together = collections.Counter((gene[0][0][0], gene[1][0][0]) for gene in nodes)  # of two nodes: independent
    assert len(together) == 49
    assert chisquare(list(together.values())).pvalue > 1e-3


def test_a_seed_draws_the_same_cells_and_another_seed_others():
    cells = random_genotypes(20, seed=3)
    assert cells[:5] == random_genotypes(5, seed=3)
    assert len({str(genotype) for genotype in cells + random_genotypes(20, seed=4)}) == 40


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["NASNET_A", "--form", "flat"], [to_str(PUBLISHED["NASNET_A"].genotype, "flat")]),
        (["--random", "3", "--seed", "5"], map(str, random_genotypes(3, 5))),
        (
            ["--random", "1", "--seed", "5", "--space", "nas-bench-201"],
            map(str, random_genotypes(1, 5, SPACES["nas-bench-201"])),
        ),
    ],
)
def test_the_command_writes_a_genotype_a_line(words, lines, capsys):
    assert command(gt.main, words) == 0
    assert capsys.readouterr().out.splitlines() == list(lines)


def test_words_that_do_not_go_together_are_one_line(capsys):
    refused(capsys, gt.main, ["DARTS_V1", "--random", "2"])


# Any text is read, or refused in one line.


WORDS = "Genotype normal normal_concat reduce reduce_concat range __import__('os') 'sep_conv_3x3' 'none' True None * **"
TOKENS = [*"()[],='\"- \n\\\0", *WORDS.split(), "0", "1", "2", "9" * 5000, "2e999", "lambda: 0", "f'{1}'"]


def parses_or_is_refused(text):
    try:
        genotype = from_str(text)
    except GenotypeError:
        return
    assert from_str(str(genotype)) == genotype


@pytest.mark.long
def test_mutated_genotypes_parse_or_are_refused():
    chance = random.Random(0)
    for _ in range(500):
        text = str(chance.choice([DARTS_V1, DARTS_V2]))
        for _ in range(chance.choice([0, 1, 1, 2, 5, 20])):
            start = chance.randrange(len(text) + 1)
            end = start + chance.choice([0, 0, 1, 2, 10])
            text = text[:start] + chance.choice([*TOKENS, chr(chance.randrange(0x10000))]) + text[end:]
        parses_or_is_refused(text)


@pytest.mark.long
@settings(max_examples=50, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(TOKENS)).map("".join)))
def test_any_text_parses_or_is_refused(text):
    parses_or_is_refused(text)
