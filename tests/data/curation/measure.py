"""Curates 100,000 rows and prints what each stage took: python -m tests.data.curation.measure

The rows are those of GSM8K and MATH500 with other numbers, half and half; 3 % have a fault, and 3 % are copied.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.data.curation.rows import SHARED, published

NUM_ROWS = 100_000


def make_rows() -> list[str]:
    rng = random.Random(0)
    sources = [published("gsm8k_train.jsonl"), published("math500.json")]
    rows: list[str] = []
    while len(rows) < NUM_ROWS:
        problem = rng.choice(rng.choice(sources))
        text, answer = (
            re.sub(r"\d+", lambda number: str(rng.randint(1, 10 ** len(number[0]))), part)
            for part in (problem.text, problem.answer)
        )
        match rng.randrange(100):
            case 0:
                rows.append('{"question": "cut sh')
            case 1:
                rows.append(json.dumps({"question": text}))
            case 2:
                rows.append(json.dumps({"question": f"{text} (A) 1 (B) 2 (C) 3", "answer": answer}))
            case 3 | 4 | 5:
                rows.append(json.dumps({"question": text, "answer": answer}))
                rows.append(json.dumps({"question": text.replace("$", "").replace(" ", "  "), "answer": answer}))
            case _:
                rows.append(json.dumps({"question": text, "answer": answer}))
    return rows[:NUM_ROWS]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "rows.jsonl"
        source.write_text("\n".join(make_rows()))
        command = [sys.executable, "tools/curate.py", "run", "--input", str(source), "--output", f"{directory}/out"]
        command += ["--evaluation", *(str(SHARED / name) for name in ("gsm8k_test.jsonl", "aime2024.json"))]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        print(f"{NUM_ROWS:,} rows in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
