"""The placement: which rank owns which indices of which weight, found by labels, owners and a few repairs.

    repeat: run the labels; divide the atoms of every site over the ranks
            where a site has fewer atoms than ranks, keep the earliest weight among its sources whole, with its class
    then:   where that was due to a whole-row reduction, see whether reducing in parts is cheaper, class by class

Keeping the *earliest* source whole brings the alternation of column- and row-parallel back in phase after a lone
linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import fx

from partitioner.analysis.labels.assign_owners import Atom, Owned, dealt_indices, divide, even_sizes, loads_of
from partitioner.analysis.labels.block_borders import ScaleBlocks, members_of, members_of_runs
from partitioner.analysis.labels.causes import Offence, earliest, offences_of, price_of_parts, why_everywhere
from partitioner.analysis.labels.label_memory import LabelMemory
from partitioner.analysis.labels.label_state import Collapse, Cut, Labels, Site
from partitioner.analysis.labels.propagate_labels import LabelRun
from partitioner.analysis.labels.repeated_blocks import Blocks
from partitioner.analysis.labels.site_indices import Atoms, runs_of
from partitioner.analysis.labels.split_classes import split_classes
from partitioner.program.program import Program
from partitioner.sharding.layout import Split
from partitioner.sharding.split_class import SplitClass

__all__ = ["Decisions", "decide"]

_FULL_REDUCTION = 0.10
"""Price of one more all-reduce of an activation per layer, as a share of the layer's weights kept whole."""
_SMALL_REDUCTION = 0.02
"""Price of one more all-reduce of one number per token per layer."""

_MOST_ROUNDS = 200
"""Each keeps at least one more class of weights whole, so that no model needs as many."""


@dataclass(frozen=True)
class Decisions:
    """splits: weight -> how its dims are split. partial: reductions done in parts. pinned: replicated -> the reason."""

    splits: dict[str, dict[int, Split]]
    partial: frozenset[str]
    pinned: dict[str, str]
    shared: dict[str, str]
    """Split weights that several ranks hold some of, where that is due to a whole row -> what needs the row."""
    classes: dict[str, SplitClass] = field(default_factory=dict)
    """Split weights, with what a rank would hold of them at other numbers of ranks."""
    cuts: dict[str, Cut] = field(default_factory=dict)
    """Split weights that are quantised in blocks, with how these lie to the cuts."""


@dataclass
class _Solution:
    splits: dict[str, tuple[int, Split]]
    pinned: dict[str, str]
    partial: frozenset[str]
    cost: float
    whole: int
    """Bytes of the analysed layers' weights that every rank holds."""
    sums: tuple[int, int]
    """All-reduces in the analysed layers: of activations, of one number per token."""
    labels: Labels
    shared: dict[str, str] = field(default_factory=dict)
    collapses: dict[str, Collapse] = field(default_factory=dict)
    """Whole-row reductions that led to a weight kept whole, or shared by several ranks, by that weight."""


