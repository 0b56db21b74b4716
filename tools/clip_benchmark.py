"""Metrics computed by the CLIP_benchmark package itself, as a reference for ours.

    python -m pip install --no-deps --target peers clip_benchmark==1.6.2 numpy==2.2.6
    PYTHONPATH=peers python tools/clip_benchmark.py MODEL DATA...

(CLIP_benchmark fails with newer releases of numpy, which do not convert an array of one element to a number.)

MODEL is `open_clip:ARCH`, built by open_clip alone, or a model directory of dualenc, wrapped in the methods that
CLIP_benchmark calls. Data, batches, classifier, scores and metrics come from the package. The output is JSON.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch


def model_of(spec: str):
    """Return a model, its transform of Pillow images and its tokenizer."""
    if spec.startswith("open_clip:"):
        import open_clip

        name = spec.removeprefix("open_clip:")
        torch.manual_seed(0)
        model, _, transform = open_clip.create_model_and_transforms(name)
        return model.eval(), transform, open_clip.get_tokenizer(name)
    import dualenc
    from dualenc.data.images import to_tensor

    embedder = dualenc.load(spec, "cpu")
    model, preprocess = embedder.dual_encoder, embedder.preprocess

    class Model(torch.nn.Module):
        encode_image = staticmethod(lambda images: model.encode_image(preprocess.normalize(images)))
        encode_text = staticmethod(model.encode_text)

    return Model(), lambda image: preprocess(to_tensor(image)), embedder.tokenizer


def main(spec: str, *folders: str) -> None:
    sys.path.remove(str(Path(__file__).parent))  # This file has the package's name and would be imported instead.
    warnings.simplefilter("ignore")
    from clip_benchmark.datasets.builder import build_dataset, get_dataset_collate_fn
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    model, transform, tokenizer = model_of(spec)
    found = {}
    for folder in folders:
        kind = Path(folder) / "dataset_type.txt"
        retrieval = kind.exists() and kind.read_text().strip() == "retrieval"
        task = "zeroshot_retrieval" if retrieval else "zeroshot_classification"
        data = build_dataset("wds/set", root=folder, transform=transform, split="test", download=False, task=task)
        # As in the package's command, except for retrieval, where the collate function of its other sets is used.
        batches = data.batched(64, collation_fn=get_dataset_collate_fn("flickr8k")) if retrieval else data.batched(64)
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        loader.dataset.classes = data.classes
        if retrieval:
            metrics = zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
        else:
            metrics = zeroshot_classification.evaluate(
                model, loader, tokenizer, data.classes, data.templates, "cpu", amp=False
            )
        found[Path(folder).name] = metrics
        print(f"{Path(folder).name}: {metrics}", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(*sys.argv[1:])
