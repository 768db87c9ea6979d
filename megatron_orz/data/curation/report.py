"""A page about a curation, in one file that needs nothing else: counts, charts, and rows that went and stayed."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from megatron_orz.data.curation.outputs import summarise
from megatron_orz.data.curation.pipeline import Curation, Decision
from megatron_orz.whole_file import whole_file

_NUM_SAMPLES = 5
_SHOWN_CHARS = 600


def write_report(path: Path, curation: Curation, *, notes: Sequence[str]) -> None:
    """notes: what a reader must know besides, such as a stage that was left out."""
    page = _ENVIRONMENT.from_string(_PAGE).render(
        summary=summarise(curation), charts=_charts(curation), samples=_samples(curation), notes=notes
    )
    with whole_file(path) as file:
        file.write(page.encode())


Chart = list[tuple[str, int]]
"""Labels and counts, from the top."""


def _charts(curation: Curation) -> dict[str, Chart]:
    kept = [decision.candidate for decision in curation.kept]
    charts: dict[str, Chart] = {
        "Rows left after each stage": [(stage.name, stage.num_kept) for stage in curation.stages],
        "Length of the kept problems, characters": _by_power([len(candidate.text) for candidate in kept]),
        "Length of their answers, characters": _by_power([len(candidate.answer) for candidate in kept]),
    }
    right = Counter(decision.num_right for decision in curation.decisions if decision.num_right is not None)
    if right:
        charts["Right responses to a problem, of all that were sampled"] = [
            (label, sum(right[count] for count in range(low, high)))
            for low, high, label in _ranges([0, 1, *(2**power for power in range(1, max(right).bit_length() + 1))])
        ]
    return charts


def _by_power(lengths: Sequence[int]) -> Chart:
    """How many lengths lie between one power of two and the next."""
    if not lengths:
        return []
    powers = range(int(math.log2(max(1, min(lengths)))), int(math.log2(max(lengths))) + 2)
    ranges = _ranges([2**power for power in powers])
    return [(label, sum(low <= length < high for length in lengths)) for low, high, label in ranges]


def _ranges(bounds: Sequence[int]) -> list[tuple[int, int, str]]:
    """(low, high, label) of the half-open ranges between the bounds."""
    return [(low, high, f"{low} to {high - 1}" if high > low + 1 else f"{low}") for low, high in pairwise(bounds)]


def _samples(curation: Curation) -> dict[str, tuple[int, list[dict[str, Any]]]]:
    """Outcome -> (how many rows, a few of them from all over the data)."""
    groups: defaultdict[str, list[Decision]] = defaultdict(list)
    for decision in curation.decisions:
        groups[decision.reason or "kept"].append(decision)
    return {
        outcome: (len(group), [_shown(group[len(group) * n // _NUM_SAMPLES]) for n in range(_NUM_SAMPLES)])
        if len(group) > _NUM_SAMPLES
        else (len(group), [_shown(decision) for decision in group])
        for outcome, group in sorted(groups.items(), key=lambda item: (item[0] != "kept", -len(item[1]), item[0]))
    }


def _shown(decision: Decision) -> dict[str, Any]:
    candidate = decision.candidate
    text = candidate.text
    return {
        "place": candidate.place,
        "row": candidate.row,
        "text": text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]} … ({len(text):,} characters)",
        "answer": candidate.answer[:_SHOWN_CHARS],
        "found": [(stage, verdict.detail[:_SHOWN_CHARS]) for stage, verdict in decision.trail if verdict.detail],
    }


# Problems are other people's text: everything is escaped on its way into the page.
_ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters["thousands"] = lambda number: f"{number:,}"

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Curation: {{ summary.kept | thousands }} of {{ summary.rows | thousands }} rows</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { fill: #4477aa; } text { font-size: 13px; fill: #222; }
details { margin: .5em 0; } summary { cursor: pointer; font-weight: 600; }
article { border-left: 3px solid #ccd; margin: .8em 0; padding-left: .8em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2em 0; font-size: 13px; }
.found { color: #666; font-size: 13px; }
</style>
<h1>{{ summary.kept | thousands }} of {{ summary.rows | thousands }} rows stay</h1>
{% for note in notes %}<p><strong>{{ note }}</strong></p>
{% endfor %}
<h2>Stages</h2>
<table>
<tr><th>stage<th class="number">rows<th class="number">dropped<th class="number">left<th>why
{% for name, stage in summary.stages.items() %}
<tr><td>{{ name }}<td class="number">{{ stage.rows | thousands }}
<td class="number">{{ (stage.rows - stage.kept) | thousands }}<td class="number">{{ stage.kept | thousands }}
<td>{% for reason, count in stage.dropped.items() %}{{ reason }} {{ count | thousands }}{{ ", " if not loop.last }}
{% endfor %}
{% endfor %}
</table>
<h2>Files</h2>
<table>
<tr><th>file<th class="number">rows<th class="number">left<th>why not
{% for name, file in summary.files.items() %}
<tr><td>{{ name }}<td class="number">{{ file.rows | thousands }}<td class="number">{{ file.kept | thousands }}
<td>{% for reason, count in file.dropped | dictsort %}{{ reason }} {{ count | thousands }}{{ ", " if not loop.last }}
{% endfor %}
{% endfor %}
</table>
{% for title, chart in charts.items() if chart %}
<h2>{{ title }}</h2>
<svg width="760" height="{{ 22 * chart | length }}" role="img" aria-label="{{ title }}">
{% set most = [chart | map(attribute=1) | max, 1] | max %}
{% for label, count in chart %}
<text x="150" y="{{ 22 * loop.index0 + 15 }}" text-anchor="end">{{ label }}</text>
<rect class="bar" x="160" y="{{ 22 * loop.index0 + 3 }}" height="16" width="{{ (500 * count / most) | round(1) }}"/>
<text x="{{ (500 * count / most) | round(1) + 166 }}" y="{{ 22 * loop.index0 + 15 }}">{{ count | thousands }}</text>
{% endfor %}
</svg>
{% endfor %}
<h2>Samples</h2>
{% for outcome, (count, samples) in samples.items() %}
<details{{ " open" if loop.first }}><summary>{{ outcome }}: {{ count | thousands }}</summary>
{% for sample in samples %}
<article>
<div class="found">row {{ sample.row }}, {{ sample.place }}</div>
{% if sample.text %}<pre>{{ sample.text }}</pre><pre>answer: {{ sample.answer }}</pre>{% endif %}
{% for stage, detail in sample.found %}<div class="found">{{ stage }}: {{ detail }}</div>
{% endfor %}
</article>
{% endfor %}
</details>
{% endfor %}
</html>
"""
