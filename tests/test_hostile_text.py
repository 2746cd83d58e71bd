"""Genotypes and options of any text are read, or refused in one line."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from command_line.errors import UserError
from config import SearchConfig
from genotypes import DARTS_V1, DARTS_V2, GenotypeError, from_str


def parses_or_is_refused(text):
    try:
        genotype = from_str(text)
    except GenotypeError:
        return
    assert from_str(str(genotype)) == genotype


TOKENS = [
    *"()[],='\"- \n\\",
    "Genotype",
    "normal",
    "normal_concat",
    "reduce",
    "reduce_concat",
    "range",
    "__import__('os')",
    "'sep_conv_3x3'",
    "'none'",
    "0",
    "1",
    "2",
    "9" * 5000,
    "2e999",
    "True",
    "None",
    "lambda: 0",
    "*",
    "**",
    "f'{1}'",
    "\0",
]


@pytest.mark.long
def test_ten_thousand_mutated_genotypes_parse_or_are_refused():
    chance = random.Random(0)
    for _ in range(10_000):
        text = str(chance.choice([DARTS_V1, DARTS_V2]))
        for _ in range(chance.choice([0, 1, 1, 2, 5, 20])):
            start = chance.randrange(len(text) + 1)
            end = start + chance.choice([0, 0, 1, 2, 10])
            text = text[:start] + chance.choice([*TOKENS, chr(chance.randrange(0x10000))]) + text[end:]
        parses_or_is_refused(text)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(TOKENS)).map("".join)))
def test_any_text_parses_or_is_refused(text):
    parses_or_is_refused(text)


@pytest.mark.parametrize("text", ["(" * 100_000, "[" * 5000 + "]" * 5000, "-" * 100_000, "Genotype(" * 3000, "\ud800"])
def test_deep_and_broken_texts_are_refused(text):
    with pytest.raises(GenotypeError):
        from_str(text)


WORDS_OF_OPTIONS = [
    "--layers",
    "--epochs",
    "--w-lr",
    "--name",
    "--seed",
    "--resume",
    "--checkpoint-minutes",
    "--bogus",
    "0",
    "-1",
    "1e400",
    "nan",
    "2",
    "../x",
    "é",
    "",
]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(WORDS_OF_OPTIONS), max_size=6))
def test_any_options_are_read_or_refused(words):
    try:
        SearchConfig(words)
    except UserError:
        return
    except SystemExit as stop:
        code = stop.code
    else:
        return
    assert code == 2
