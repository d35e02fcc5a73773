"""The table of faults: what the others do when a pipeline stage is lost, in seconds, as this machine has them.

    python -m tests.faults.table [--faults kill stop raise oom] [--phases joining loading prefill decode head] [--cut]

    fault    kill: SIGKILL     stop: SIGSTOP     raise: an exception     oom: the allocator fails
    phase    joining and loading: start      prefill, decode: before a run      head: before what all stages share out
    --cut    the link between two hosts, which are network namespaces, in the middle of a generation

One rank of three stages goes wrong; a row has how long the others took to end, the most that they may take, with what
status they end, and what the first of them says. A row that is late or says something else counts as failed, and the
command ends with status 1. A late one is tried again, as in `test_lost_rank.py`, whose cases these are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults import test_lost_rank, test_two_hosts
from tests.faults.faulty_rank import Case, Outcome
from tests.security.jobs.doors import Network

ROOT = Path(__file__).resolve().parents[2]
FAULTS, PHASES = ("kill", "stop", "raise", "oom"), ("joining", "loading", "prefill", "decode", "head")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.table")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--cut", action="store_true")
    asked = parser.parse_args()
    print("| fault | when | stage | others ended within | allowed | exit status | what they say |")
    print("|---|---|---|---|---|---|---|", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        ranks = test_lost_rank.Ranks(ROOT, Path(scratch))
        for fault in asked.faults:
            for phase in asked.phases:
                for stage in test_lost_rank.VICTIMS:
                    failed += not _row(ranks, test_lost_rank.of_stages(fault, phase, stage))
        ranks.close()
    if asked.cut:
        failed += not _cut_link()
    print(f"{failed} failed", flush=True)
    sys.exit(1 if failed else 0)


def _row(ranks: test_lost_rank.Ranks, case: Case) -> bool:
    others = [rank for rank in range(case.num_ranks) if rank not in case.victims]
    allowed = case.timeout_s + 1 if case.fault in test_lost_rank.HANGS else 1.0
    try:
        outcome = test_lost_rank.check(ranks, case, told=False)
    except AssertionError as error:
        lines = [line for line in str(error).splitlines() if "RankLost: " in line] or str(error).splitlines()[-1:]
        said = lines[-1].strip() if lines else "another exit status"
        print(f"| {case.fault} | {case.phase} | {case.victims[0]} | | {allowed:.0f} s | | FAILED: {said} |", flush=True)
        return False
    took = max(outcome.seconds[rank] for rank in others)
    codes = ", ".join(str(outcome.codes[rank]) for rank in others)
    print(
        f"| {case.fault} | {case.phase} | {case.victims[0]} | {took:.2f} s (idle {outcome.idle_s:.2f} s) | "
        f"{allowed:.0f} s | {codes} | {_said(outcome, others[0])} |",
        flush=True,
    )
    return True


def _said(outcome: Outcome, rank: int) -> str:
    text = outcome.texts[rank]
    return text[text.rindex("RankLost: ") :].partition("\n")[0].strip()


def _cut_link() -> bool:
    if test_two_hosts.WHY_NOT:
        print(f"| cut link | | | | | | not run: {test_two_hosts.WHY_NOT} |", flush=True)
        return False
    with Network(2) as network, tempfile.TemporaryDirectory() as scratch:
        ranks = test_two_hosts.Ranks(network, ROOT, Path(scratch))
        found = test_two_hosts.cut_in_the_middle(ranks)
        ranks.close()
    for rank, (seconds, code, said) in enumerate(found):
        print(
            f"| cut link | decode | {rank // test_two_hosts.HERE} | rank {rank}: {seconds:.2f} s | "
            f"{test_two_hosts.TIMEOUT_S + 1:.0f} s | {code} | {said} |",
            flush=True,
        )
    most = test_two_hosts.TIMEOUT_S + 1 + test_two_hosts.BUSY_S
    return all(seconds < most and code == 1 and "RankLost" in said for seconds, code, said in found)


if __name__ == "__main__":
    main()