class _Search:
    def __init__(
        self, program: Program, blocks: Blocks, axis: str, keep_whole: dict[str, str], together: Mapping[str, int]
    ) -> None:
        self.program, self.blocks, self.axis, self.keep_whole = program, blocks, axis, keep_whole
        self.together = {same: n for name, n in together.items() for same in blocks.same_nodes(name)}
        self.ranks = program.mesh.size(axis)
        self.memory = LabelMemory()
        self.scales = ScaleBlocks(program, blocks)
        self.bytes: dict[str, int] = {}
        """Weights that some run could split, with their sizes: what keeping whole is measured against."""
        self.order = {str(n.target): i for i, n in reversed(list(enumerate(program.graph.nodes))) if n.op == "get_attr"}

    def labels(self, pinned: dict[str, str], partial: frozenset[str]) -> Labels:
        run = LabelRun(
            self.program, self.ranks, pinned=pinned.keys(), partial=partial, together=self.together, memory=self.memory
        )
        for step in self.blocks.steps():
            if isinstance(step, fx.Node):
                run.run([step])
            else:
                run.states[step[0]] = run.states.get(step[1])
        return run.labels

    def resolve(self, partial: frozenset[str]) -> _Solution:
        """Keeps weights whole until every site can be divided."""
        pinned = dict(self.keep_whole)
        collapses: dict[str, Collapse] = {}
        met: dict[str, str] = {}
        """Weights that could have ended a split, by now whole, with the cause: it is theirs too if they start none."""
        for _ in range(_MOST_ROUNDS):
            labels = self.labels(pinned, partial)
            found = _divide_sites(labels, self.axis, self.scales)
            self._note_sizes(labels)
            if isinstance(found, dict):
                self._explain(found, labels, pinned, collapses)
                return self._solution(found, pinned, partial, labels, collapses)
            for offence in self._causes(labels, found):
                reason = met.get(offence.weight, offence.reason)
                for name in self.blocks.same_weights(offence.weight):
                    pinned[name] = reason
                for site in labels.sites:
                    if site.node in offence.sites and site.weight is not None:
                        met.setdefault(site.weight.name, f"what it contracts stays whole: {reason}")
                if offence.collapse is not None:
                    collapses[offence.weight] = offence.collapse
        raise AssertionError(f"keeping weights whole does not end; last: {found}")

    def _explain(
        self, splits: dict[str, tuple[int, Split]], labels: Labels, pinned: dict[str, str],
        collapses: dict[str, Collapse],
    ) -> None:  # fmt: skip
        """Takes out of `splits` what every rank holds all of, and notes in `pinned` and `collapses` why it does."""
        everywhere: dict[str, str] = {}
        for name, (dim, split) in list(splits.items()):
            if self._is_whole(name, dim, split):
                del splits[name]
                everywhere[name], collapse = why_everywhere(labels, name)
                if collapse is not None:
                    collapses[name] = collapse
        for name in splits:
            collapse = why_everywhere(labels, name)[1] if self._shared(splits, name) else None
            if collapse is not None:
                collapses.setdefault(name, collapse)
        for name, why in (*everywhere.items(), *labels.unsplit.items()):
            for same in self.blocks.same_weights(name):
                if same not in splits:
                    pinned.setdefault(same, why)

    def _causes(self, labels: Labels, offences: list[Offence]) -> list[Offence]:
        """The first offence, and those that do not come after another: what follows one may be out of phase only.

        Behind an offending contraction everything is suspect, up to a contraction that is in order.
        """
        bad = {node for offence in offences for node in offence.sites}
        good = {site.node for site in labels.sites if site.kind == "contract"} - bad
        suspect: set[fx.Node] = set()
        for step in self.blocks.steps():
            if isinstance(step, tuple):
                suspect.update(step[:1] if step[1] in suspect else ())
            elif step in bad or (step not in good and any(n in suspect for n in step.all_input_nodes)):
                suspect.add(step)
        return [o for i, o in enumerate(offences) if i == 0 or labels.starts[o.weight] not in suspect]

    def _note_sizes(self, labels: Labels) -> None:
        """Sizes of the weights of layers: look-up tables and what makes the outputs weigh too much in small models."""
        outside = {s.weight.name for s in labels.sites if s.weight and s.letter == "v"}
        for site in labels.sites:
            if site.kind == "gather":
                ids = site.ids.reshape(-1)
                # all of one weight's in order, as those of a vocabulary are: the ends say which weights
                ends = ids[[0, -1]] if runs_of(site, labels) else torch.unique(ids)
                outside |= labels.weights_of(ends.tolist())
        for name in [*labels.starts, *(s.weight.name for s in labels.sites if s.weight)]:
            if name not in outside:
                self.bytes.setdefault(name, self.program.weights[name].bytes)

    def classes(self, found: _Solution) -> dict[str, SplitClass]:
        """Of the split weights of layers that were analysed."""
        sizes = {(name, dim): self.program.weights[name].shape[dim] for name, dim in found.labels.bases}
        known = split_classes(found.labels, sizes)
        return {name: known[name] for name in found.splits}

    def _is_whole(self, name: str, dim: int, split: Split) -> bool:
        return all(indices.size == self.program.weights[name].shape[dim] for indices in split.owned)

    def _solution(
        self,
        splits: dict[str, tuple[int, Split]],
        pinned: dict[str, str],
        partial: frozenset[str],
        labels: Labels,
        collapses: dict[str, Collapse],
    ) -> _Solution:
        whole = sum(size for name, size in self.bytes.items() if name in pinned and name not in self.keep_whole)
        whole += round(sum(self._shared(splits, name) for name in splits if name in self.bytes))
        full = sum(s.kind == "contract" and s.letter != "v" for s in labels.sites)
        small = sum(s.kind == "reduce" for s in labels.sites)
        share = whole / max(sum(self.bytes.values()), 1)
        cost = share + (_FULL_REDUCTION * full + _SMALL_REDUCTION * small) / self._layers
        return _Solution(splits, pinned, partial, cost, whole, (full, small), labels, collapses=collapses)

    def _shared(self, splits: Mapping[str, tuple[int, Split]], name: str) -> float:
        """Bytes that ranks hold beside an even part, as if every rank held these; all of a weight that is whole."""
        weight = self.program.weights[name]
        if name not in splits:
            return weight.bytes
        dim, split = splits[name]
        size = weight.shape[dim]
        return weight.bytes / size * (sum(split.sizes) - size) / (self.ranks - 1)

    @property
    def _layers(self) -> int:
        return max(self.blocks.analysed, 1)

    def best(self, partial: frozenset[str] | None) -> _Solution:
        if partial is not None:
            return self.resolve(partial)
        best = self.resolve(frozenset())
        tried: set[str] = set()
        refused: dict[str, str] = {}
        causes = dict(best.collapses)
        for weight, collapse in causes.items():
            size = self._shared(best.splits, weight) if weight in self.bytes else 0.0
            share = size * self._layers / max(sum(self.bytes.values()), 1)
            if collapse.node.name in tried or not collapse.can_be_partial:
                continue
            same = frozenset(self.blocks.same_nodes(collapse.node.name))
            if share < _SMALL_REDUCTION:
                refused[weight] = price_of_parts(size, (0, 1), self.ranks)
                continue
            tried |= same
            other = self.resolve(best.partial | same)
            if other.cost < best.cost:
                best = other
                continue
            more = [(b - a) / self._layers for a, b in zip(best.sums, other.sums, strict=True)]
            saved = (best.whole - other.whole) / self._layers
            refused[weight] = price_of_parts(saved, (more[0], more[1]), self.ranks)
        told: set[str] = set()  # of identical layers, the first speaks for all
        for weight, price in refused.items():
            for name in set(self.blocks.same_weights(weight)) - told:
                if name in best.pinned:
                    best.pinned[name] += price
                elif weight in best.splits:
                    best.shared[name] = f"{causes[weight].why}{price}"
                told.add(name)
        return best


