"""Reflection patterns in texts."""

import pytest

from megatron_orz.metrics.traits import reflection_patterns, traits_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Wait, no. WAIT, yes.", ("wait,",)),
        ("I recheck and retry", ("recheck", "retry")),
        ("HOWEVER, 3; alternatively, 4", ("alternatively,", "however,")),
        ("rechecking, retrying", ("recheck", "retry")),
        ("wait for it, however it is", ()),
        ("", ()),
    ],
)
def test_patterns_are_found_in_any_case_and_with_their_comma(text: str, expected: tuple[str, ...]) -> None:
    assert reflection_patterns(text) == expected


def test_texts_and_tokens_of_one_response_come_together() -> None:
    first, second = traits_of(["nothing here", "wait, wait,"], [[1, 2, 3], [7, 7, 7]])
    assert (first.reflection, first.repetition) == ((), 0.0)
    # 7, 77, 777 are distinct of 6 stretches.
    assert (second.reflection, second.repetition) == (("wait,",), 0.5)
