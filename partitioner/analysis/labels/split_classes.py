"""How far each split weight could be split, from the run of the labels that split it: see `SplitClass`."""

from __future__ import annotations

import torch

from partitioner.analysis.labels.label_runs import runs_of
from partitioner.analysis.labels.label_state import Labels
from partitioner.sharding.split_class import SplitClass

__all__ = ["split_classes"]


def split_classes(labels: Labels, sizes: dict[tuple[str, int], int]) -> dict[str, SplitClass]:
    """By weight. sizes: of the dims that labels number."""
    atoms_of: dict[int, list[tuple[int, int]]] = {}
    count_of: list[int] = []
    found: dict[str, SplitClass] = {}
    runs: list[tuple[int, range]] = []
    """Sites whose atoms hold labels in order, not entered in `atoms_of`: of a vocabulary they are many."""
    for number, site in enumerate(labels.sites):
        in_order = runs_of(site, labels)
        ids = [] if in_order else torch.unique(site.ids).tolist()
        count = site.ids.numel() if in_order else len(ids)
        count_of.append(count)
        runs += [(number, run) for run in in_order]
        for place, identity in enumerate(ids):
            for label in labels.lattice.labels(identity):
                for member in labels.lattice.members(label):
                    atoms_of.setdefault(member, []).append((number, place))
        if site.weight is not None:
            _keep(found, site.weight.name, SplitClass(count, count))
    for (name, dim), base in labels.bases.items():
        size = sizes[name, dim]
        labels_of = range(base, base + size)
        met = [(number, run) for number, run in runs if run.start < labels_of.stop and labels_of.start < run.stop]
        if met and all(run == labels_of for _, run in met) and atoms_of.keys().isdisjoint(labels_of):
            _keep(found, name, SplitClass(size, size))
            continue
        needed = {
            (*atoms_of.get(label, ()), *((number, label - run.start) for number, run in met if label in run))
            for label in labels_of
        }
        sites = {number for atoms in needed for number, _ in atoms}
        atoms = min((count_of[number] for number in sites), default=1)  # that no site needs: counted as one piece
        _keep(found, name, SplitClass(atoms, min(len(needed), atoms)))
    return found


def _keep(found: dict[str, SplitClass], name: str, mine: SplitClass) -> None:
    """Of two uses of one weight, that with the fewer atoms says how far it goes."""
    found[name] = min(found.get(name, mine), mine)
