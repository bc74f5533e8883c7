"""What a run would take, as a table for a terminal."""

from bae_lens.markdown import markdown_table
from bae_lens.planning import Plan


def plan_text(plan: Plan) -> str:
    """The plan as a Markdown table, with times where stages were timed, and whether it fits."""
    headings = ["stage", "work", "disk", "host memory", "GPU memory"]
    rows = [[stage.name, stage.work, *map(_size, (stage.disk, stage.host, stage.device))] for stage in plan.stages]
    rows.append(["in all", "disk added up, memory at its peak", *map(_size, (plan.disk, plan.host, plan.device))])
    if plan.seconds is not None:
        headings.append("time")
        for row, seconds in zip(rows, [*(stage.seconds for stage in plan.stages), plan.seconds], strict=True):
            row.append(_duration(seconds))
    verdict = [f"does not fit: {misfit}" for misfit in plan.misfits] or ["it fits"]
    return "\n".join([markdown_table(headings, rows, 2), "", *verdict])


def _size(n_bytes: int) -> str:
    """Or MB; nothing as a dash."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:.1f} GB"
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes else "-"


def _duration(seconds: float | None) -> str:
    """Hours, minutes or seconds to two digits; what was not timed as a dash."""
    if seconds is None:
        return "-"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"
