"""Findings as a table and as JSON."""

from typing import Any

from rich.table import Table

from megatron_orz import terminal
from megatron_orz.benchmark.group import OURS, Finding, Findings, Group

VERDICTS = {True: "pass", False: "miss", None: "not measured"}


def table(group: Group, findings: Findings) -> Table:
    """A line for each implementation; the floor and the targets below."""
    of_floor = ["of floor"] if findings.floor_s is not None else []
    columns = ["min ms", "median ms", *of_floor, f"{OURS} is faster by", "extra MiB", "error"]
    title, caption = f"{group.task}, {group.shape}", _caption(group, findings)
    result = terminal.table(title, [""], columns, notes=True, caption=caption)
    ours = findings.rows[OURS].min_s
    for name, finding in findings.rows.items():
        cells = [_format(finding.min_s, 1e3, ".1f"), _format(finding.median_s, 1e3, ".1f")]
        if findings.floor_s is not None:
            cells.append(_format(finding.min_s and findings.floor_s / finding.min_s, 100, ".0f", "%"))
        cells.append(_format(finding.min_s / ours if finding.min_s and ours and name != OURS else None, 1, ".2f", "x"))
        cells.append(_format(finding.extra_bytes, 2**-20, ",.0f"))
        cells.append(", ".join(f"{what} {error:.0e}" for what, error in finding.errors.items()))
        result.add_row(name, *cells, finding.note, style="bold" if name == OURS else None)
    return result


def _caption(group: Group, findings: Findings) -> str:
    lines = []
    if findings.floor_s is not None:
        terms = " + ".join(f"{count} {name}" for name, count in group.floor_counts.items())
        lines.append(f"floor: {findings.floor_s * 1e3:.1f} ms = {terms}")
    for target in group.targets:
        value = target.value(findings)
        measured = "" if value is None else f": {value:.3g}"
        lines.append(f"target, {target.text}{measured}: {VERDICTS[target.is_met(findings)]}")
    return "\n".join(lines)


def _format(value: float | None, factor: float, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value * factor:{form}}{unit}"


def as_json(group: Group, findings: Findings) -> dict[str, Any]:
    return {
        "task": group.task,
        "shape": group.shape,
        "floor_s": findings.floor_s,
        "floor": dict(group.floor_counts),
        "rows": {name: _row_as_json(finding) for name, finding in findings.rows.items()},
        "targets": [
            {"text": target.text, "value": target.value(findings), "is_met": target.is_met(findings)}
            for target in group.targets
        ],
    }


def _row_as_json(finding: Finding) -> dict[str, Any]:
    return {
        "min_s": finding.min_s,
        "median_s": finding.median_s,
        "times_s": list(finding.times_s),
        "extra_bytes": finding.extra_bytes,
        "errors": dict(finding.errors),
        "note": finding.note,
    }
