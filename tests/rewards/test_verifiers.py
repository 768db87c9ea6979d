"""Every response goes to the verifier of its kind, and its grade comes back to its place."""

from megatron_orz.rewards.verifiers import AnswerVerifier
from megatron_orz.types import AnswerKind

TESTS = '{"function": null, "tests": [{"input": "4", "output": "16"}]}'
# Kind, response, reference, reward: of the same text, each kind of grading makes something else.
CASES: list[tuple[AnswerKind, str, str, float]] = [
    ("math", "<answer>\\boxed{\\frac{4}{2}}</answer>", "2", 1.0),
    ("choice", "<answer>\\boxed{B. two}</answer>", "B", 1.0),
    ("code", "<answer>```python\nprint(int(input()) ** 2)\n```</answer>", TESTS, 1.0),
    ("math", "<answer>\\boxed{B. two}</answer>", "B", 0.0),
    ("choice", "<answer>\\boxed{2}</answer>", "B", 0.0),
    ("code", "<answer>\\boxed{16}</answer>", TESTS, 0.0),
    ("math", "<answer>\\boxed{3}</answer>", "3", 1.0),
]


def test_kinds_are_graded_each_in_its_way_and_in_order() -> None:
    calls: list[int] = []
    with AnswerVerifier(timeout_s=120.0, num_workers=1) as verifier:
        grades = verifier.grade(
            [kind for kind, *_ in CASES],
            [(text, "stop", reference) for _, text, reference, _ in CASES],
            on_grade=lambda: calls.append(1),
        )
        assert verifier.grade([], []) == []
    assert [grade.reward for grade in grades] == [reward for *_, reward in CASES]
    assert len(calls) == len(CASES)
