"""Cuts at the borders of the blocks that share a scale, where weights are quantised and the analysis is free to choose.

    blocks of 128, 14,336 columns on 3 ranks       4,779 + 4,779 + 4,778     ->  4,864 + 4,736 + 4,736
    groups of 32, 6,144 columns on 5 ranks         1,229 x 4 + 1,228         ->  1,216 and 1,248
    blocks of 128, 1,536 columns on 8 ranks        192 each, which is even: stays

Where a cut lies within a block, both ranks beside it hold its scale, and the products of what is held as stored begin
amid a block. It is no mistake, so borders are a preference. What must stay together does; ranks that can have equal
parts have them; the fullest rank has at most one block more of each weight, and that only where no block is then
divided. Of the cuts left, those that divide the fewest blocks are taken, then the most even ones. All weights whose
indices are dealt together are cut together, so that blocks of each of them count.

Which indices share a scale is told by the stored form of a weight (`partitioner.program.program.HeldForm`).
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partitioner.analysis.labels.label_state import Cut, Labels, Site
from partitioner.analysis.labels.repeated_blocks import Blocks
from partitioner.program.program import Program

__all__ = ["Borders", "ScaleBlocks", "cut_notes", "members_of", "members_of_runs", "on_borders"]

Load = Callable[[int, int], float]
Price = tuple[int, float, list[int]]
"""Blocks divided, squares of loads, sizes less than 0: of equal ones, that whose first ranks have more."""

_NEAREST = 4
"""Places on each side of a cut that are compared."""


@dataclass(frozen=True)
class Borders:
    """divided[i]: the blocks of scales that a cut before atom i divides. room: the atoms that a rank may have more so
    that it has at most one block more of each weight. weights: those that have such blocks.
    """

    divided: tuple[int, ...]
    room: int
    weights: tuple[str, ...]


class ScaleBlocks:
    """The blocks of a program's weights, each looked up once. Weights in the same place of identical layers are cut
    alike, so that the blocks of all of them count.
    """

    def __init__(self, program: Program, blocks: Blocks) -> None:
        self.program, self.blocks = program, blocks
        self.any = program.origins is not None and program.origins.has_quantized
        """Whether there are blocks at all."""
        self._found: dict[str, tuple[dict[int, Tensor], ...]] = {}

    def _of(self, name: str) -> tuple[dict[int, Tensor], ...]:
        """By dim, the number of the block that each index is in; several where the layers differ."""
        if name not in self._found:
            found: list[dict[int, Tensor]] = []
            for same in self.blocks.same_weights(name):
                mine = self._alone(same)
                if mine and not any(_alike(mine, other) for other in found):
                    found.append(mine)
            self._found[name] = tuple(found)
        return self._found[name]

    def _alone(self, name: str) -> dict[int, Tensor]:
        origins, weight = self.program.origins, self.program.weights[name]
        if origins is None or weight.source != "checkpoint" or weight.make is not None:
            return {}
        form = origins.held_form(weight.name, weight.aliases)
        if form is None:
            return {}
        last = len(weight.shape) - 1
        outputs, inputs = (last, last - 1) if form.turned else (last - 1, last)
        both = dict(zip((outputs, inputs), form.scale_blocks(), strict=True))
        return {dim: blocks for dim, blocks in both.items() if _shared(blocks)}

    def deal(
        self, sizes: list[int], site: Site, places: Tensor, members: Tensor, labels: Labels, load: Load
    ) -> list[int]:
        """The number of a site's atoms for each rank, dealt in order: `sizes`, or moved to borders.

        places[K]: the atom of each contracted index. members: as of `members_of`. load: as in `on_borders`. What was
        found is kept in `labels.cuts`.
        """
        borders = self._borders(site, sum(sizes), places, labels, members) if self.any else None
        if borders is None:
            return sizes
        moved = on_borders(sizes, borders, load)
        divided = sum(borders.divided[cut] for cut in itertools.accumulate(moved[:-1]))
        labels.cuts.update(dict.fromkeys(borders.weights, Cut(tuple(sizes), tuple(moved), divided)))
        return moved

    def _borders(self, site: Site, count: int, places: Tensor, labels: Labels, pairs: Tensor) -> Borders | None:
        """None where no weight of the site's atoms has blocks."""
        found: list[tuple[str, int, Tensor, Tensor]] = []
        if site.weight is not None:
            found.append((site.weight.name, site.weight.dim, site.weight.indices, places))
        starts = sorted((base, name, dim) for (name, dim), base in labels.bases.items())
        bases = torch.tensor([base for base, _, _ in starts], dtype=torch.int64)
        owners = torch.bucketize(pairs[0], bases, right=True) - 1
        for owner in torch.unique(owners).tolist():
            base, name, dim = starts[owner]
            mine = pairs[:, owners == owner]
            found.append((name, dim, mine[0] - base, mine[1]))
        divided = torch.zeros(count + 1, dtype=torch.int64)
        room, weights = count, []
        for name, dim, indices, atom in found:
            for blocks in self._of(name):
                if dim in blocks:
                    weights.append(name)
                    divided += _divided(blocks[dim][indices], atom, count)
                    largest = int(torch.bincount(blocks[dim]).max())
                    room = min(room, largest * count // max(len(indices), 1))
        return Borders(tuple(divided.tolist()), room, tuple(dict.fromkeys(weights))) if weights else None


def members_of(atoms: Iterable[Iterable[int]]) -> Tensor:
    """[2, ..]: labels of atoms, and the atom that each is in."""
    return torch.tensor([(label, i) for i, atom in enumerate(atoms) for label in atom]).reshape(-1, 2).T.contiguous()


def members_of_runs(runs: Iterable[range]) -> Tensor:
    """The same of atoms that have one label of each run, in order."""
    return torch.cat([torch.stack((torch.arange(run.start, run.stop), torch.arange(len(run)))) for run in runs], 1)


def _alike(one: dict[int, Tensor], other: dict[int, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[dim], other[dim]) for dim in one)


def _shared(blocks: Tensor) -> bool:
    """Whether some block has several indices, and not all, and each lies in one run: not so in activation order."""
    distinct = int(torch.unique(blocks).numel())
    return 1 < distinct < blocks.numel() and int((blocks[1:] != blocks[:-1]).sum()) == distinct - 1


def _divided(blocks: Tensor, atoms: Tensor, count: int) -> Tensor:
    """For each place between atoms, the blocks that have members on both sides."""
    most = int(blocks.max()) + 1
    first = torch.full((most,), count).scatter_reduce(0, blocks, atoms, "amin")
    last = torch.full((most,), -1).scatter_reduce(0, blocks, atoms, "amax")
    met = last >= 0
    steps = torch.zeros(count + 2, dtype=torch.int64)
    one = torch.ones(1, dtype=torch.int64)
    steps.scatter_add_(0, first[met] + 1, one.expand(int(met.sum())))
    steps.scatter_add_(0, last[met] + 1, -one.expand(int(met.sum())))
    return steps.cumsum(0)[: count + 1]


def on_borders(sizes: Sequence[int], borders: Borders, load: Load) -> list[int]:
    """The number of atoms of each rank, dealt in order, moved from `sizes` to borders of blocks.

    load(first, last): of the rank that has these atoms, `last` excluded.
    """
    cuts = [0, *itertools.accumulate(sizes)]
    loads = [load(*ends) for ends in itertools.pairwise(cuts)]
    if not any(borders.divided[cut] for cut in cuts[1:-1]) or max(loads) - min(loads) <= 1e-9 * max(loads):
        return list(sizes)
    for room in dict.fromkeys((borders.room, 0)):  # more for a rank only if no block is divided then
        most = max(sizes) + room, (max(loads) + room * sum(loads) / cuts[-1]) * (1 + 1e-9)
        divided, found = _best(cuts, borders, load, most)
        if not divided or not room:
            break
    return found


def _best(cuts: Sequence[int], borders: Borders, load: Load, most: tuple[int, float]) -> tuple[int, list[int]]:
    """Of the places near these cuts, those that divide the fewest blocks, then the most even ones: the blocks, and the
    sizes. most: atoms and load of a rank.
    """
    mean = load(0, cuts[-1]) / (len(cuts) - 1)
    best: dict[int, tuple[Price, list[int]]] = {0: ((0, 0.0, []), [])}
    for cut in cuts[1:]:
        places = [cut] if cut == cuts[-1] else _near(cut, borders, cuts[-1])
        found: dict[int, tuple[Price, list[int]]] = {}
        for place, (start, ((divided, squares, order), dealt)) in itertools.product(places, best.items()):
            if 0 < place - start <= most[0] and (mine := load(start, place)) <= most[1]:
                price = (
                    divided + borders.divided[place],
                    round(squares + (mine / mean) ** 2, 9),
                    [*order, start - place],
                )
                if place not in found or price < found[place][0]:
                    found[place] = price, [*dealt, place - start]
        best = found
    (divided, _, _), sizes = best[cuts[-1]]  # there is one: the cuts as they were are among the places
    return divided, sizes


def _near(cut: int, borders: Borders, count: int) -> list[int]:
    """Where a cut may go: it stays, or the nearest places that divide the fewest blocks."""
    reach = max(borders.room, 1) + 1
    around = [place for place in range(cut - reach, cut + reach + 1) if 0 < place < count]
    fewest = min(borders.divided[place] for place in around)
    good = [place for place in around if borders.divided[place] == fewest]
    middle = bisect_right(good, cut)
    return sorted({cut, *good[max(middle - _NEAREST, 0) : middle + _NEAREST]})


def cut_notes(cuts: Mapping[str, Cut]) -> list[str]:
    """For the report: where cuts were moved to borders, and where they lie within blocks."""
    alike: dict[Cut, list[str]] = {}
    for name, cut in cuts.items():
        if cut.sizes != cut.even or cut.divided:
            alike.setdefault(cut, []).append(name)
    notes = []
    for cut, names in alike.items():
        which = names[0] + (f" and {len(names) - 1} more weights" if len(names) > 1 else "")
        parts, even = ("+".join(map(str, sizes)) for sizes in (cut.sizes, cut.even))
        said = [f"cut {parts}" + (f", not {even}, for the borders of blocks of scales" if parts != even else "")]
        if cut.divided:
            said.append("where a block lies across a cut, the ranks beside it hold its scale")
        notes.append(f"{which}: {'; '.join(said)}")
    return notes
