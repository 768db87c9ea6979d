"""The analysis as one HTML page without anything from outside: tokens coloured by value or by advantage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from string import Template

import numpy as np
from numpy.typing import NDArray

from megatron_orz.critic_analysis.contrast import CONFIDENCE, Contrast, Estimate
from megatron_orz.critic_analysis.values import ValuedResponse
from megatron_orz.printable import printable

NUM_COLORS = 21
OUTSIDE = 0.02
"""Share of tokens beyond either end of the colour scale."""
CURVE_WIDTH, CURVE_HEIGHT = 900, 70
MAX_CURVE_POINTS = 1200


@dataclass(frozen=True)
class Scale:
    """Numbers to colours 0 .. NUM_COLORS - 1; what lies beyond an end has the end's."""

    low: float
    high: float

    def colors(self, values: NDArray[np.float32]) -> NDArray[np.int64]:
        """[n] to [n]."""
        width = max(self.high - self.low, 1e-12)
        return np.clip((values - self.low) / width * NUM_COLORS, 0, NUM_COLORS - 1).astype(np.int64)


def render_page(
    shown: Sequence[ValuedResponse],
    contrasts: Sequence[Contrast],
    *,
    decode: Callable[[Sequence[int]], str],
    facts: dict[str, str],
    max_tokens: int,
) -> str:
    """The page.

    shown: responses whose tokens it holds, at most `max_tokens` of each. facts: what was analysed, as name and value.
    """
    values = np.concatenate([response.values for response in shown])
    advantages = np.concatenate([response.advantages for response in shown])
    value_scale = Scale(*np.quantile(values, [OUTSIDE, 1 - OUTSIDE]).tolist())
    largest = float(np.quantile(np.abs(advantages), 1 - OUTSIDE))
    advantage_scale = Scale(-largest, largest)
    return PAGE.substitute(
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()),
        confidence=f"{CONFIDENCE:.0%}",
        contrasts="".join(map(_contrast_row, contrasts)),
        colors="".join(
            f".value .v{i},.advantage .a{i},.k{i}{{background:{color}}}" for i, color in enumerate(_palette())
        ),
        key="".join(f'<i class="k{i}"></i>' for i in range(NUM_COLORS)),
        value_low=f"{value_scale.low:.3g}",
        value_high=f"{value_scale.high:.3g}",
        advantage_low=f"{advantage_scale.low:.3g}",
        advantage_high=f"{advantage_scale.high:.3g}",
        responses="".join(
            _response(response, decode, value_scale, advantage_scale, max_tokens=max_tokens) for response in shown
        ),
    )


