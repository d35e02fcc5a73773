"""How far each split weight could be split, from the run of the labels that split it: see `SplitClass`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from partitioner.analysis.labels.label_state import Labels
from partitioner.analysis.labels.site_indices import runs_of
from partitioner.sharding.split_class import SplitClass

__all__ = ["split_classes"]


def split_classes(labels: Labels, sizes: dict[tuple[str, int], int]) -> dict[str, SplitClass]:
    """By weight. sizes: of the dims that labels number."""
    needs = _Needs()
    count_of: list[int] = []
    found: dict[str, SplitClass] = {}
    runs: list[tuple[int, range]] = []
    """Sites whose atoms hold labels in order, not entered in `needs`: of a vocabulary they are many."""
    for number, site in enumerate(labels.sites):
        in_order = runs_of(site, labels)
        ids = [] if in_order else torch.unique(site.ids).tolist()
        count = site.ids.numel() if in_order else len(ids)
        count_of.append(count)
        runs += [(number, run) for run in in_order]
        for identity in ids:
            members = map(labels.lattice.members, labels.lattice.labels(identity))
            needs.add(itertools.chain.from_iterable(members), number)
        if site.weight is not None:
            _keep(found, site.weight.name, SplitClass(count, count))
    for (name, dim), base in labels.bases.items():
        size = sizes[name, dim]
        labels_of = range(base, base + size)
        met = [(number, run) for number, run in runs if run.start < labels_of.stop and labels_of.start < run.stop]
        of_labels = [needs.of.get(label, 0) for label in labels_of]
        if met and all(run == labels_of for _, run in met) and not any(of_labels):
            _keep(found, name, SplitClass(size, size))
            continue
        in_runs = (tuple((number, label - run.start) for number, run in met if label in run) for label in labels_of)
        needed = set(zip(of_labels, in_runs, strict=True))
        sites = {number for need, places in needed for number in (*needs.sites[need], *(n for n, _ in places))}
        atoms = min((count_of[number] for number in sites), default=1)  # that no site needs: counted as one piece
        _keep(found, name, SplitClass(atoms, min(len(needed), atoms)))
    return found


class _Needs:
    """The atoms that need each label, as a number: the same for labels that the same atoms need, in the same order."""

    def __init__(self) -> None:
        self.of: dict[int, int] = {}
        """By label; 0 where no atom needs it."""
        self.sites: list[frozenset[int]] = [frozenset()]
        """By number, the sites of the atoms."""
        self._same: dict[frozenset[int], frozenset[int]] = {}

    def add(self, labels: Iterable[int], site: int) -> None:
        """One more atom, of this site, needs them."""
        with_it: dict[int, int] = {}
        for label in labels:
            before = self.of.get(label, 0)
            number = with_it.get(before)
            if number is None:
                number = with_it[before] = len(self.sites)
                sites = self.sites[before] | {site}
                self.sites.append(self._same.setdefault(sites, sites))
            self.of[label] = number


def _keep(found: dict[str, SplitClass], name: str, mine: SplitClass) -> None:
    """Of two uses of one weight, that with the fewer atoms says how far it goes."""
    found[name] = min(found.get(name, mine), mine)
