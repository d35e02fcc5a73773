from partitioner.program import Program
def why_steps_differ(program: Program) -> str | None:
    return None