def _divide_sites(labels: Labels, axis: str, scales: ScaleBlocks) -> dict[str, tuple[int, Split]] | list[Offence]:
    """Owners of every labelled weight index, or what keeps sites from being divided.

    Of sites that share weights only the earliest weight is reported: keeping it whole may bring the others right.
    """
    program = scales.program
    ranks = program.mesh.size(axis)
    offences = offences_of(labels, ranks)
    if offences:
        return earliest(offences)
    cost = _Cost(program, labels)
    owned = Owned(labels.lattice, labels.count)
    columns: dict[str, tuple[int, Split]] = {}
    sized: list[tuple[int, Site, tuple[range, ...], Atoms | None]] = []
    for site in labels.sites:
        runs = runs_of(site, labels)
        atoms = None if runs else Atoms.of(site, labels)
        size = len(runs) if atoms is None else max(map(cost.size, atoms.sets), default=0)
        sized.append((-size, site, runs, atoms))
    for _, site, runs, atoms in sorted(sized, key=lambda s: s[0]):
        if atoms is None and owned.can_give_runs(runs, ranks):
            count = len(runs[0])
            sizes = even_sizes(count, ranks)
            sizes = scales.deal(sizes, site, torch.arange(count), members_of_runs(runs), labels, lambda a, b: b - a)
            indices = owned.give_runs(runs, sizes)
        else:
            atoms = atoms or Atoms.of(site, labels)
            places = _assign(site, atoms, owned, ranks, cost, labels, scales)
            for atom, rank in zip(atoms.sets, places, strict=True):
                owned.give(atom, rank)
            indices = torch.tensor(places)[atoms.inverse]
        if site.weight is not None:
            columns_of = (site.weight.dim, Split((axis,), dealt_indices(site.weight.indices, indices, ranks)))
            if columns.setdefault(site.weight.name, columns_of) != columns_of:
                return [Offence(site.weight.name, "is contracted twice, in ways that cannot be split alike")]
    splits = dict(columns)
    for (name, dim), base in labels.bases.items():
        rows = Split((axis,), owned.sets(base, base + program.weights[name].shape[dim], ranks))
        if splits.setdefault(name, (dim, rows)) != (dim, rows):
            return [Offence(name, "has two uses that cannot be split alike")]
    return splits


