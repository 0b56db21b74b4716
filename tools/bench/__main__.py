"""Command line of the benchmarks."""

from jsonargparse import auto_cli

from tools.bench.checkpoint import checkpoint
from tools.bench.curate import curate
from tools.bench.evaluation import evaluation
from tools.bench.fit import fit
from tools.bench.index import index
from tools.bench.launches import launches
from tools.bench.loader import loader
from tools.bench.loss import loss
from tools.bench.memory import memory
from tools.bench.noise import noise
from tools.bench.precision import precision, rounding
from tools.bench.quality import quality
from tools.bench.retrieval import retrieval
from tools.bench.search import search
from tools.bench.serve import serve
from tools.bench.text import text
from tools.bench.text_tasks import answering, tagging
from tools.bench.zeroshot import zeroshot

if __name__ == "__main__":
    programs = {
        "answering": answering,
        "checkpoint": checkpoint,
        "curate": curate,
        "evaluation": evaluation,
        "fit": fit,
        "index": index,
        "launches": launches,
        "loader": loader,
        "loss": loss,
        "memory": memory,
        "noise": noise,
        "precision": precision,
        "quality": quality,
        "retrieval": retrieval,
        "rounding": rounding,
        "search": search,
        "serve": serve,
        "tagging": tagging,
        "text": text,
        "zeroshot": zeroshot,
    }
    auto_cli(programs, as_positional=False, description="Benchmarks, paired with a peer in one run.")
