"""Fails when the demo's figures fall below what it promises."""

import json
import sys
from pathlib import Path

LEAST = {
    ("zeroshot", "zeroshot_seen", "acc1"): 0.85,
    ("zeroshot", "zeroshot_unseen", "acc1"): 0.60,
    ("retrieval", "retrieval", "image_retrieval_recall@10"): 0.85,
}


def main() -> None:
    folder = Path(sys.argv[1])
    low = []
    for (command, dataset, metric), least in LEAST.items():
        results = json.loads((folder / f"{command}.json").read_text())
        (result,) = [result for result in results if result["dataset"] == dataset]
        value = result["metrics"][metric]
        print(f"{dataset} {metric}: {value:.3f}, at least {least}")
        low += [f"{dataset} {metric}"] if value < least else []
    sys.exit(f"below the threshold: {', '.join(low)}" if low else 0)


if __name__ == "__main__":
    main()
