"""How much memory compressing a decoder takes at its peak, beside its size in float32.

    python benchmarks/algorithm_memory.py MODEL_FOLDER TEXT_FILE [--recipe gptq] [--samples 16] [--context 512] [--copy]
        [--max-memory "150 MB"] [--estimate]

The peak is the model itself and what the process holds at most from then to the report, beyond what it held with the
model loaded; libraries and the loading are not in it. One recipe a process.
"""

from __future__ import annotations

import argparse
import gc
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import tcompress
from tcompress.memory import trim

GPTQ = {"step": "quantize", "scheme": "W4A16-g64", "algorithm": "gptq"}
SPARSEGPT = {"step": "prune", "pattern": "unstructured", "sparsity": 0.5, "algorithm": "sparsegpt"}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "int8": [{"step": "quantize", "scheme": "int8"}],
    "gptq": [GPTQ],
    "sparsegpt": [SPARSEGPT],
    "sparsegpt + gptq": [SPARSEGPT, GPTQ],
}


def resident() -> int:
    """Bytes that this process holds of its own: without what is mapped from files, as libraries' code is."""
    _, all_pages, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (all_pages - of_files) * 4096


class Peak:
    """The most that the process held while this was entered, looked at 250 times a second."""

    def __enter__(self) -> Peak:
        gc.collect()
        trim()  # what is free already would hide what is taken next
        self.before = self.most = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.004):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--recipe", choices=RECIPES, default="gptq")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--max-memory", help="as for compress")
    parser.add_argument("--copy", action="store_true", help="leave the model as it is: the result comes beside it")
    parser.add_argument("--estimate", action="store_true", help="print what tcompress.estimate says before")
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(), return_tensors="pt").input_ids[0]
    samples = [{"input_ids": w[None]} for w in ids.split(options.context)[: options.samples]]
    more = {"max_memory": options.max_memory} if options.max_memory else {}
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # what libraries set up at the first product is theirs
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    for parameter in model.parameters():  # a file that is mapped into memory would be counted, and left, as it is read
        parameter.data = parameter.data.clone()
    size = sum(p.nbytes for p in model.parameters())
    recipe = {"steps": RECIPES[options.recipe]}
    if options.estimate:
        print(tcompress.estimate(model, recipe, samples, inplace=not options.copy, **more))
    with Peak() as peak:
        start = time.perf_counter()
        tcompress.compress(model, recipe, samples, inplace=not options.copy, progress=False, **more)
        seconds = time.perf_counter() - start
    most = size + peak.most - peak.before
    how = "beside the model" if options.copy else "in place"
    print(f"{options.recipe}, {how}, {len(samples)} x {options.context} tokens: peak {most / 1e6:.0f} MB", end=", ")
    print(f"{most / size:.2f} of the model's {size / 1e6:.0f} MB; {seconds:.0f} s")


if __name__ == "__main__":
    main()
