"""Genotypes of any text are read, or refused in one line."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genotypes import DARTS_V1, DARTS_V2, GenotypeError, from_str

WORDS = "Genotype normal normal_concat reduce reduce_concat range __import__('os') 'sep_conv_3x3' 'none' True None * **"
TOKENS = [*"()[],='\"- \n\\\0", *WORDS.split(), "0", "1", "2", "9" * 5000, "2e999", "lambda: 0", "f'{1}'"]


def parses_or_is_refused(text):
    try:
        genotype = from_str(text)
    except GenotypeError:
        return
    assert from_str(str(genotype)) == genotype


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
