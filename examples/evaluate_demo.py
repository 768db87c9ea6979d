"""What PPO changed in the demo, item by item: its base model and its last policy on the held-out sums.

    python examples/evaluate_demo.py                         # after examples/demo.py; with a vLLM server
    python examples/evaluate_demo.py --fleet.kind local      # without vLLM: half a minute

Options go to `tools/evaluate.py run`. Records, scores and wrong items stay in runs/demo-base-scores and
runs/demo-scores; the same command again only prints them.
"""

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parent.parent / "tools" / "evaluate.py"
BASE, TRAINED = Path("runs/demo-base"), Path("runs/demo")
SETTINGS = [
    *("--template", "short", "--max-prompt-tokens", "64", "--num-responses", "16"),
    *("--sampling.max-response-tokens", "64", "--fleet.max-model-tokens", "128"),
    *("--fleet.kv-cache-gib", "0.25", "--fleet.cpu-threads", "1"),
]


def evaluate(model: Path, output: Path, options: list[str]) -> None:
    """The scores of one checkpoint, recorded in `output`."""
    data = str(BASE / "held_out.jsonl")
    arguments = ["run", "--model", str(model), "--data", data, "--output", str(output), *SETTINGS, *options]
    subprocess.run([sys.executable, str(TOOL), *arguments], check=True)


def main(options: list[str]) -> None:
    """Evaluates both and compares them; ends with the exit code of what fails."""
    outputs = [path.with_name(f"{path.name}-scores") for path in (BASE, TRAINED)]
    try:
        for model, output in zip((BASE, TRAINED), outputs, strict=True):
            evaluate(model, output, options)
        first, second = map(str, outputs)
        subprocess.run([sys.executable, str(TOOL), "compare", "--first", first, "--second", second], check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
