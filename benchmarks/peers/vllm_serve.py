"""`vllm bench serve` where vLLM was installed under the name of its CPU build, which its own command does not find."""

import argparse

from vllm.benchmarks.serve import add_cli_args, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args())
