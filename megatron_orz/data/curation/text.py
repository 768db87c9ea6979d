"""Problems as sequences of tokens, in which typesetting makes no difference and numbers do."""

from __future__ import annotations

import re
import unicodedata

_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\?,\\!|,)(?=\d{3}(?!\d))")
_TYPESETTING = re.compile(
    r"\\(?:left|right|displaystyle|text(?:bf|it)?|mathrm|mathbf|mbox)(?![a-z])|\\[,;:! ]|[\\${}~]"
)
# Every ideograph is a token, as scripts without spaces have no words to split at.
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")
_MATHS = re.compile(
    r"\[asy\].*?\[/asy\]|\$\$.*?\$\$|\$.*?\$|\\\[.*?\\\]|\\\(.*?\\\)|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\\[a-zA-Z]+",
    re.DOTALL,
)


def tokens(text: str) -> list[str]:
    r"""Words, numbers and symbols, without case and LaTeX's looks: `$\dfrac{1}{2}X$` is frac, 1, 2, x."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _THOUSANDS.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return _TOKEN.findall(_TYPESETTING.sub(" ", text))


def numbers(words: list[str]) -> str:
    """The numbers among the tokens, in a fixed order. Problems that differ in them are different problems."""
    return " ".join(sorted(word for word in words if word[0].isdigit()))


def ngrams(words: list[str], n: int) -> set[str]:
    """Every n tokens in a row; all of them where there are fewer than n."""
    return {" ".join(words[start : start + n]) for start in range(max(1, len(words) - n + 1))}


def prose(text: str) -> str:
    """The text without formulas, figures and LaTeX commands."""
    return _MATHS.sub(" ", text)
