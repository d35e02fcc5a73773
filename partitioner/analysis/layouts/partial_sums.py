"""Through which ops a partial sum may travel before it is completed, and where it meets another one.

    linear -> view -> add <- linear                two partial sums meet: one all-reduce behind the add completes both
    combine -> reshape -> add <- linear            routed experts beside shared ones, or beside attention: the same
    combine -> reshape -> add <- residual          what is added is complete already: nothing is shared

Where the other branch is split over the same ranks, its partial sums are all-reduced in any case, and what the routed
experts leave as partial sums over these ranks costs nothing more.
"""

from __future__ import annotations

from torch import fx

from partitioner.analysis.rules import notation
from partitioner.analysis.rules.data_movement import is_move
from partitioner.program.node_arguments import node_values
from partitioner.program.program import Value

__all__ = ["addends", "is_linear_in", "joins_a_product"]


def addends(user: fx.Node) -> list[fx.Node]:
    """The operands that `user` adds; none where it does something else."""
    rule = None if is_move(user) else notation(user)
    if rule is None or len(rule.terms) < 2:
        return []
    return [rule.operands[i].node for term in rule.terms for i in term]


def is_linear_in(user: fx.Node, operand: fx.Node) -> bool:
    """Whether the result of a sum of operands is the sum of the results, and `user` sums nothing itself."""
    if is_move(user):
        return sum(bool(node_values(source)) for source in user.all_input_nodes) == 1
    rule = notation(user)
    places = [i for i, each in enumerate(rule.operands) if each.node is operand]
    if len(places) != 1 or (rule.sums and len(rule.operands) > 1) or places[0] in rule.denominators:
        return False
    return any(places[0] in term for term in rule.terms)


def joins_a_product(combine: fx.Node, *, whole: frozenset[str] = frozenset()) -> bool:
    """Whether what routed experts make is added to a product with a split weight before anything else needs it.

    whole: weights that are not split, whose products are no partial sums.
    """
    node = combine
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_function" or not isinstance(user.meta.get("val"), Value):
            return False
        if any(_is_product(other, user, whole) for other in addends(user) if other is not node):
            return True
        if not is_linear_in(user, node):
            return False
        node = user
    return False


def _is_product(node: fx.Node, user: fx.Node, whole: frozenset[str]) -> bool:
    """Whether `node` is a product with a weight that nobody else reads, or linear in one."""
    if node.op != "call_function" or list(node.users) != [user] or not node_values(node):
        return False
    if not is_move(node):
        rule = notation(node)
        weights = [each.node for each in rule.operands if each.node.op == "get_attr"]
        if rule.sums and weights:
            return not any(str(weight.target) in whole for weight in weights)
    sources = [source for source in node.all_input_nodes if node_values(source)]
    return any(is_linear_in(node, source) and _is_product(source, node, whole) for source in sources)
