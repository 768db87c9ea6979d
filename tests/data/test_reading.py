"""Rows of data files: the good ones, and for the bad ones what is wrong and where."""

import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_orz.data.reading import Problem, RowError, data_files, read_problems, read_rows

SHARED = Path(__file__).parents[3] / "shared" / "data"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is not there")
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_recipe_forms_are_read(tmp_path: Path) -> None:
    training = [[{"from": "human", "value": "1+1?"}, {"from": "assistant", "ground_truth": {"value": "2"}}]]
    evaluation = [{"prompt": [{"from": "user", "value": "1+1?"}], "final_answer": "2", "file_name": "x"}]
    for name, items in (("train", training), ("eval", evaluation)):
        [problem] = read_problems(write(tmp_path / f"{name}.json", json.dumps(items)))
        assert (problem.text, problem.answer) == ("1+1?", "2")


def test_tables_are_read_by_column(tmp_path: Path) -> None:
    rows = [{"q": "a?", "a": "1,000"}, {"q": "b?", "a": 7}, {"q": "c?", "a": "so 2\n#### -1,234"}]
    lines = write(tmp_path / "x.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n")
    problems = list(read_problems(lines, problem_column="q", answer_column="a"))
    assert [(problem.text, problem.answer) for problem in problems] == [("a?", "1,000"), ("b?", "7"), ("c?", "-1234")]

    table = pyarrow.table({"q": ["a?", "b?"], "a": ["1", "#### 2,000"], "other": [0, 0]})
    parquet.write_table(table, tmp_path / "x.parquet")
    problems = list(read_problems(tmp_path / "x.parquet", problem_column="q", answer_column="a"))
    assert [(problem.text, problem.answer) for problem in problems] == [("a?", "1"), ("b?", "2000")]


