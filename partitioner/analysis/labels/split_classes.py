"""How far each split weight could be split, from the run of the labels that split it: see `SplitClass`."""

from __future__ import annotations

import torch

from partitioner.analysis.labels.label_state import Labels, Site
from partitioner.sharding.split_class import SplitClass

__all__ = ["split_classes"]


def split_classes(labels: Labels, sizes: dict[tuple[str, int], int]) -> dict[str, SplitClass]:
    """By weight. sizes: of the dims that labels number."""
    atoms_of: dict[int, list[tuple[int, int]]] = {}
    count_of: list[int] = []
    found: dict[str, SplitClass] = {}
    runs: list[tuple[int, range]] = []
    """Sites whose atoms are labels in order, not entered in `atoms_of`: of a vocabulary they are many."""
    for number, site in enumerate(labels.sites):
        run = _run_of(site, labels)
        ids = None if run is not None else torch.unique(site.ids).tolist()
        count = len(site.ids) if ids is None else len(ids)
        count_of.append(count)
        if run is not None:
            runs.append((number, run))
        for place, identity in enumerate(ids or ()):
            for label in labels.lattice.labels(identity):
                for member in labels.lattice.members(label):
                    atoms_of.setdefault(member, []).append((number, place))
        if site.weight is not None:
            _keep(found, site.weight.name, SplitClass(count, count))
    for (name, dim), base in labels.bases.items():
        size = sizes[name, dim]
        labels_of = range(base, base + size)
        met = [(number, run) for number, run in runs if run.start < labels_of.stop and labels_of.start < run.stop]
        if any(run.start <= labels_of.start and labels_of.stop <= run.stop for _, run in met):
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


def _run_of(site: Site, labels: Labels) -> range | None:
    """The labels that the site's indices are, where each is one by itself, in order."""
    first, count = int(site.ids.reshape(-1)[0]) - 1, site.ids.numel()
    inside = first >= 0 and first + count <= labels.count
    alone = inside and torch.equal(site.ids.reshape(-1), torch.arange(first + 1, first + 1 + count))
    return range(first, first + count) if alone else None
