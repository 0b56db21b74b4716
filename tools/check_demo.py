"""Fails when the demo's figures fall below what it is known to reach."""

import json
import sys
from pathlib import Path

LEAST = {"zeroshot": {"acc1": 0.45}, "retrieval": {"image_retrieval_recall@10": 0.90}}


def main() -> None:
    folder = Path(sys.argv[1])
    low = []
    for command, thresholds in LEAST.items():
        (result,) = json.loads((folder / f"{command}.json").read_text())
        for name, least in thresholds.items():
            value = result["metrics"][name]
            print(f"{command} {name}: {value:.3f}, at least {least}")
            low += [name] if value < least else []
    sys.exit(f"below the threshold: {', '.join(low)}" if low else 0)


if __name__ == "__main__":
    main()