class _Cost:
    """Bytes of weights per label; a group costs what its members do."""

    def __init__(self, program: Program, labels: Labels) -> None:
        self.lattice = labels.lattice
        self._bytes: list[float] = []
        """By label."""
        for (name, dim), _ in sorted(labels.numbers.bases.items(), key=lambda item: item[1]):
            weight = program.weights[name]
            self._bytes += [weight.bytes / max(weight.shape[dim], 1)] * weight.shape[dim]
        self._groups: dict[int, float] = {}

    def __call__(self, label: int) -> float:
        if label < len(self._bytes):
            return self._bytes[label]
        if label not in self._groups:
            self._groups[label] = sum(map(self, self.lattice.members(label)))
        return self._groups[label]

    def group(self, label: int) -> frozenset[int]:
        """A group's members; nothing for other labels."""
        return self.lattice.members(label) if label >= len(self._bytes) else frozenset()

    def size(self, atom: Atom) -> int:
        return sum(1 if label < len(self._bytes) else len(self.lattice.members(label)) for label in atom)


def _assign(
    site: Site, found_atoms: Atoms, owned: Owned, ranks: int, cost: _Cost, labels: Labels, scales: ScaleBlocks
) -> list[int]:
    """The rank of each atom: where a coarser site has put its sources already, else by load."""
    atoms, inverse = found_atoms.sets, found_atoms.inverse
    counts = torch.bincount(inverse, minlength=len(atoms)).tolist()
    column = 0.0
    if site.weight is not None:
        weight = scales.program.weights[site.weight.name]
        column = weight.bytes / max(weight.shape[site.weight.dim], 1)
    found: list[int | None] = []
    for atom in atoms:
        common = owned.common(atom, ranks)
        found.append((common & -common).bit_length() - 1 if common else None)
    new = [i for i, rank in enumerate(found) if rank is None]
    if len(new) >= ranks:
        extra = [column * counts[i] for i in new]
        dealt = divide([atoms[i] for i in new], extra, ranks, cost)
        if scales.any and len(new) == len(atoms):
            sizes, load = [dealt.count(rank) for rank in range(ranks)], loads_of(atoms, extra, cost)
            sizes = scales.deal(sizes, site, inverse, members_of(map(labels.expanded, atoms)), labels, load)
            dealt = [rank for rank, size in enumerate(sizes) for _ in range(size)]
    else:
        dealt = [i % ranks for i in range(len(new))]
    for i, rank in zip(new, dealt, strict=True):
        found[i] = rank
    return [rank for rank in found if rank is not None]


def decide(
    program: Program,
    axis: str,
    *,
    blocks: Blocks,
    keep_whole: Mapping[str, str],
    misfits: Mapping[str, str] = MappingProxyType({}),
    together: Mapping[str, int] = MappingProxyType({}),
    partial: frozenset[str] | None = None,
) -> Decisions:
    """Splits of the program's weights over `axis`.

    keep_whole: weights to leave whole, with the reason. misfits: those that an earlier attempt could not lay out;
    they stay whole in all identical layers. together: nodes that it could not lay out (see `LabelRun`). partial: the
    reductions to do in parts; None: find out.
    """
    whole = {same: why for name, why in misfits.items() for same in blocks.same_weights(name)} | dict(keep_whole)
    search = _Search(program, blocks, axis, whole, together)
    found = search.best(partial)
    splits = dict(found.splits)
    classes = search.classes(found)
    for block in blocks.blocks:
        if block.model is not None:
            for mine, theirs in zip(block.weights, block.model.weights, strict=True):
                if theirs in splits and mine not in found.pinned:
                    splits[mine] = splits[theirs]
                    classes[mine] = classes[theirs]
    pinned = {name: reason for name, reason in found.pinned.items() if name not in splits}
    by_dim = {name: {dim: split} for name, (dim, split) in splits.items()}
    cuts = {same: cut for name, cut in found.labels.cuts.items() for same in blocks.same_weights(name)}
    cuts = {name: cut for name, cut in cuts.items() if name in splits}
    return Decisions(by_dim, found.partial, pinned, found.shared, classes, cuts)
