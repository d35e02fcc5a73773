"""A broken pass is named: which, by what entry point, of which distribution. And options go where they belong."""

import os
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from partitioner import Plan, PlanError, partition
from partitioner.compile.partition import compile_program
from partitioner.compile.pass_manager.choose_passes import choose
from tests.support import partitioned
from tests.support.plugins import fake

GOOD = """
    from dataclasses import dataclass
    from typing import ClassVar

    @dataclass(frozen=True)
    class Probe:
        name: ClassVar[str] = "probe"
        every: int = 1
        where: tuple[str, ...] = ()

        def run(self, program):
            program.notes.append(f"probed every {self.every} in {self.where}")
            return program
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def compiled(*passes: object, tp: int = 1):
    return compile_program(partitioned.traced("llama")[1], Plan(tp=tp, passes=passes))


def broken(site: Path, monkeypatch: pytest.MonkeyPatch, body: str, *, what: str = "Probe", name: str = "probe") -> str:
    """The error of a plan whose pass is this module."""
    module = f"broken_{site.name}"
    fake(site, "my-probes", module, body, {name: what})
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(PlanError) as caught:
        compiled(name)
    said = str(caught.value)
    assert f"'{name}' ({module}{f':{what}' if what else ''}, of my-probes 1.2)" in said
    return said


def test_options_reach_the_pass(site: Path) -> None:
    fake(site, "my-probes", "probes_options", GOOD, {"probe": "Probe"})
    assert compiled("probe").program.notes[-1] == "probed every 1 in ()"
    parts = compiled(("probe", {"every": 3, "where": ["a", "b"]}))
    assert parts.program.notes[-1] == "probed every 3 in ('a', 'b')"
    assert "Plan(tp=1, passes=[probe(every=3, where=('a', 'b'))])" in str(parts.report)
    with pytest.raises(PlanError, match=r"of my-probes 1.2\) has no option 'evry'; did you mean 'every'\?"):
        compiled(("probe", {"evry": 3}))
    with pytest.raises(PlanError, match=r"has no option 'zzz'; its options: every, where"):
        compiled(("probe", {"zzz": 3}))


def test_a_pass_itself(site: Path) -> None:
    fake(site, "my-probes", "probes_itself", GOOD, {})
    from probes_itself import Probe

    parts = compiled(Probe(every=5))
    assert parts.program.notes[-1] == "probed every 5 in ()"
    assert "Probe(every=5" in repr(Plan(passes=[Probe(every=5)]))
    assert hash(Plan(passes=[Probe(every=5)])) == hash(Plan(passes=(Probe(every=5),)))


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("probe", r"passes must be a list or tuple of passes, such as \['probe'\]; got 'probe'"),
        ([3], r"each of passes must be a name, a pair .*; got 3"),
        ([("probe",)], "a pair"),
        ([("probe", 3)], "a pair"),
        ([("probe", {3: 3})], "a pair"),
        ([("probe", {"every": {}})], "a plan holds what can be hashed"),
        ([type("Probe", (), {"name": "probe", "run": lambda self, program: program})], "not its class"),
    ],
    ids=str,
)
def test_what_is_no_pass_is_refused(passes: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan(passes=passes)


def test_a_plan_is_hashable_and_says_what_it_holds() -> None:
    plan = Plan(tp=2, passes=[("probe", {"where": ["a", ["b"]]})])
    assert plan == Plan(tp=2, passes=(("probe", (("where", ("a", ("b",))),)),))
    assert hash(plan)
    assert repr(plan) == "Plan(tp=2, passes=[probe(where=('a', ('b',)))])"
    assert repr(Plan()) == "Plan(tp=1)"


def test_import_error(site, monkeypatch) -> None:
    assert "cannot be loaded: ModuleNotFoundError: No module named 'nowhere'" in broken(
        site, monkeypatch, "import nowhere"
    )


def test_no_such_class(site, monkeypatch) -> None:
    assert "cannot be loaded: AttributeError" in broken(site, monkeypatch, "x = 1")


def test_an_entry_point_that_is_a_module(site, monkeypatch) -> None:
    assert "must be a class, a frozen dataclass" in broken(site, monkeypatch, "x = 1", what="")


def test_no_run(site, monkeypatch) -> None:
    assert "has no method `run(program)`" in broken(site, monkeypatch, "class Probe:\n    name = 'probe'")


def test_no_name(site, monkeypatch) -> None:
    body = "class Probe:\n    def run(self, program):\n        return program"
    assert "has no name: give the class" in broken(site, monkeypatch, body)


def test_another_name(site, monkeypatch) -> None:
    body = "class Probe:\n    name = 'prob'\n    def run(self, program):\n        return program"
    assert "calls itself 'prob'" in broken(site, monkeypatch, body)


def test_an_option_without_default(site, monkeypatch) -> None:
    body = GOOD.replace("every: int = 1", "every: int").replace("    where: tuple[str, ...] = ()", "")
    assert "does not take no options: it needs some: " in broken(site, monkeypatch, body)


RUNS = """
    import torch
    from torch import fx

    class Probe:
        name = "probe"

        def run(self, program):
            node = next(n for n in program.graph.nodes if n.op == "call_function")
            {}
