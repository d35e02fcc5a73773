"""What keeps sites from being divided, and why, in the words of the report: the cause, not what it leads to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from partitioner.analysis.labels.label_state import Collapse, Labels, Site
from partitioner.program.node_arguments import describe, operation
from runtime.kv_cache.device_memory import readable
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention

__all__ = ["Offence", "earliest", "offences_of", "price_of_parts", "why_everywhere"]


@dataclass(frozen=True)
class Offence:
    """A weight to keep whole, and why. sites: the nodes that cannot be divided otherwise."""

    weight: str
    reason: str
    collapse: Collapse | None = None
    sites: tuple[fx.Node, ...] = ()


_GLANCE = 64
"""How many indices per rank are looked at first."""


def offences_of(labels: Labels, ranks: int) -> list[tuple[int, frozenset[str], Offence]]:
    """Sites with fewer atoms than ranks: the place of their first weight, all their weights, and what to report."""
    order = {name: i for i, name in enumerate(labels.starts)}
    found = []
    for site in labels.sites:
        few = site.ids.reshape(-1)[: _GLANCE * ranks]  # of a vocabulary, the first will do
        if len(set(few.tolist()) - {0}) >= ranks:
            continue
        ids = [i for i in torch.unique(site.ids).tolist() if i]
        if len(ids) < ranks:
            names = labels.weights_of(ids)
            first = min(names, key=lambda name: order.get(name, 0))
            found.append((order.get(first, 0), names, _offence(site, labels, first, names, ids, ranks)))
    return found


def earliest(offences: list[tuple[int, frozenset[str], Offence]]) -> list[Offence]:
    """The first in graph order of each group that shares weights."""
    groups: list[tuple[set[str], Offence]] = []
    for _, names, offence in sorted(offences, key=lambda o: o[0]):
        shared = [group for group in groups if group[0] & names]
        groups = [group for group in groups if group not in shared]
        first = shared[0][1] if shared else offence
        sites = tuple(site for _, other in shared for site in other.sites) + offence.sites
        groups.append((set(names).union(*(group[0] for group in shared)), replace(first, sites=sites)))
    return [offence for _, offence in groups]


def why_everywhere(labels: Labels, name: str) -> tuple[str, Collapse | None]:
    """Why every rank needs all of a weight although what is made of it is split."""
    for collapse in labels.collapses:
        if name in collapse.weights and collapse.can_be_partial:
            return collapse.why, collapse
    for site in labels.sites:
        if name in labels.weights_of(torch.unique(site.ids).tolist()):
            where = site.weight.name if site.weight else describe(site.node)
            return f"all of it is needed by every rank's part of {where}", None
    return "shared by the parts of every rank", None


def _offence(site: Site, labels: Labels, weight: str, names: frozenset[str], ids: list[int], ranks: int) -> Offence:
    """Why `site` cannot be divided: of the ops that need a whole row, the one that joined most of what meets there.

    What could be reduced in parts instead is of these the one that can be, whether or not it joined the most.
    """
    meeting = labels.joined(ids)
    causes = sorted(
        (collapse for collapse in labels.collapses if names & collapse.weights),
        key=lambda collapse: -len(collapse.labels & meeting),
    )
    groups = "1 group" if len(ids) == 1 else f"{len(ids)} groups"
    if causes:
        to_reduce = next((collapse for collapse in causes if collapse.can_be_partial), causes[0])
        why = causes[0].why
        if len(ids) > 1:
            if operation(causes[0].node) in (attention, cached_attention):
                groups = f"{len(ids)} heads"
            why = f"{groups} do not divide over {ranks} ranks: {why} of each; at most {len(ids)} ranks could share it"
        return Offence(weight, why, to_reduce, (site.node,))
    where = site.node.meta.get("path") or site.node.name
    why = f"only {groups} of indices can be told apart at {where}, for {ranks} ranks"
    return Offence(weight, why, None, (site.node,))


def price_of_parts(size: float, sums: tuple[float, float], ranks: int) -> str:
    """What a reduction in parts that was not done would have cost: bytes of weights that would be split by it, and
    all-reduces (of activations, of one number per token), in each layer.
    """
    if size <= 0:
        return " (reduced in parts it would split nothing more)"
    kinds = zip(sums, ("an activation", "one number per token"), strict=True)
    cost = " and ".join(f"{number:g} more of {kind}" for number, kind in kinds if number > 0) or "no more"
    saved = readable(round(size * (ranks - 1) / ranks))
    return f" (not reduced in parts: all-reduces in each layer, {cost}, for {saved} less on each rank)"
