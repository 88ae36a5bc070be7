"""The published matrix of what composes with what is what happens."""

import re

import pytest

from tests.laws.composition import ALGORITHMS, REFUSED, TRAINS, TRANSFORMS, begun, build, cells, outcome, published

PUBLISHED = published()
REFUSALS = [cell for cell, said in PUBLISHED.items() if said != TRAINS]


def test_the_page_has_every_transform_over_the_algorithms():
    assert {(inner, outer) for inner in ALGORITHMS for outer in TRANSFORMS} <= set(PUBLISHED) <= set(cells())


def test_refusals_are_few_and_one_sentence_each():
    assert len(REFUSALS) < len(PUBLISHED) / 4
    for cell in REFUSALS:
        sentence = PUBLISHED[cell].removeprefix(REFUSED)
        assert sentence and "\n" not in sentence and not sentence.endswith("."), cell


def test_every_pair_is_built_or_refused_as_the_page_says():
    """Those that train are composed at least; the refusals that come that early say the same."""
    early = {}
    for inner, outer in PUBLISHED:
        try:
            build(inner, outer)
        except ValueError as error:
            early[inner, outer] = f"{REFUSED}{error}"
    assert early == {cell: PUBLISHED[cell] for cell in early}


@pytest.mark.slow
@pytest.mark.parametrize(("inner", "outer"), REFUSALS, ids=" then ".join)
def test_refusals_say_why_when_the_process_is_built(inner, outer):
    with pytest.raises(ValueError, match=re.escape(PUBLISHED[inner, outer].removeprefix(REFUSED))):
        begun(inner, outer)


@pytest.mark.parametrize("outer", ["personal_model", "private", "uplink"])
def test_these_train_over_scaffold(outer):
    assert outcome("SCAFFOLD", outer) == TRAINS


@pytest.mark.slow
@pytest.mark.parametrize("outer", TRANSFORMS)
def test_the_page_is_true(outer, capsys):
    """Three jitted rounds of every pair; prints the row."""
    inners = [inner for inner in (*ALGORITHMS, *TRANSFORMS) if (inner, outer) in PUBLISHED]
    found = {inner: outcome(inner, outer) for inner in inners}
    with capsys.disabled():
        print(f"\n{outer} over: " + "; ".join(f"{inner}: {text}" for inner, text in found.items()))
    assert found == {inner: PUBLISHED[inner, outer] for inner in inners}