def token_texts(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds; one that leaves a character unfinished adds none, and the next one its whole.

    Tokens are decoded behind the one before: tokenizers drop a space at the beginning of a text.
    """
    texts: list[str] = []
    start, end = 0, 0  # the tokens of the last text
    for now in range(1, len(token_ids) + 1):
        before, after = decode(token_ids[start:end]), decode(token_ids[start:now])
        is_unfinished = after.endswith("\ufffd") and now - end < 4 and now < len(token_ids)
        texts.append("" if is_unfinished else after[len(before) :])
        if not is_unfinished:
            start, end = end, now
    return texts


def _response(
    response: ValuedResponse,
    decode: Callable[[Sequence[int]], str],
    value_scale: Scale,
    advantage_scale: Scale,
    *,
    max_tokens: int,
) -> str:
    generation = response.generation
    texts = token_texts(generation.response_ids[:max_tokens], decode)
    v_colors, a_colors = value_scale.colors(response.values), advantage_scale.colors(response.advantages)
    tokens = "".join(
        f'<b class="v{v_colors[t]} a{a_colors[t]}{" r" if response.is_repeated[t] else ""}" '
        f'title="token {t}: V {response.values[t]:.3f}, A {response.advantages[t]:+.3f}">'
        f"{escape(printable(text)).replace(chr(10), '&#9166;' + chr(10))}</b>"
        for t, text in enumerate(texts)
    )
    num_left = len(generation.response_ids) - len(texts)
    summary = (
        f"step {generation.step} · prompt {generation.prompt_id} · reward {generation.reward:g} · "
        f"{generation.finish_reason} · {len(response.values):,} tokens, {response.is_repeated.mean():.0%} repeated · "
        f"V {response.values[0]:.2f} → {response.values[-1]:.2f}"
    )
    return (
        f"<section><h3>{escape(summary)}</h3>{_curve(response)}"
        f"<details><summary>prompt</summary><pre>{escape(printable(generation.prompt))}</pre></details>"
        f"<pre>{tokens}{f'<em>{num_left:,} more tokens</em>' if num_left else ''}</pre></section>"
    )


def _curve(response: ValuedResponse) -> str:
    """The value over the response, from the smallest to the largest; repeated stretches are shaded."""
    n = len(response.values)
    shades, t = [], 0
    for is_repeated, run in groupby(response.is_repeated.tolist()):
        length = len(list(run))
        if is_repeated:
            shades.append(f'<rect x="{t / n * CURVE_WIDTH:.1f}" width="{length / n * CURVE_WIDTH:.1f}" height="100%"/>')
        t += length
    positions = np.unique(np.linspace(0, n - 1, min(n, MAX_CURVE_POINTS)).astype(int))
    low, high = float(response.values.min()), float(response.values.max())
    heights = (high - response.values[positions]) / max(high - low, 1e-12) * (CURVE_HEIGHT - 4) + 2
    points = " ".join(
        f"{(t + 0.5) / n * CURVE_WIDTH:.1f},{y:.1f}" for t, y in zip(positions.tolist(), heights.tolist(), strict=True)
    )
    return (
        f'<svg viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" preserveAspectRatio="none">'
        f'<title>V from {low:.3f} to {high:.3f}</title>{"".join(shades)}<polyline points="{points}"/></svg>'
    )


def contrast_cells(contrast: Contrast) -> tuple[str, ...]:
    """A row of the comparison: name, repeated, elsewhere, difference, matched difference, tokens of both."""
    return (
        contrast.name,
        f"{contrast.repeated:+.4f}",
        f"{contrast.other:+.4f}",
        show_estimate(contrast.difference),
        show_estimate(contrast.matched),
        f"{contrast.num_repeated:,}",
        f"{contrast.num_other:,}",
    )


def _contrast_row(contrast: Contrast) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in contrast_cells(contrast)) + "</tr>"


def show_estimate(estimate: Estimate) -> str:
    """`+0.1234 [+0.1000, +0.1500]`."""
    return f"{estimate.value:+.4f} [{estimate.low:+.4f}, {estimate.high:+.4f}]"


def _palette() -> list[str]:
    """Red over white to blue."""
    ends, middle = ((214, 84, 74), (76, 130, 196)), (255, 255, 255)
    colors = []
    for i in range(NUM_COLORS):
        x = 2 * i / (NUM_COLORS - 1) - 1
        mixed = (round(m + (e - m) * abs(x)) for m, e in zip(middle, ends[x > 0], strict=True))
        colors.append("#" + "".join(f"{channel:02x}" for channel in mixed))
    return colors


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>What the critic says</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:24px auto;padding:0 16px;color:#222;background:#fff}
h3{font-size:14px;margin:32px 0 4px} dl{display:grid;grid-template-columns:max-content 1fr;gap:0 16px} dd{margin:0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:4px 10px;text-align:right}
th:first-child,td:first-child{text-align:left} tr+tr{border-top:1px solid #ddd}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.7 ui-monospace,monospace;margin:6px 0} b{font-weight:400}
.r{border-bottom:2px solid #444} em{color:#777} summary{color:#777;font-size:13px;cursor:pointer}
svg{width:100%;height:70px;background:#fafafa} rect{fill:#e2ddd0}
polyline{fill:none;stroke:#333;stroke-width:1.2;vector-effect:non-scaling-stroke}
nav{position:sticky;top:0;background:#fff;padding:8px 0;border-bottom:1px solid #ddd}
nav i{display:inline-block;width:12px;height:12px} .value .of-advantage,.advantage .of-value{display:none}
$colors
</style></head>
<body class="value">
<h1>What the critic says</h1>
<dl>$facts</dl>
<h2>Repeated stretches against elsewhere</h2>
<table><tr><th></th><th>repeated</th><th>elsewhere</th><th>difference [$confidence]</th>
<th>matched difference [$confidence]</th><th>tokens</th><th>elsewhere</th></tr>$contrasts</table>
<p>A critic that devalues repetition has negative differences. Matched: among tokens of the same outcome in the
same tenth of their response. Intervals: bootstrap over prompts.</p>
<h2>Responses</h2>
<nav><label><input type="radio" name="by" value="value" checked> value</label>
<label><input type="radio" name="by" value="advantage"> advantage</label>
<span class="of-value">$value_low</span><span class="of-advantage">$advantage_low</span> $key
<span class="of-value">$value_high</span><span class="of-advantage">$advantage_high</span>
· underlined: repeated · hover for numbers</nav>
$responses
<script>
document.querySelectorAll("nav input").forEach(function (input) {
  input.addEventListener("change", function () { document.body.className = input.value; });
});
</script></body></html>
""")
