"""Check of the demo's results: exit with an error if a metric is below its threshold."""

import json
import sys
from pathlib import Path

THRESHOLDS = {
    ("zeroshot", "zeroshot_seen", "acc1"): 0.85,
    ("zeroshot", "zeroshot_unseen", "acc1"): 0.60,
    ("retrieval", "retrieval", "image_retrieval_recall@10"): 0.85,
}


def main() -> None:
    folder = Path(sys.argv[1])
    low = []
    for (command, dataset, metric), threshold in THRESHOLDS.items():
        results = json.loads((folder / f"{command}.json").read_text())
        (result,) = [result for result in results if result["dataset"] == dataset]
        value = result["metrics"][metric]
        print(f"{dataset} {metric}: {value:.3f}, at least {threshold}")
        low += [f"{dataset} {metric}"] if value < threshold else []
    sys.exit(f"below the threshold: {', '.join(low)}" if low else 0)


if __name__ == "__main__":
    main()
