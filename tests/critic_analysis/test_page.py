"""The page as a browser would read it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from megatron_orz.critic_analysis.contrast import contrasts
from megatron_orz.critic_analysis.page import NUM_COLORS, Scale, render_page, token_texts
from megatron_orz.critic_analysis.values import ValuedResponse
from megatron_orz.data.synthetic import build_tokenizer
from tests.critic_analysis.critics import valued

BYTES = [
    b"wait,",
    b" ",
    "é".encode()[:1],
    "é".encode()[1:],
    "🙂".encode()[:2],
    "🙂".encode()[2:],
    b"<b>&",
    b"\n",
]


def decode(token_ids: Sequence[int]) -> str:
    """Each token is some bytes; one of them begins a character that the next one ends."""
    return b"".join(BYTES[i] for i in token_ids).decode(errors="replace")


class Page(HTMLParser):
    """Tags with their attributes, and the text of every token."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[str] = []
        self.in_token = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.in_token = tag == "b"
        if self.in_token:
            self.tokens.append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_token = False

    def handle_data(self, data: str) -> None:
        if self.in_token:
            self.tokens[-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def response(token_ids: list[int], values: list[float], is_repeated: list[bool]) -> ValuedResponse:
    made = valued(7, values, is_repeated, reward=1.0)
    return replace(made, generation=replace(made.generation, response_ids=token_ids, prompt="<script>evil()</script>"))


def page(responses: list[ValuedResponse], max_tokens: int = 100) -> tuple[Page, str]:
    html = render_page(
        responses,
        contrasts(responses, num_resamples=10, seed=0),
        decode=decode,
        facts={"critic": "<a>&b"},
        max_tokens=max_tokens,
    )
    return Page(html), html


RESPONSE = response([0, 1, 2, 3, 6, 7], [0.0, 0.25, 0.5, 0.75, 1.0, 1.0], [False, False, True, True, False, False])


def test_every_token_has_its_text_its_numbers_and_its_colours() -> None:
    read, _ = page([RESPONSE])
    assert read.tokens == ["wait,", " ", "", "é", "<b>&", "⏎\n"]
    tokens = read.attributes("b")
    assert [token["title"] for token in tokens[:3]] == [
        "token 0: V 0.000, A +1.000",
        "token 1: V 0.250, A +0.750",
        "token 2: V 0.500, A +0.500",
    ]
    classes = [str(token["class"]).split() for token in tokens]
    assert [("r" in names) for names in classes] == [False, False, True, True, False, False]
    values = [int(names[0].removeprefix("v")) for names in classes]
    advantages = [int(names[1].removeprefix("a")) for names in classes]
    assert values == sorted(values)
    assert (values[0], values[-1]) == (0, NUM_COLORS - 1)
    # Advantages are 1 - V, on a scale that is 0 in its middle.
    assert advantages == sorted(advantages, reverse=True)
    assert (advantages[0], advantages[-1]) == (NUM_COLORS - 1, NUM_COLORS // 2)


def test_the_curve_shades_repeated_stretches_and_follows_the_values() -> None:
    read, _ = page([RESPONSE])
    (shade,) = read.attributes("rect")
    assert (float(str(shade["x"])), float(str(shade["width"]))) == (300, 300)
    (curve,) = read.attributes("polyline")
    points = [tuple(map(float, point.split(","))) for point in str(curve["points"]).split()]
    assert [x for x, _ in points] == pytest.approx([75, 225, 375, 525, 675, 825])
    assert [y for _, y in points] == pytest.approx([68, 51.5, 35, 18.5, 2, 2])


def test_nothing_comes_from_outside_and_nothing_of_a_model_becomes_markup() -> None:
    read, html = page([RESPONSE])
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in read.tags)
    assert len(read.attributes("script")) == 1
    assert "&lt;script&gt;evil()" in html
    assert "&lt;a&gt;&amp;b" in html
    assert "$" not in html, "a placeholder was left"


def test_a_long_response_is_cut_and_says_so() -> None:
    read, html = page([RESPONSE], max_tokens=4)
    assert read.tokens == ["wait,", " ", "", "é"]
    assert "2 more tokens" in html


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([0, 1, 2, 3], ["wait,", " ", "", "é"]),
        ([4, 5, 0], ["", "🙂", "wait,"]),
        ([0, 4], ["wait,", "\ufffd"]),
        ([4, 4, 4, 4, 4, 0], ["", "", "", "\ufffd" * 4, "", "\ufffdwait,"]),
        ([], []),
    ],
)
def test_a_token_has_the_text_that_it_adds(token_ids: list[int], expected: list[str]) -> None:
    assert token_texts(token_ids, decode) == expected


def test_texts_of_a_real_tokenizer_add_up_to_the_response() -> None:
    tokenizer = build_tokenizer()
    text = "12+7=19\n<think> 3*4 </think><answer>\\boxed{12}</answer>"
    ids = tokenizer(text)["input_ids"]
    assert "".join(token_texts(ids, tokenizer.decode)) == tokenizer.decode(ids)


def test_a_scale_is_even_and_ends_at_its_ends() -> None:
    scale = Scale(-1.0, 1.0)
    assert scale.colors(np.array([-9, -1, -0.01, 0, 0.01, 1, 9], dtype=np.float32)).tolist() == [
        0, 0, 10, 10, 10, 20, 20,
    ]  # fmt: skip
    assert Scale(0.5, 0.5).colors(np.array([0.5, 0.6], dtype=np.float32)).tolist() == [0, 20]
