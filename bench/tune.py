"""`python -m bench.tune`: measure launch configurations of the Triton kernels of some shapes.

Runs the Triton implementation of every shape once with RDFKERN_AUTOTUNE=1; Triton keeps what it
found on disk, where later processes look. Prints a line of JSON for each shape as soon as it is
done, so that this process can be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import os

import torch

from .problems import kind_of
from .shapes import FORWARD, Shape, select


def tune(shape: Shape, device: torch.device) -> str | None:
    """Tune one shape in every direction that is measured; None, or why that was not possible."""
    kind = kind_of(shape)
    problem = kind.problem(shape, device)
    reason = problem.reasons().get("triton", f"no Triton kernels for {device.type} tensors")
    if reason is not None:
        return reason
    try:
        run = kind.ours("triton").prepare(problem)
        with torch.no_grad():
            run.forward()
        if shape.directions != (FORWARD,):
            run.both(problem.gradient)
        torch.cuda.synchronize(device)
    except Exception as error:  # one shape that fails must not keep the others from being tuned
        return f"{type(error).__name__}: {error}"
    return None


def main() -> None:
    """Tune and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--shapes", default="gpu")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    os.environ["RDFKERN_AUTOTUNE"] = "1"
    for shape in select(arguments.shapes):
        reason = tune(shape, torch.device(arguments.device))
        print(json.dumps({"shape": shape.name, "reason": reason}), flush=True)


if __name__ == "__main__":
    main()
