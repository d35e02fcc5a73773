"""Plans over a slow link: the order that is predicted beside the measured one, on two hosts that this machine plays.

    python -m benchmarks.planning.shaped_links [--rates 4,16,64] [--rounds 3] [--models NAMES]        as root

Each host is a network namespace with one rank in it; a pair of virtual interfaces joins them, and `tc tbf` limits what
each sends to a rate in Mbit/s (ip and tc: iproute2). The namespaces are gone at the end. Shared memory is off, as it is
between hosts.

calibration    in turn with the cases of a model: products and attention on both ranks at the same time, and what a
               step takes beside its kernels (`measured_plans`); before, the link at every rate, by all-reduces of two
               sizes
measured       seconds to the first token of a batch of prompts, and to the last; the median of all rounds
predicted      `Pricer` over these tables, nothing fitted on the cases
printed        both, per model, rate and plan; how many pairs of plans are in the measured order, of those that differ
               by more than 5%; and how much slower the first choice is than the best plan
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from torch.distributed import TCPStore

from benchmarks.planning.measured_plans import Beside, Case, Meeting, model_of
from partitioner.planning.machine.calibrate import Calibration, link_of
from partitioner.planning.machine.host import Host, pricer_here, times_of
from partitioner.planning.quantities import Workload
from partitioner.planning.summary import Summary
from partitioner.program.plan import Plan
from partitioner.sharding.mesh import Mesh
from runtime.communication.process_groups import ProcessGroups
from runtime.processes.launch import begin_worker

MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "llama": ("llama", {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
                        "num_key_value_heads": 8, "head_dim": 32, "intermediate_size": 768}),
    "qwen3, grouped": ("qwen3", {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
                                 "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 512}),
}  # fmt: skip
"""Small ones: what they compute takes less than what a slow link does, also where others use this machine."""
PLANS = ("tp=2", "pp=2", "dp=2", "sp=2")
HOSTS = 2
BURST = "8kb"
"""What goes at full speed: no more than a few packets."""
Times = dict[str, tuple[float, float]]
"""By plan: seconds to the first token, and to the last."""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextlib.contextmanager
def hosts() -> Iterator[tuple[str, ...]]:
    """Two joined network namespaces by name, each with an interface of the same name and an address."""
    names = tuple(f"host{number}of{os.getpid()}" for number in range(HOSTS))
    made: list[str] = []
    try:
        for name in names:
            run("ip", "netns", "add", name)
            made.append(name)
        first, second = (f"{name[:4]}{number}{os.getpid() % 10**6}" for number, name in enumerate(names))
        run("ip", "link", "add", first, "netns", names[0], "type", "veth", "peer", "name", second, "netns", names[1])
        for number, (name, link) in enumerate(zip(names, (first, second), strict=True)):
            run("ip", "-n", name, "link", "set", link, "name", "link0")
            run("ip", "-n", name, "addr", "add", f"{address(number)}/24", "dev", "link0")
            for each in ("link0", "lo"):
                run("ip", "-n", name, "link", "set", each, "up")
        yield names
    finally:
        for name in made:
            subprocess.run(("ip", "netns", "del", name), check=False)


def address(host: int) -> str:
    return f"10.209.77.{host + 1}"


def shape(rate: float) -> None:
    """Limits what this host sends, in Mbit/s."""
    run(
        "tc",
        "qdisc",
        "replace",
        "dev",
        "link0",
        "root",
        "tbf",
        "rate",
        f"{rate:g}mbit",
        "burst",
        BURST,
        "latency",
        "2s",
    )


def predicted(summary: Summary, plan: Plan, workload: Workload, tables: Any, host: Host) -> tuple[float, float]:
    first, between = times_of(pricer_here(summary, *tables), plan, workload, host)
    return first, first + (workload.new - 1) * between


def worker(workload: Workload, rates: list[float], rounds: int, names: list[str], plans: list[str], out: str) -> None:
    begin_worker()
    rank = int(os.environ["RANK"])
    meeting = Meeting(
        TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=rank == 0, wait_for_workers=False)
    )

    def at(rate: float) -> None:
        meeting.most(0)
        shape(rate)
        meeting.most(0)

    communicator = ProcessGroups.connect(
        Mesh.of(tp=HOSTS), axes={("tp",)}, device="cpu", timeout_s=300, shared_memory="off"
    )
    channel = communicator.channel("tp", node="calibration")
    links = {}
    for rate in rates:
        at(rate)
        links[rate] = link_of(channel, meeting.most)
        if rank == 0:
            link = links[rate]
            print(f"{rate:g} Mbit/s: {link.latency_s * 1e6:.0f} us and {link.bytes_per_s / 1e6:.2f} MB/s", flush=True)
    communicator.close()
    beside = Beside(workload, meeting, "wall", sharing="off")
    found: dict[str, dict[str, dict[str, Times]]] = {}
    for name in names:
        model = model_of(*MODELS[name])
        mine = found[name] = {f"{rate:g}": {"predicted": {}, "measured": {}} for rate in rates}
        calibration, summaries = Calibration(meeting.most, of_windows=statistics.median), {}
        beside.forget()
        for plan in plans:
            calibration.measure(1)
            beside.measure()
            case = Case(model, plan, workload, meeting, "wall", sharing="off")
            summaries[plan] = case.summary
            with case.connected():
                for rate in rates:
                    at(rate)
                    case.write_s(2)  # warms up
                    first, last = (
                        statistics.median(case.write_s(count) for _ in range(rounds)) for count in (1, workload.new)
                    )
                    mine[f"{rate:g}"]["measured"][plan] = first, last
                    if rank == 0:
                        print(f"{name}, {plan}, {rate:g} Mbit/s: {first:.3f} s and {last:.3f} s", flush=True)
        kernels, kind = calibration.tables()
        for plan, rate in itertools.product(plans, rates):
            tables = kernels, links[rate], kind
            guess = predicted(summaries[plan], Plan.parse(plan), workload, tables, beside.host())
            mine[f"{rate:g}"]["predicted"][plan] = guess
    if rank == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")


def compared(predictions: Times, measurements: Times, what: int) -> tuple[int, int, float]:
    """what: 0 the first token, 1 the last. Pairs in the measured order, of how many that differ by more than 5%; and
    how much slower the first choice is than the best plan.
    """
    right = pairs = 0
    for one, other in itertools.combinations(measurements, 2):
        a, b = measurements[one][what], measurements[other][what]
        if max(a, b) / min(a, b) > 1.05:
            pairs += 1
            right += (a < b) == (predictions[one][what] < predictions[other][what])
    choice = min(predictions, key=lambda plan: predictions[plan][what])
    return right, pairs, measurements[choice][what] / min(each[what] for each in measurements.values()) - 1


def measured_over(
    rates: list[float], models: list[str], plans: list[str], *, workload: Workload, rounds: int, out: Path
) -> dict[str, dict[str, dict[str, Times]]]:
    """By model, rate, and "predicted" or "measured". Needs root."""
    given = json.dumps({"rates": rates, "models": models, "plans": plans, "rounds": rounds, "out": str(out),
                        "workload": [workload.prompt, workload.new, workload.batch]})  # fmt: skip
    root = str(Path(__file__).parents[2])
    with hosts() as names:
        ranks = []
        for rank, name in enumerate(names):
            environment = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(HOSTS), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": address(0), "MASTER_PORT": "29571", "TORCHELASTIC_USE_AGENT_STORE": "True",
                "GLOO_SOCKET_IFNAME": "link0", "SHAPED": given,
                "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
            }  # fmt: skip
            command = ("ip", "netns", "exec", name, sys.executable, "-m", "benchmarks.planning.shaped_links")
            ranks.append(subprocess.Popen(command, env=environment))
        try:
            codes = [rank.wait(timeout=3000) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}")
    found: dict[str, dict[str, dict[str, Times]]] = json.loads(out.read_text(encoding="utf-8"))
    return found


def main() -> None:
    if "SHAPED" in os.environ:
        told = json.loads(os.environ["SHAPED"])
        worker(Workload(*told["workload"]), told["rates"], told["rounds"], told["models"], told["plans"], told["out"])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="4,16,64", help="Mbit/s, with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--models", default=json.dumps(list(MODELS)), help="a JSON list")
    parser.add_argument("--plans", default=";".join(PLANS), help="with semicolons")
    parser.add_argument("--out", type=Path, default=Path("/tmp/shaped_links.json"), help="where times are kept")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the hosts are taken down then, too
    found = measured_over(
        [float(each) for each in given.rates.split(",")], json.loads(given.models), given.plans.split(";"),
        workload=Workload(given.prompt, given.new, given.batch), rounds=given.rounds, out=given.out,
    )  # fmt: skip
    print(f"load {os.getloadavg()[0]:.1f}")
    print(f"{'model':14} {'Mbit/s':>6} {'plan':6} {'first token: predicted, measured':>38} {'last token':>32}")
    totals = {0: [0, 0], 1: [0, 0]}
    regrets: dict[int, list[float]] = {0: [], 1: []}
    for by_rate, what in itertools.product(found.values(), (0, 1)):
        for times in by_rate.values():
            right, pairs, regret = compared(times["predicted"], times["measured"], what)
            totals[what][0] += right
            totals[what][1] += pairs
            regrets[what].append(regret)
    for model, by_rate in found.items():
        for rate, times in by_rate.items():
            for plan in times["measured"]:
                said = [
                    f"{times['predicted'][plan][what] * 1e3:9.1f} {times['measured'][plan][what] * 1e3:9.1f} ms "
                    f"{times['predicted'][plan][what] / times['measured'][plan][what] - 1:+6.0%}"
                    for what in (0, 1)
                ]
                print(f"{model:14} {rate:>6} {plan:6} {said[0]:>38} {said[1]:>32}")
    for what, name in ((0, "first token"), (1, "last token")):
        right, pairs = totals[what]
        slower = ", ".join(f"{each:.0%}" for each in regrets[what])
        print(f"{name}: {right} of {pairs} pairs in the measured order; first choices slower than the best by {slower}")


if __name__ == "__main__":
    main()
