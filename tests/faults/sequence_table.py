"""Ranks that share out the tokens of a sequence, one of which goes wrong: after how many seconds the others have ended.

    python -m tests.faults.sequence_table

Every case is one of `test_lost_rank.py`, and is checked as there: each of the others names the rank that is lost. The
limit is 1 s, of one that hangs the timeout and 1 s, and what ranks that do nothing took to begin and to end.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path

from tests.faults.test_lost_rank import HANGS, SEQUENCES, Ranks, check

PHASES = {"ring": "a prompt, before keys and values go on", "merge": "a new token, before its parts meet"}


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        ranks = Ranks(Path(__file__).parents[2], Path(scratch))
        print(
            "| fault | rank | in | shared memory | the others ended after | limit | idle ranks |\n" + "|---" * 7 + "|"
        )
        for case in SEQUENCES:
            limit_s = case.timeout_s + 1 if case.fault in HANGS else 1.0
            line = f"| {case.fault} | {case.victims[0]} | {PHASES[case.phase]} | {case.sharing} |"
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    outcome = check(ranks, case)
            except AssertionError as error:
                failed += 1
                said = [each for each in str(error).splitlines() if "RankLost: " in each or "did not answer" in each]
                print(f"{line} failed: {'; '.join(dict.fromkeys(said)) or error} |", flush=True)
                continue
            took_s = max(seconds for rank, seconds in enumerate(outcome.seconds) if rank not in case.victims)
            print(f"{line} {took_s:.2f} s | {limit_s:.0f} s | {outcome.idle_s:.2f} s |", flush=True)
        ranks.close()
    print(f"{len(SEQUENCES) - failed} of {len(SEQUENCES)} cases: all others named the rank that was lost")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
