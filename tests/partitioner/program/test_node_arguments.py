"""Reading nodes: sizes at values of the symbols."""

import sympy

from partitioner.program.node_arguments import evaluate, layer_of

BATCH, SEQUENCE = sympy.Symbol("batch"), sympy.Symbol("sequence")


def test_sizes_are_those_of_the_symbols_whatever_their_order() -> None:
    """Values alone do not say whose they are."""
    assert evaluate(BATCH * 8, {BATCH: 2, SEQUENCE: 5}) == 16
    assert evaluate(BATCH * 8, {SEQUENCE: 2, BATCH: 5}) == 40
    assert evaluate(SEQUENCE, {BATCH: 2, SEQUENCE: 5}) == 5
    assert evaluate(SEQUENCE, {SEQUENCE: 2, BATCH: 5}) == 2


def test_a_symbol_that_is_not_given_counts_as_one() -> None:
    assert evaluate(BATCH * SEQUENCE, {BATCH: 7}) == 7
    assert evaluate(BATCH * SEQUENCE, {SEQUENCE: 3}) == 3
    assert evaluate(BATCH + 1, {SEQUENCE: 7}) == 2
    assert evaluate(4, {}) == 4


def test_the_layer_of_a_path_ends_at_its_first_number() -> None:
    assert layer_of("model.layers.0.mlp.experts.3") == "model.layers.0"
    assert layer_of("h.11") == "h.11"
    assert layer_of("lm_head") == layer_of("") == ""
