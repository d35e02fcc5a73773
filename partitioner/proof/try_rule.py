"""Whether an op does what its layout rule says, tried on numbers.

A rule is believed by everything that infers layouts; one that is wrong gives wrong results on several ranks. So each
of its claims is tried: the op on parts of the operands, against the parts of its result.

    letter in the output          computed in two parts, put together along that dim
    summed letter                 computed in two parts, added up; a term without the letter counted once
    averages                      of a summed letter: each part counts by its share of the letter
    letter in neither             the rule is silent about what becomes of it: only a whole letter may be left out
    terms                         linear: f(u) + f(x - u) = f(x), one operand of each term at a time

What a rule is more careful about than it needs to be (a letter that it calls whole) cannot be wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from partitioner.analysis.rules import notation
from partitioner.analysis.rules.notation import Notation
from partitioner.errors import LayoutError
from partitioner.program.program import Value

__all__ = ["check_rule"]

_CLOSE = 1e-9


def check_rule(op: Any, *args: Any, **kwargs: Any) -> Notation:
    """Raises `LayoutError` where `op(*args, **kwargs)` does not do what its rule says. Operands in float64."""
    trial = _Trial(op, args, kwargs)
    rule = trial.rule
    if rule.opaque:
        raise LayoutError(f"{trial.name} has no layout rule: it needs all of every operand, so it cannot be split")
    letters = {letter for operand in rule.operands for letter in operand.letters if letter is not None}
    for letter in sorted(letters - rule.whole):
        trial.letter(letter)
    if rule.terms:
        trial.linear()
    return rule


class _Trial:
    def __init__(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.op, self.name = op, op.__name__ if hasattr(op, "__name__") else str(op)
        graph = fx.Graph()
        self.tensors: dict[fx.Node, Tensor] = {}

        def placed(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            node = graph.placeholder(f"operand_{len(self.tensors)}")
            node.meta["val"] = Value(tuple(leaf.shape), leaf.dtype)
            self.tensors[node] = leaf
            return node

        self.node = graph.call_function(op, *fx.node.map_aggregate((args, kwargs), placed))
        self.whole = self.run(self.tensors)
        values = tuple(Value(tuple(each.shape), each.dtype) for each in self.whole)
        self.node.meta["val"] = values[0] if len(values) == 1 else values
        self.rule = notation(self.node)
        if any(operand.via for operand in self.rule.operands):
            raise LayoutError(f"{self.name}: rules with `via` cannot be tried")

    def run(self, tensors: dict[fx.Node, Tensor]) -> list[Tensor]:
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), tensors.__getitem__)
        found = self.op(*args, **kwargs)
        return list(found) if isinstance(found, (tuple, list)) else [found]

    def letter(self, letter: str) -> None:
        rule = self.rule
        sizes = {
            self.tensors[o.node].shape[dim]
            for o in rule.operands
            for dim, name in enumerate(o.letters)
            if name == letter
        }
        if len(sizes) != 1 or min(sizes) < 2:
            raise LayoutError(
                f"{self.name}: the letter {letter!r} must stand for one size above 1, got {sorted(sizes)}"
            )
        (size,) = sizes
        cut = size // 2 or 1
        parts = []
        for part, (start, stop) in enumerate(((0, cut), (cut, size))):
            tensors = dict(self.tensors)
            for operand in rule.operands:
                for dim, name in enumerate(operand.letters):
                    if name == letter:
                        tensors[operand.node] = tensors[operand.node].narrow(dim, start, stop - start)
            if part and letter in rule.sums and not rule.averages:
                for term in self._without(letter):
                    tensors[term] = torch.zeros_like(tensors[term])
            parts.append(self._run_part(tensors, letter))
        for place, names in enumerate(rule.outputs):
            one, other = parts[0][place], parts[1][place]
            if letter in names and letter in rule.sums:
                raise LayoutError(f"{self.name}: the rule has {letter!r} in output {place} and says that it is summed")
            if letter in names:
                if names.index(letter) >= one.dim() or one.dim() != other.dim():
                    raise LayoutError(f"{self.name}: output {place} has {one.dim()} dims, the rule names {len(names)}")
                together, how = _put_together(one, other, names.index(letter)), "its parts put together"
            elif letter in rule.sums and rule.averages:
                together, how = (one * cut + other * (size - cut)) / size, "the average of its parts"
            elif letter in rule.sums:
                together, how = one + other, "the sum of its parts"
            else:
                raise LayoutError(
                    f"{self.name}: the rule does not say what becomes of {letter!r} in output {place}: name it in the "
                    "output, in `sums` or in `whole`"
                )
            self._same(together, self.whole[place], f"split along {letter!r}, {how}")

    def _run_part(self, tensors: dict[fx.Node, Tensor], letter: str) -> list[Tensor]:
        try:
            return self.run(tensors)
        except Exception as error:
            raise LayoutError(f"{self.name}: does not run on a part along {letter!r}: {error}") from error

    def _without(self, letter: str) -> list[fx.Node]:
        """One operand of each term that does not have the letter: on one rank it counts, on the others it is zero."""
        terms = [[self.rule.operands[i] for i in sorted(term)] for term in self.rule.terms]
        return [term[0].node for term in terms if not any(letter in operand.letters for operand in term)]

    def linear(self) -> None:
        generator = torch.Generator().manual_seed(0)
        rule = self.rule
        for place in range(max(map(len, rule.terms))):
            first, second = dict(self.tensors), dict(self.tensors)
            for term in rule.terms:
                inside = sorted(term - rule.denominators)
                node = rule.operands[inside[min(place, len(inside) - 1)]].node
                x = self.tensors[node]
                if not x.is_floating_point():
                    continue
                first[node] = torch.rand(x.shape, dtype=x.dtype, generator=generator)
                second[node] = x - first[node]
            moved = [node for node in first if first[node] is not self.tensors[node]]
            terms_moved = sum(any(rule.operands[i].node in moved for i in term) for term in rule.terms)
            if terms_moved < len(rule.terms):
                continue  # a term of whole numbers only cannot be halved
            for one, other, whole in zip(self.run(first), self.run(second), self.whole, strict=True):
                self._same(one + other, whole, "with one operand of each term given as a sum, the sum of the results")

    def _same(self, found: Tensor, whole: Tensor, how: str) -> None:
        if found.shape != whole.shape:
            raise LayoutError(f"{self.name}: {how} is {list(found.shape)}, the whole result {list(whole.shape)}")
        scale = max(whole.abs().max().item(), 1e-300) if whole.is_floating_point() else 1.0
        gap = (found.double() - whole.double()).abs().max().item() / scale
        if not gap <= _CLOSE:
            raise LayoutError(f"{self.name}: {how} differs from the whole result by {gap:.1e}: the rule is wrong")


def _put_together(one: Tensor, other: Tensor, dim: int) -> Tensor:
    """Along `dim`; where the parts do not fit, one of them, whose shape then differs from the whole's."""
    alike = [a == b for a, b in zip(one.shape, other.shape, strict=True)]
    return torch.cat([one, other], dim) if all(alike[:dim] + alike[dim + 1 :]) else one
