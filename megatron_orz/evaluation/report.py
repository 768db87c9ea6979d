"""Evaluations as tables for people: scores, the published ones beside them, wrong items, comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from megatron_orz.evaluation.compare import Comparison
from megatron_orz.evaluation.published import PUBLISHED, published_name
from megatron_orz.evaluation.records import ItemRecord
from megatron_orz.evaluation.scores import Estimate
from megatron_orz.evaluation.summary import Summary
from megatron_orz.printable import printable
from megatron_orz.terminal import table

_SHOWN_CHARS = 300


def score_table(summaries: Sequence[Summary]) -> Table:
    """A row for each score of each benchmark, in percent with its 95 % interval."""
    result = table("scores in percent", ["benchmark", "score"], ["value", "95 % interval", "items"])
    for summary in summaries:
        for row, (name, score) in enumerate(summary.scores.items()):
            first, items = (escape(summary.name), str(summary.num_items)) if row == 0 else ("", "")
            result.add_row(first, name, f"{100 * score.value:.1f}", _interval(score), items)
    return result


def response_table(summaries: Sequence[Summary]) -> Table:
    """What the responses to each benchmark were like: shares in percent, mean length, comparisons out of time."""
    columns = ("each item", "with an answer", "cut short", "timed out", "mean tokens")
    result = table("responses", ["benchmark"], columns)
    for summary in summaries:
        result.add_row(
            escape(summary.name),
            str(summary.num_responses),
            f"{100 * summary.format_share:.1f} %",
            f"{100 * summary.truncated_share:.1f} %",
            str(summary.timed_out),
            f"{summary.length_mean:.0f}",
        )
    return result


def published_table(summaries: Sequence[Summary]) -> Table | None:
    """Our mean scores beside those of the paper, for the benchmarks that it has; None without any."""
    known = [(summary, name) for summary in summaries if (name := published_name(summary.name)) is not None]
    if not known:
        return None
    title = "beside Open-Reasoner-Zero (mean of 16 samples, percent)"
    result = table(title, ["model"], [name for _, name in known])
    means = [next(iter(summary.scores.values())) for summary, _ in known]
    result.add_row("this model", *(f"{100 * mean.value:.1f} {_interval(mean)}" for mean in means), style="bold")
    for model, results in PUBLISHED.items():
        result.add_row(model, *(f"{results[name]:.1f}" for _, name in known))
    return result


def wrong_items(records: Sequence[ItemRecord], *, limit: int) -> Group:
    """The items that are solved least, with what was answered how often, and one wrong response each."""
    worst = sorted((record for record in records if record.score < 1.0), key=lambda record: record.score)[:limit]
    return Group(*(part for record in worst for part in _item(record)))


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """A row for each benchmark: both scores, their difference, and the items that flipped."""
    columns = ("items", "first", "second", "change", "flips", "p")
    result = table("second against first, in percent", ["benchmark"], columns)
    for comparison in comparisons:
        unmatched = f" ({comparison.num_unmatched} unmatched)" if comparison.num_unmatched else ""
        difference = comparison.difference
        result.add_row(
            escape(comparison.name),
            f"{comparison.num_items}{unmatched}",
            f"{100 * comparison.first:.1f}",
            f"{100 * comparison.second:.1f}",
            f"{100 * difference.value:+.1f} {_interval(difference, sign='+')}",
            f"+{len(comparison.gained)} -{len(comparison.lost)}",
            f"{comparison.p_value:.2g}",
        )
    return result


def flipped_items(comparison: Comparison, *, limit: int) -> Group:
    """The items that the second evaluation gained or lost, with what it answered."""
    parts = []
    for title, records in (("gained", comparison.gained), ("lost", comparison.lost)):
        if records:
            parts.append(Text(f"{comparison.name}: {len(records)} items {title}", style="bold"))
        parts += [part for record in records[:limit] for part in _item(record)]
    return Group(*parts)


def _item(record: ItemRecord) -> list[Text]:
    answers = [response.extracted or "no answer" for response in record.responses]
    counts = sorted({answer: answers.count(answer) for answer in answers}.items(), key=lambda pair: -pair[1])
    listed = ", ".join(f"{_short(answer, 40)} x{count}" for answer, count in counts)
    lines = [
        Text(f"\n{record.place}  {100 * record.score:.0f} % right", style="bold"),
        Text(_short(record.problem, _SHOWN_CHARS)),
        Text(f"reference {_short(record.answer, 80) or 'tests'}; answers: {listed}", style="dim"),
    ]
    wrong = next((response for response in record.responses if not response.reward), None)
    if wrong is not None:
        end = "..." if len(wrong.text) > _SHOWN_CHARS else ""
        lines.append(Text(f"{end}{printable(wrong.text[-_SHOWN_CHARS:])} [{wrong.finish_reason}]", style="dim"))
    return lines


def _short(text: str, limit: int) -> str:
    return printable(text if len(text) <= limit else text[: limit - 3] + "...")


def _interval(score: Estimate, sign: str = "") -> str:
    return f"[{100 * score.low:{sign}.1f}, {100 * score.high:{sign}.1f}]"
