"""Runs in DeepSparse's Python: computes one ONNX model once, times it, and prints {"seconds": the median call}.

python deepsparse_worker.py MODEL.onnx INPUT.npy OUTPUT.npy THREADS
"""

from __future__ import annotations

import json
import statistics
import sys
import time

SECONDS, MIN_CALLS, WARM_UP = 0.5, 5, 3


def main() -> None:
    import numpy as np
    from deepsparse import compile_model  # type: ignore[import-not-found, unused-ignore]

    source, given, target, threads = sys.argv[1:]
    x = np.load(given)
    engine = compile_model(source, batch_size=x.shape[0], num_cores=int(threads))
    np.save(target, engine.run([x])[0])
    for _ in range(WARM_UP):
        engine.run([x], val_inp=False)
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < MIN_CALLS:
        start = time.perf_counter()
        engine.run([x], val_inp=False)
        times.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.median(times)}))


if __name__ == "__main__":
    main()
