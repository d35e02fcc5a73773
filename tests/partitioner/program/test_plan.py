"""Plans: degrees, their text and back, and what is refused."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner import Plan
from partitioner.compile.pass_manager.pass_order import check_plan
from partitioner.errors import PlanError

NAMES = st.from_regex(r"[a-z][a-z0-9]{0,6}(-[a-z0-9]{1,4})?", fullmatch=True).filter(
    lambda name: name not in ("dp", "pp", "sp", "tp", "ep", "etp")
)
TEXTS = st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="\"'"), max_size=8)
ATOMS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none(), TEXTS)
VALUES = st.one_of(ATOMS, st.lists(ATOMS, max_size=3).map(tuple))


@given(
    degrees=st.fixed_dictionaries({}, optional={axis: st.integers(1, 5) for axis in ("dp", "pp", "sp", "tp", "ep")}),
    keep=st.lists(st.from_regex(r"[a-z_.*]{1,9}", fullmatch=True), max_size=3),
    passes=st.dictionaries(NAMES, st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), VALUES, max_size=2)),
)
def test_what_a_plan_says_of_itself_is_that_plan(degrees, keep, passes) -> None:
    given_passes = tuple((name, options) if options else name for name, options in passes.items())
    try:
        plan = Plan(**degrees, keep_whole=tuple(keep), passes=given_passes)
    except PlanError:
        return  # degrees that do not fit
    assert Plan.parse(str(plan)) == plan, str(plan)


def test_text_as_a_user_writes_it() -> None:
    plan = Plan.parse(
        "tp=4, pp=2, keep_whole=[lm_head*,*.wte], probe, expert-parallel.exchange=gather, p.sizes=[1,0.5]"
    )
    assert (plan.tp, plan.pp, plan.mesh.world_size) == (4, 2, 8)
    assert plan.keep_whole == ("lm_head*", "*.wte")
    assert plan.passes == ("probe", ("expert-parallel", (("exchange", "gather"),)), ("p", (("sizes", (1, 0.5)),)))
    assert Plan.parse("keep_whole=wte").keep_whole == ("wte",)
    assert Plan.parse("") == Plan()
    assert str(Plan()) == "tp=1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tq=2", "'tq'; required: dp, pp, sp, tp, ep, etp, sp_attention or keep_whole"),
        ("tp=two", "required: a whole number"),
        ("tp=1.5", "required: a whole number"),
        ("tp=", "required: NAME=VALUE"),
        ("=2", "required: NAME=VALUE"),
        ("tp=2,tp=3", "gives tp twice"),
        ("probe.every=1,probe.every=2", "gives probe.every twice"),
        ("keep_whole=[a,b", "bracket is not closed"),
        pytest.param(f"keep_whole={'[' * 50_000}{']' * 50_000}", "brackets stand more than 8 deep", id="deep"),
        ("tp=0", "at least 1"),
        ("tp=2,ep=3,dp=1", "must divide"),
    ],
)
def test_text_that_says_no_plan(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.parse(text)


def test_experts_need_replicas_where_nothing_else_gives_ranks() -> None:
    assert Plan(ep=2).dp == 2
    assert Plan(ep=8, tp=4).dp == 2
    assert Plan(ep=4, tp=8).dp == 1
    assert Plan(ep=2, dp=4).mesh.size("edp") == 2
    assert str(Plan(ep=2)) == "ep=2"


def test_what_experts_do_not_need_of_dp_are_replicas() -> None:
    for plan, replicas, one in (
        (Plan(dp=4, tp=2, pp=2), 4, Plan(tp=2, pp=2)),
        (Plan(dp=2, tp=2, ep=2), 2, Plan(tp=2, ep=2)),
        (Plan(ep=2, dp=4), 2, Plan(ep=2)),
        (Plan(ep=2), 1, Plan(ep=2)),
        (Plan(dp=32, tp=8, ep=32, etp=8), 1, Plan(dp=32, tp=8, ep=32, etp=8)),
    ):
        assert plan.replicas == replicas
        assert plan.replica_mesh == one.mesh
        assert plan.mesh.world_size == replicas * plan.replica_mesh.world_size
        check_plan(plan)


def test_all_axes_go_together() -> None:
    check_plan(Plan(pp=2, sp=2, tp=2, ep=4, passes=["sequence-parallel"]))
    check_plan(Plan(tp=2, sp=2, dp=2))


@dataclass(frozen=True)
class Probe:
    name: ClassVar[str] = "probe"
    every: int = 1

    def run(self, program):
        return program


def test_a_pass_itself_is_written_with_its_fields() -> None:
    assert str(Plan(tp=2, passes=[Probe(every=3)])) == "tp=2,probe.every=3"
