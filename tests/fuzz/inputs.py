"""What fuzz tests are fed with, and how often."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

T = TypeVar("T")

NUM_INPUTS: Counter[str] = Counter()
"""How many inputs each test has had in this session."""

SLOWEST_S = 5.0
"""No input may take longer, of processor time: a hang on a busy machine, too."""

numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400])
texts = st.text(max_size=12) | st.sampled_from(
    ["", "\0", "\ud800", "../../x", "/etc/passwd", "NaN", "\u202e", "x" * 5000]
)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


def sizes(slow: int) -> pytest.MarkDecorator:
    """A hundredth of the inputs in every run, all of them in the slow suite."""
    marks = [pytest.mark.slow, pytest.mark.timeout(3600)]
    return pytest.mark.parametrize("num_inputs", [slow // 100, pytest.param(slow, marks=marks)])


def fuzz(strategy: st.SearchStrategy[T], check: Callable[[T], object], *, num_inputs: int) -> None:
    """Calls `check` with that many inputs. What it raises fails the test, with the smallest input that raises it."""
    name = check.__qualname__.partition(".")[0]
    count = 0

    def timed(value: T) -> None:
        nonlocal count
        count += 1
        start = time.process_time()
        check(value)
        assert time.process_time() - start < SLOWEST_S

    configured = settings(
        max_examples=num_inputs, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
    )
    configured(given(strategy)(timed))()
    NUM_INPUTS[name] += count
    assert count >= num_inputs, f"the strategy has no more than {count} inputs"


def refusal(action: Callable[[], object]) -> str | None:
    """The message of the ValueError that an action raises, if it does: no other error is one for users."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return None


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with up to three damages: cut short, bits flipped, bytes put in, a part left out."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["cut", "flip", "insert", "omit"])):
            case "cut":
                content = content[:place]
            case "flip" if content:
                flipped = content[place] ^ 1 << draw(st.integers(0, 7))
                content = content[:place] + bytes([flipped]) + content[place + 1 :]
            case "insert":
                content = content[:place] + draw(st.binary(max_size=8)) + content[place:]
            case "omit":
                content = content[:place] + content[place + draw(st.integers(1, 40)) :]
    return content


@st.composite
def altered(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document of which up to three values are replaced, or left out."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            return draw(json_values)
        container, key = draw(st.sampled_from(places))
        if draw(st.integers(0, 3)) == 0:
            del container[key]
        else:
            container[key] = draw(json_values)
    return document


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every value in a document, as (container, key)."""
    if isinstance(document, dict):
        items = list(document.items())
    elif isinstance(document, list):
        items = list(enumerate(document))
    else:
        return []
    return [(document, key) for key, _ in items] + [place for _, value in items for place in _places(value)]
