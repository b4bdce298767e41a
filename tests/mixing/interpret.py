"""Runs the GPU kernel on the CPU: ``python interpret.py CASES RESULTS`` with TRITON_INTERPRET=1, files of torch.save.

A process of its own, because Triton decides at import whether it interprets.
"""

import dataclasses
import sys

import torch

from sglang_optimal.mixing import mix


def main(cases_path: str, results_path: str) -> None:
    results = []
    for args, kwargs in torch.load(cases_path, weights_only=False):
        results.append(dataclasses.asdict(mix(*args, **kwargs, implementation="triton")))
    torch.save(results, results_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
