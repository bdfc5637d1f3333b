"""Make experiments/data/instructions.jsonl: small instructions and their answers, all generated here, by a seed.

python experiments/data/make_instructions.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

TEXT = (
    "apple river stone candle window garden silver paper bottle forest carpet ladder mirror pepper button basket "
    "feather hammer island jacket kettle lemon marble needle orange pencil ribbon saddle tunnel velvet walnut anchor"
)
WORDS = TEXT.split()
ROWS, SEED = 600, 0


def row(rng: random.Random) -> dict[str, str]:
    """One instruction of one of six kinds."""
    words, numbers = rng.sample(WORDS, 4), [rng.randrange(2, 60) for _ in range(4)]
    asked, answer = rng.choice(
        [
            (f"Put these words in alphabetical order: {', '.join(words)}.", ", ".join(sorted(words))),
            (f"Repeat these words backwards: {', '.join(words)}.", ", ".join(reversed(words))),
            (f"Which of these numbers is the largest: {', '.join(map(str, numbers))}?", str(max(numbers))),
            (f"Add {numbers[0]} and {numbers[1]}.", str(numbers[0] + numbers[1])),
            (f"How many letters does the word {words[0]} have?", str(len(words[0]))),
            (f"Write the word {words[1]} in capital letters.", words[1].upper()),
        ]
    )
    return {"prompt": f"Instruction: {asked}\nAnswer:", "completion": answer}


def main() -> None:
    rng, rows = random.Random(SEED), {}
    while len(rows) < ROWS:
        made = row(rng)
        rows.setdefault(made["prompt"], made)
    path = Path(__file__).parent / "instructions.jsonl"
    path.write_text("".join(json.dumps(made) + "\n" for made in rows.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
