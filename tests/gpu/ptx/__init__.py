"""An emulator of PTX: runs what Triton and nvcc compile, on a machine without a GPU, and reports its defects.

    run_ptx(ptx_text, kernel_name, grid, block, args, shared_bytes)

A block's threads run in step as numpy vectors; where they diverge they meet again at the immediate post-dominator.
Blocks run one after another, in either order.

What is modelled
    integers, float32, 16-bit floats: rounding, flushing of subnormals, NaN and -0 in min and max
    global and shared memory, vector loads and stores, atomics, ldmatrix, stmatrix
    cp.async with its groups; shfl, vote, redux; mma.sync and mma.sp of f16, bf16, s8, u8
    wgmma of f16, bf16, s8, u8 with its fences and groups, operands in shared memory by descriptor, fence.proxy.async
    barrier 0, divergence, early exits

What is reported, each as an exception of its own (`errors`), with the line of PTX, the block and a thread
    UnknownPtx        an instruction, modifier, type or number of operands that is not known: nothing is guessed. The
                      whole kernel is checked before it runs.
    OutOfBounds       an address outside of the buffers and of shared memory
    Misaligned        an address that its access cannot have
    Uninitialised     a read of memory that nothing wrote; a branch or an address from a register that nothing wrote
    AsyncNotWaited    an access to the target of a cp.async before the issuing thread waited for its group; to registers
                      of a wgmma, or a write to shared memory that it reads, before the warpgroup waited for its group
    MissingFence      a wgmma of registers used since the last wgmma.fence, or of shared memory whose last write is not
                      followed, on the way to it, by a fence.proxy.async
    Race              two warps on one byte of shared memory between two barriers, at least one of them writing; a
                      block that reads or writes a byte of global memory which one before it wrote (run both orders of
                      blocks); two threads that store different values at once
    DivergentBarrier  a barrier that part of a warp, or of the block, does not reach; also after an early exit
    InvalidOperand    a value that has no result: division by zero, metadata of mma.sp out of order, a descriptor that
                      is not defined or on which the threads of a warpgroup do not agree
    Endless           a block that does not end
    DivergentWarp     a shuffle, vote, reduction or matrix instruction without all its members

What is taken to be ideal, so that no defect is found there
    .approx functions and div.full are rounded correctly; mma and wgmma of floats add exactly and round once. The
    hardware may be a few units in the last place away. Which bits a NaN has is not modelled.
    A mov between a wgmma.fence and its wgmma is left to ptxas to place, as compilers do.
    The threads of a warp that have not diverged run in step, and memory is consistent: neither a missing bar.warp nor a
    missing fence is found. Races of warps within a block are looked for in shared memory, not in global memory.
    One order of execution: a kernel that is right only in this order is found only where `Race` sees it.
    Loads that bypass or fill caches, eviction hints and prefetch sizes do nothing.

What is not modelled, and raises UnknownPtx
    tcgen05, TMA (cp.async.bulk), mbarrier, clusters, named barriers, mma and wgmma of tf32, fp8 and f16 sums, sparse
    wgmma, descriptors with a base offset, local memory (spills), generic addresses of shared memory, constant memory,
    calls, float64 beyond + - ·, textures.
    Nothing here says how long a kernel takes.

Files: `parse` text to `program`; `flow` basic blocks and the order of diverged threads; `decode` and `isa` instructions
to functions; `machine` a block; `memory`, `shared_memory` and `warpgroups` with their checks, `watch` for the last;
`rounding` floats; `launch` a grid.

ISA: NVIDIA, Parallel Thread Execution ISA, version 8.7.
"""

from .errors import (
    AsyncNotWaited,
    DivergentBarrier,
    DivergentWarp,
    Endless,
    InvalidOperand,
    Misaligned,
    MissingFence,
    OutOfBounds,
    PtxError,
    Race,
    Uninitialised,
    UnknownPtx,
)
from .launch import Buffer, Struct, launch, load, run_ptx

__all__ = [
    "AsyncNotWaited",
    "Buffer",
    "DivergentBarrier",
    "DivergentWarp",
    "Endless",
    "InvalidOperand",
    "Misaligned",
    "MissingFence",
    "OutOfBounds",
    "PtxError",
    "Race",
    "Struct",
    "Uninitialised",
    "UnknownPtx",
    "launch",
    "load",
    "run_ptx",
]
