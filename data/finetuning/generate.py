"""
Write capitalization.json: five-letter words to be capitalized, a task with a known rule. From the repository root:
python data/finetuning/generate.py
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
N_VALIDATION, N_TEST = 40, 100


def main() -> None:
    words = (HERE / "words.txt").read_text("utf-8").split()
    assert len(set(words)) == len(words) and all(len(w) == 5 and w.isalpha() and w.islower() for w in words)
    random.Random(14).shuffle(words)
    rows = [{"input": word, "output": word.capitalize()} for word in words]
    held_out = N_VALIDATION + N_TEST
    splits = {"train": rows[held_out:], "validation": rows[N_TEST:held_out], "test": rows[:N_TEST]}
    lines = [f'"{name}": [\n' + ",\n".join(map(json.dumps, some)) + "\n]" for name, some in splits.items()]
    (HERE / "capitalization.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
