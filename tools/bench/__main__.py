from jsonargparse import auto_cli

from tools.bench.checkpoint import checkpoint
from tools.bench.index import index
from tools.bench.loader import loader

if __name__ == "__main__":
    programs = {"checkpoint": checkpoint, "index": index, "loader": loader}
    auto_cli(programs, as_positional=False, description="Benchmarks, paired with a peer in one run.")
