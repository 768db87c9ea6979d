"""Other ways to write an answer in LaTeX that mean the same, category by category."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

_PARENTHESES = re.compile(r"(?<!\\left)(?<!\\bigl)(?<![A-Za-z0-9}])\(([^()]*)\)$")
_FRACTION = re.compile(r"\\frac\{(-?\d+)\}\{(\d+)\}")
_DECIMAL = re.compile(r"-?\d*\.\d+")


def fraction_commands(answer: str) -> Iterator[str]:
    for command in ("\\dfrac", "\\tfrac"):
        if "\\frac" in answer:
            yield answer.replace("\\frac", command)


def delimiters(answer: str) -> Iterator[str]:
    if "\\left" in answer and "\\begin" not in answer:
        yield re.sub(r"\\left(?=[(\[.|\\])|\\right(?=[)\].|\\])", "", answer)
    elif re.fullmatch(r"\([^()]*\)|\[[^\[\]]*\]", answer):
        yield f"\\left{answer[:-1]}\\right{answer[-1]}"


def spaces(answer: str) -> Iterator[str]:
    yield f" {answer} "
    if "\\text" not in answer and "," in answer and not re.search(r"\d,\\?!?\d{3}", answer):
        yield answer.replace(",", ", ")
        yield answer.replace(",", ",\\ ")


def dollars(answer: str) -> Iterator[str]:
    yield f"${answer}$"
    yield f"{answer}."


def degrees(answer: str) -> Iterator[str]:
    if re.search(r"\^\{?\\circ\}?$", answer):
        bare = re.sub(r"\^\{?\\circ\}?$", "", answer)
        yield from (bare, f"{bare}^\\circ", f"{bare}^{{\\circ}}", f"{bare} \\text{{ degrees}}")


def texts(answer: str) -> Iterator[str]:
    if match := re.fullmatch(r"\\text\{([^{}]*)\}", answer):
        word = match[1].strip("() ")
        yield from (word, f"\\mathrm{{{word}}}" if " " not in word else word)
        yield f"\\text{{{word}}}"
        yield f"\\mbox{{{word}}}"


def units(answer: str) -> Iterator[str]:
    if re.fullmatch(r"-?\d+", answer):
        yield f"{answer}\\text{{ cm}}"
        yield f"{answer} \\text{{ inches}}"
        yield f"{answer}\\mbox{{ cm}}^2"
        yield f"x={answer}"


def percents(answer: str) -> Iterator[str]:
    if match := re.fullmatch(r"(\d+(?:\.\d+)?) ?\\%", answer):
        yield from (match[1], f"{match[1]}\\%", f"{match[1]} \\%", f"{match[1]}%")


def orders(answer: str) -> Iterator[str]:
    """Lists without brackets are sets; tuples are not."""
    parts = [part.strip() for part in answer.split(",")]
    is_list = len(parts) > 1 and not any(mark in answer for mark in "()[]{}!^")
    if is_list and all(re.fullmatch(r"-?\d{1,2}(?:/\d+)?", part) for part in parts):
        yield ", ".join(reversed(parts))
        yield f"\\{{{', '.join(reversed(parts))}\\}}"


def decimals(answer: str) -> Iterator[str]:
    if re.fullmatch(r"-?\d+", answer):
        yield f"{answer}.0"
    if match := _FRACTION.fullmatch(answer):
        yield f"{match[1]}/{match[2]}"
        yield f"\\frac{{{2 * int(match[1])}}}{{{2 * int(match[2])}}}"
        denominator = int(match[2])
        while denominator % 2 == 0:
            denominator //= 2
        while denominator % 5 == 0:
            denominator //= 5
        if denominator == 1:
            yield repr(int(match[1]) / int(match[2]))
    if _DECIMAL.fullmatch(answer):
        yield f"{answer}0"


def thousands(answer: str) -> Iterator[str]:
    if re.fullmatch(r"\d{4,}", answer):
        yield f"{int(answer):,}"
        yield f"{int(answer):,}".replace(",", "{,}")
        yield f"{int(answer):,}".replace(",", ",\\!")


VARIANTS: dict[str, Callable[[str], Iterator[str]]] = {
    function.__name__: function
    for function in (
        *(fraction_commands, delimiters, spaces, dollars, degrees, texts, units, percents, orders, decimals),
        thousands,
    )
}
