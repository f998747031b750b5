"""What can be said of the GPU kernels without a GPU: registers, spills, shared memory, occupancy, the instructions of
the hot loop, and lower bounds of the time on three cards. Written to gpu_static.json, and compared with it.

    python benchmarks/gpu_static.py                                writes the file anew
    python benchmarks/gpu_static.py --compare                      exit status 1 where a kernel got worse
    python benchmarks/gpu_static.py --variant "attention d64" --architecture 80 --print

docs/gpu.md tells how to read it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gpu_nvcc
from gpu_bounds import PROBLEMS, Step
from gpu_machine import GPUS, SHARED_RESERVED, WARP, occupancy
from gpu_sass import Machine, inspect

BASELINE = Path(__file__).with_suffix(".json")
#: By how much a kernel may differ from the baseline: registers more, points of the share of matrix instructions less.
MORE_REGISTERS, LESS_SHARE = 8, 3.0


def described(
    machine: Machine, architecture: int, warps: int, shared: int, blocks: dict[str, int], tile: str = ""
) -> dict[str, Any]:
    """A kernel as the file has it; shared: dynamic bytes. tile: its name, which it has where it is from a table."""
    # from 9.0 on the code itself names the 1 KiB of the system, which `occupancy` knows of
    reserved = SHARED_RESERVED if architecture >= 90 else 0
    total = shared + max(machine.static_shared - reserved, 0)
    fits = occupancy(architecture, warps, machine.registers, total)
    entry: dict[str, Any] = {
        **({"tile": tile} if tile else {}),
        "blocks": blocks,
        "warps": warps,
        "registers": machine.registers,
        "spills": machine.spills,
        "stack": machine.stack,
        "shared": total,
        "programs a multiprocessor": fits.blocks,
        "occupancy": round(100 * fits.share),
        "bound by": fits.limit,
    }
    if machine.hot is not None:
        entry["loop"] = {
            "instructions": machine.hot.instructions,
            "mma %": round(100 * machine.hot.mma_share, 1),
            "mma units %": round(100 * machine.hot.mma_unit_share, 1),
            "mix": machine.hot.mix,
        }
    return entry


def kernels_of_triton(names: Iterable[str], architectures: Iterable[int]) -> dict[str, dict[str, Any]]:
    """{"sm_80": {variant: entry}}."""
    from gpu_compile import VARIANTS, compile_variant  # which imports triton

    found: dict[str, dict[str, Any]] = {}
    for architecture in architectures:
        of_this = found.setdefault(f"sm_{architecture}", {})
        for name in names:
            variant = VARIANTS[name]
            kernel = next(k for k in compile_variant(variant, architecture) if k.kernel == variant.kernel)
            (machine,) = inspect(kernel.cubin).values()
            of_this[name] = described(machine, architecture, kernel.warps, kernel.shared, kernel.blocks, kernel.tile)
    return found


def kernels_of_nvcc(architectures: Iterable[int], folder: Path = gpu_nvcc.CUDA) -> dict[str, dict[str, Any]]:
    """{"sm_80": {"cuda <kernel>": entry}}; nothing where there is no source or no nvcc. What a launch asks for is not
    in the code: the warps are those of the launch bounds, and its shared memory is not counted."""
    found: dict[str, dict[str, Any]] = {}
    for source in gpu_nvcc.sources(folder) if gpu_nvcc.nvcc() else ():
        for architecture in architectures:
            machines = inspect(gpu_nvcc.compile_source(source, architecture))
            names = gpu_nvcc.readable(list(machines)) if machines else []
            for name, machine in zip(names, machines.values(), strict=True):
                warps = -(-(machine.threads or 1024) // WARP)
                entry = described(machine, architecture, warps, 0, {})
                found.setdefault(f"sm_{architecture}", {})[f"cuda {name}"] = entry
    return {key: dict(sorted(entries.items())) for key, entries in found.items()}


def bounds(kernels: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{GPU: {problem: microseconds}}, for the problems whose kernels are there."""
    found: dict[str, dict[str, Any]] = {}
    for gpu in GPUS:
        entries = kernels.get(f"sm_{gpu.architecture}", {})
        for problem in PROBLEMS:
            if "loop" not in entries.get(problem.variant, {}):
                continue
            entry = entries[problem.variant]
            work = 1
            for size in entry["blocks"].values():
                work *= size
            step = Step(work, entry["blocks"]["BLOCK_M"], entry["warps"], entry["loop"]["instructions"])
            least = problem.bounds(gpu, step)
            found.setdefault(gpu.name, {})[problem.name] = {
                "products": least.products,
                "exponentials": least.exponentials,
                "memory": least.memory,
                "issue": least.issue,
            }
    return found


def worse(baseline: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What got worse, in words; only kernels that `now` has."""
    found = []
    for architecture, entries in now.items():
        for name, entry in entries.items():
            before = baseline.get(architecture, {}).get(name)
            where = f"{architecture} {name}"
            if before is None:
                found.append(f"{where}: not in the baseline; write it with python benchmarks/gpu_static.py")
                continue
            if entry["registers"] > before["registers"] + MORE_REGISTERS:
                found.append(f"{where}: {entry['registers']} registers, {before['registers']} before")
            found += [
                f"{where}: {entry[k]} {k}, {before[k]} before" for k in ("spills", "stack") if entry[k] > before[k]
            ]
            share = [e.get("loop", {}).get("mma units %", 0.0) for e in (before, entry)]
            if share[1] < share[0] - LESS_SHARE:
                found.append(f"{where}: {share[1]} % matrix instructions, {share[0]} % before")
    return found


def main(arguments: list[str] | None = None) -> int:
    from gpu_compile import ARCHITECTURES, VARIANTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="only this one; may be repeated")
    parser.add_argument("--architecture", action="append", type=int, choices=ARCHITECTURES, help="80, 89, 90")
    parser.add_argument("--compare", action="store_true", help="with the file; write nothing")
    parser.add_argument("--print", action="store_true", help="the JSON; write nothing")
    options = parser.parse_args(arguments)
    architectures = options.architecture or ARCHITECTURES
    kernels = kernels_of_triton(options.variant or VARIANTS, architectures)
    if not options.variant:
        for key, entries in kernels_of_nvcc(architectures).items():
            kernels[key] |= entries
    if options.compare:
        problems = worse(json.loads(BASELINE.read_text())["kernels"], kernels)
        print("\n".join(problems) or f"nothing got worse, of {sum(map(len, kernels.values()))} kernels")
        return 1 if problems else 0
    import triton

    everything = {"triton": triton.__version__, "kernels": kernels, "microseconds at least": bounds(kernels)}
    text = json.dumps(everything, indent=1) + "\n"
    if options.print:
        print(text, end="")
    elif options.variant or options.architecture:
        parser.error("a part of the kernels can be printed or compared, not written")
    else:
        BASELINE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
