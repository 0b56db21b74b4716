from jsonargparse import auto_cli

from tools.bench.loader import loader

if __name__ == "__main__":
    auto_cli({"loader": loader}, as_positional=False, description="Benchmarks, paired with a peer in one run.")