def test_published_files_are_read_whole() -> None:
    math500 = list(read_problems(shared("math500.json")))
    assert (len(math500), math500[0].answer) == (500, r"\left( 3, \frac{\pi}{2} \right)")
    assert len(list(read_problems(shared("aime2024.json")))) == 30
    gsm8k = list(read_problems(shared("gsm8k_train.jsonl")))
    assert (len(gsm8k), gsm8k[0].answer) == (7473, "72")
    assert all(float(problem.answer) == int(problem.answer) for problem in gsm8k)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, r"none.jsonl: no such file; check data.train"),
        ("x.csv", "a,b", r"unknown kind of file '.csv'; use .json"),
        ("x.jsonl", "\n", r"x.jsonl: holds no problems"),
        ("x.json", "", r"x.json: holds no problems"),
        ("x.json", "[]", r"x.json: holds no problems"),
        ("x.json", "[1,", r"x.json: malformed JSON \(.*line 1 column 4"),
        ("x.json", "[" * 100_000, r"x.json: malformed JSON \(.*recursion"),
        ("x.json", '{"a": 1}', r"x.json: holds a JSON dict, not a list"),
        ("x.json", '[{"prompt": []}]', r"x.json: item 1: is in neither of the recipe's forms; write it as"),
        ("x.jsonl", '{"question": "q", "answer": "1"}\n{"question"', r"x.jsonl: line 2: malformed JSON"),
        ("x.jsonl", '{"question": "q", "reply": "1"}', r"line 1: has no column 'answer', only 'question', 'reply'"),
        ("x.jsonl", '{"question": "q", "answer": " "}', r"line 1: the answer is empty; fill it in"),
        ("x.jsonl", '{"question": "q", "answer": "####"}', r"line 1: the answer is empty"),
        ("x.jsonl", '{"question": "", "answer": "1"}', r"line 1: the problem is empty"),
        ("x.jsonl", '{"question": "q", "answer": null}', r"line 1: the answer None is neither text nor a number"),
        ("x.jsonl", "[1, 2]", r"line 1: is not an object with named columns"),
        ("x.jsonl", '{"question": "qué", "answer": "1"}'.encode("latin1"), r"line 1: byte 16 .* is not UTF-8; save it"),
        ("x.parquet", "not parquet", r"x.parquet: not a parquet file"),
    ],
)
def test_bad_files_are_refused_with_place_and_remedy(
    tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        list(read_problems(tmp_path / name))


def test_parquet_without_the_column_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"q": ["a"], "a": ["1"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet: has no column 'question', only 'q', 'a'; set data.problem"):
        list(read_problems(tmp_path / "x.parquet"))


GOOD = {"question": "1+1?", "answer": "2"}
BAD_LINES = [
    (b'{"question": "1+1?"', "malformed"),
    (b"[" * 100_000, "malformed"),
    (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "malformed"),
    ('{"question": "qué", "answer": "1"}'.encode("latin1"), "encoding"),
    (b'{"question": "q\\ud800", "answer": "1"}', "encoding"),
    (b'{"question": "q", "reply": "1"}', "missing_column"),
    (b'{"question": "q", "answer": ""}', "empty"),
    (b'{"question": " ", "answer": "1"}', "empty"),
    (b'{"question": "q", "answer": null}', "wrong_type"),
    (b'{"question": "q", "answer": true}', "wrong_type"),
    (b'{"question": ["q"], "answer": "1"}', "wrong_type"),
    (b"7", "wrong_type"),
]


def test_bad_lines_are_named_and_cost_no_other_line(tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode()
    path = write(tmp_path / "x.jsonl", b"\n".join(line for bad, _ in BAD_LINES for line in (good, bad)))
    rows = list(read_rows(path))
    assert [row.place for row in rows] == [f"{path}: line {n}" for n in range(1, 2 * len(BAD_LINES) + 1)]
    assert all(isinstance(row, Problem) and (row.text, row.answer) == ("1+1?", "2") for row in rows[::2])
    assert [row.fault for row in rows[1::2] if isinstance(row, RowError)] == [fault for _, fault in BAD_LINES]
    assert all(str(row).startswith(f"{row.place}: ") and len(str(row)) < 1000 for row in rows[1::2])


def test_a_byte_of_another_encoding_spoils_its_item_alone(tmp_path: Path) -> None:
    items = [{"prompt": [{"from": "user", "value": text}], "final_answer": "1"} for text in ("a", "é", "b")]
    path = write(tmp_path / "x.json", json.dumps(items, ensure_ascii=False).encode("latin1"))
    first, second, third = read_rows(path)
    assert isinstance(first, Problem)
    assert isinstance(third, Problem)
    assert isinstance(second, RowError)
    assert (second.fault, second.place) == ("encoding", f"{path}: item 2")


def test_table_cells_that_are_not_utf8_spoil_their_row_alone(tmp_path: Path) -> None:
    cells = pyarrow.array([b"a?", "qué".encode("latin1"), b"b?"], pyarrow.binary())
    # Arrow takes the bytes for text on their word, as other writers of parquet do.
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, cells.buffers())
    table = pyarrow.table({"question": text, "answer": pyarrow.array(["1", "2", None]).dictionary_encode()})
    parquet.write_table(table, tmp_path / "x.parquet")
    rows = list(read_rows(tmp_path / "x.parquet"))
    assert [row.fault if isinstance(row, RowError) else row.answer for row in rows] == ["1", "encoding", "wrong_type"]


def test_what_can_be_read_of_a_file_cut_short_is_read(tmp_path: Path) -> None:
    """An Arrow stream has its rows before its end; a parquet file cannot be opened without it."""
    table = pyarrow.table({"question": [f"{n}?" for n in range(2000)], "answer": [str(n) for n in range(2000)]})
    with pyarrow.ipc.new_stream(tmp_path / "whole.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    parquet.write_table(table, tmp_path / "whole.parquet")
    for kind, num_good in (("arrow", 1000), ("parquet", 0)):
        whole = (tmp_path / f"whole.{kind}").read_bytes()
        *good, error = read_rows(write(tmp_path / f"x.{kind}", whole[: len(whole) * 5 // 8]))
        assert [row.answer for row in good if isinstance(row, Problem)] == [str(n) for n in range(num_good)]
        assert isinstance(error, RowError)
        assert error.fault == "malformed"


def test_a_dataset_saved_by_datasets_is_read() -> None:
    """The directory was written by `datasets` 5.2: DatasetDict({"train": two shards}).save_to_disk."""
    directory = Path(__file__).parent / "saved_dataset"
    files = data_files(directory)
    assert [str(file.relative_to(directory)) for file in files] == [
        "train/data-00000-of-00002.arrow",
        "train/data-00001-of-00002.arrow",
    ]
    problems = [problem for file in files for problem in read_problems(file)]
    assert [(problem.text, problem.answer) for problem in problems] == [("1+1?", "2"), ("2+2?", "4"), ("3+3?", "6")]


def test_a_directory_gives_its_data_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.parquet", "a/state.json", "a/cache-1.arrow", "README.md", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "")
    assert data_files(tmp_path) == [tmp_path / "a/z.parquet", tmp_path / "b.jsonl"]
    (tmp_path / "a/z.parquet").unlink()
    with pytest.raises(ValueError, match=r"a: holds no data files \(.json, "):
        data_files(tmp_path / "a")


def test_ids_are_read_where_rows_have_them(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", "\n".join(json.dumps(GOOD | extra) for extra in ({"id": 7}, {}, {"id": "a"})))
    rows = [row for row in read_rows(path, id_column="id") if isinstance(row, Problem)]
    assert [row.problem_id for row in rows] == ["7", None, "a"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
ROWS = st.fixed_dictionaries({}, optional={"question": JSON, "answer": JSON, "other": JSON})


@given(lines=st.lists(ROWS.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=40), max_size=8))
def test_any_lines_give_a_problem_or_an_error_each(
    lines: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines = [line.replace(b"\n", b" ") for line in lines]
    path = write(tmp_path_factory.getbasetemp() / "fuzz.jsonl", b"\n".join(lines))
    rows = list(read_rows(path))
    # Lines of nothing but white space are no rows.
    blank = [line.decode("utf-8-sig", "replace").strip() == "" for line in lines]
    assert [row.place for row in rows] == [f"{path}: line {n}" for n, is_blank in enumerate(blank, 1) if not is_blank]
    for row in rows:
        if isinstance(row, Problem):
            source = json.loads(lines[int(row.place.rsplit(" ", 1)[1]) - 1].decode("utf-8-sig"))
            assert row.text == str(source["question"])
            assert row.answer in str(source["answer"]).replace(",", "") + str(source["answer"])


@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()), suffix=st.integers(0, 2))
def test_any_file_ends_in_rows_and_errors(
    content: bytes, suffix: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.getbasetemp() / f"fuzz{('.json', '.parquet', '.arrow')[suffix]}", content)
    for row in read_rows(path):
        assert isinstance(row, Problem | RowError)


@given(position=st.integers(0, 10**6), replacement=st.binary(min_size=1, max_size=8), kind=st.booleans())
def test_any_damage_to_a_table_ends_in_rows_and_errors(
    position: int, replacement: bytes, kind: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.getbasetemp()
    table = pyarrow.table({"question": [f"{n}?" for n in range(20)], "answer": [str(n) for n in range(20)]})
    path = directory / ("damaged.parquet" if kind else "damaged.arrow")
    if kind:
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    whole = path.read_bytes()
    start = position % len(whole)
    write(path, whole[:start] + replacement + whole[start + len(replacement) :])
    assert all(isinstance(row, Problem | RowError) for row in read_rows(path))
