"""Plans over a slow link between two hosts that this machine plays: the order that is predicted is the measured one."""

import os
import shutil
from pathlib import Path

import pytest

from benchmarks.planning.shaped_links import compared, hosts, measured_over, run
from partitioner.planning.quantities import Workload

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))), reason="network namespaces need root, ip and tc"
)


def test_pairs_in_order_and_the_price_of_a_choice() -> None:
    measured = {"tp=2": (4.0, 1.0), "pp=2": (2.0, 1.01), "dp=2": (1.0, 1.0)}
    assert compared(measured, measured, 0) == (3, 3, 0.0)
    turned = {"tp=2": (1.0, 1.0), "pp=2": (2.0, 1.0), "dp=2": (4.0, 1.0)}
    assert compared(turned, measured, 0) == (0, 3, 3.0)
    assert compared(measured, measured, 1)[1] == 0  # none differ by more than 5%


@pytest.mark.slow
@needs_root
def test_the_predicted_order_is_the_measured_one(tmp_path: Path) -> None:
    plans = ["tp=2", "pp=2", "dp=2"]
    found = measured_over(
        [4.0], ["llama"], plans, workload=Workload(64, 4, 2), rounds=2, out=tmp_path / "times.json"
    )  # fmt: skip
    times = found["llama"]["4"]
    right, pairs, regret = compared(times["predicted"], times["measured"], 0)
    assert (right, pairs) == (3, 3), times
    assert regret == 0
    # all-reduces of a prompt over such a link take more than all else
    assert times["measured"]["tp=2"][0] > 2 * times["measured"]["dp=2"][0]
    assert times["predicted"]["tp=2"][0] == pytest.approx(times["measured"]["tp=2"][0], rel=0.4)


@pytest.mark.slow
@needs_root
def test_nothing_is_left_of_the_hosts() -> None:
    kept: list[str] = []

    def fail() -> None:
        with hosts() as names:
            kept.extend(names)
            run("ip", "netns", "exec", names[0], "true")
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert len(kept) == 2
    assert not any(Path("/run/netns", name).exists() for name in kept)