"""


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("raise KeyError('x')", "raised KeyError: 'x'"),
        ("pass", "`run` must return the Program, got None: `run` ends without a return"),
        ("return program.graph", "`run` must return the Program, got a Graph"),
        ("node.meta.pop('val'); return program", "has no value: set node.meta"),
        ("node.meta['val'] = 3.5; return program", "has no value: set node.meta"),
        ("program.weights.clear(); return program", "which program.weights does not describe"),
        ("program.inputs = (); return program", "and program.inputs describes [], in this order"),
        ("node.op, node.target = 'call_method', 'relu'; return program", "is a call_method: calls are call_function"),
        ("node.append(node.all_input_nodes[0]); return program", "torch.fx finds the graph broken"),
        (
            "from partitioner.program import program as p; node.kwargs = {'at': p.PerRankInt('lost')}; return program",
            "names the integer 'lost', of which program.table has no row",
        ),
    ],
)
def test_run_goes_wrong(site, monkeypatch, statement: str, message: str) -> None:
    assert message in broken(site, monkeypatch, RUNS.format(statement))


def test_the_layout_is_broken(site: Path) -> None:
    """Takes out an all-reduce: without the check the ranks would return parts of sums."""
    body = """
        from runtime.ops.collectives import all_reduce

        class Probe:
            name = "probe"

            def run(self, program):
                node = next(n for n in program.graph.nodes if n.target is all_reduce)
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)
                return program
    """
    fake(site, "my-probes", "probes_layout", body, {"probe": "Probe"})
    with pytest.raises(
        PlanError, match=r"'probe' \(probes_layout:Probe, of my-probes 1.2\) leaves a program that does"
    ):
        compiled("probe", tp=2)


def test_an_op_without_a_rule_needs_everything_and_the_error_says_so(site: Path) -> None:
    body = """
        import torch
        from torch import fx

        def halved(x):
            return x / 2

        class Probe:
            name = "probe"

            def run(self, program):
                node = next(n for n in program.graph.nodes if n.op == "call_function" and "silu" in str(n.target))
                with program.graph.inserting_after(node):
                    new = program.graph.call_function(halved, (node,))
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
                return program
    """
    fake(site, "my-probes", "probes_opaque", body, {"probe": "Probe"})
    assert compiled("probe").program
    with pytest.raises(
        PlanError,
        match=r"halved in model\.layers\.0\.mlp\.act_fn has no layout rule, and so needs all of every operand",
    ):
        compiled("probe", tp=2)


def test_two_packages_with_one_name(site: Path) -> None:
    fake(site, "my-probes", "probes_one", GOOD, {"probe": "Probe"})
    fake(site, "other-probes", "probes_two", GOOD, {"probe": "Probe"})
    with pytest.raises(PlanError) as caught:
        compiled("probe")
    for whose in ("probes_one:Probe, of my-probes 1.2", "probes_two:Probe, of other-probes 1.2"):
        assert whose in str(caught.value)


def test_a_name_of_a_built_in_pass_cannot_be_taken(site: Path) -> None:
    fake(site, "my-probes", "probes_shadow", GOOD.replace('"probe"', '"fuse"'), {"fuse": "Probe"})
    with pytest.raises(PlanError, match=r"(?s)several passes are named 'fuse':.*probes_shadow:Probe, of my-probes 1.2.*"
                                        "name of a built-in pass"):  # fmt: skip
        compiled()


def test_an_unknown_name_names_the_nearest(site: Path) -> None:
    fake(site, "my-probes", "probes_near", GOOD, {"probe": "Probe"})
    with pytest.raises(PlanError, match="no pass named 'prob' is installed; did you mean 'probe'"):
        choose("prob")


def test_what_is_installed_or_removed_later_is_seen(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is declared is remembered only as long as nothing is installed."""
    os.utime(site, ns=(0, 0))
    with pytest.raises(PlanError, match="no pass named 'probe'"):
        choose("probe")
    fake(site, "my-probes", "probes_later", GOOD, {"probe": "Probe"})
    assert choose("probe").step.name == "probe"
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(site)])
    with pytest.raises(PlanError, match="no pass named 'probe'"):
        choose("probe")


def test_passes_are_looked_up_before_the_model_is_traced() -> None:
    model = LlamaForCausalLM.__new__(LlamaForCausalLM)  # not even built: whoever traced it would fail otherwise
    with pytest.raises(PlanError, match="no pass named 'nowhere'"):
        partition(model, Plan(passes=["nowhere"]))
