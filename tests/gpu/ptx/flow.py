"""Basic blocks of a kernel, and the order in which diverged threads run.

Threads that have diverged run the block of lowest rank first, so that those which are ahead wait for the others. The
ranks make that reconvergence at the immediate post-dominator: in a topological order every block between a branch and
the point where its sides meet comes before that point. Loops are strongly connected components: each is contiguous, and
is ordered within by the same rule once the edges back to its entry are gone.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .program import Instruction, Kernel, Symbol


@dataclass
class BasicBlock:
    """start, end: its instructions. Only the last one branches, waits at a barrier or ends threads. target: the block
    to which it branches, if it does; the number of blocks stands for the end of the kernel."""

    start: int
    end: int
    successors: list[int]
    target: int | None = None
    rank: int = -1


_ENDS = ("bra", "ret", "exit", "trap", "bar", "barrier")


def target_of(ins: Instruction, kernel: Kernel) -> int:
    (operand,) = ins.expect(1)
    if not isinstance(operand, Symbol) or operand.name not in kernel.labels:
        raise ins.unknown("branch target: no such label")
    return kernel.labels[operand.name]


def ends_block(ins: Instruction) -> bool:
    return ins.opcode in _ENDS and ins.modifiers[:1] != ("warp",)


def basic_blocks(kernel: Kernel) -> list[BasicBlock]:
    """In the order of the text; ranks are set."""
    code = kernel.instructions
    starts = {0, *kernel.labels.values(), *(i + 1 for i, ins in enumerate(code) if ends_block(ins))}
    edges = [*sorted(s for s in starts if s < len(code)), len(code)]
    index = {start: i for i, start in enumerate(edges)}
    blocks = []
    for start, end in itertools.pairwise(edges):
        last = code[end - 1]
        following = [] if end == len(code) else [index[end]]
        target = None
        if last.opcode == "bra":
            target = index[target_of(last, kernel)]
            following = [target, *(following if last.guard else [])]
        elif last.opcode in ("ret", "exit", "trap") and last.guard is None:
            following = []
        blocks.append(BasicBlock(start, end, [b for b in following if b < len(edges) - 1], target))
    for rank, i in enumerate(_order(list(range(len(blocks))), [b.successors for b in blocks])):
        blocks[i].rank = rank
    return blocks


def _order(nodes: list[int], successors: list[list[int]]) -> list[int]:
    """Topological, loops contiguous; `nodes` are in the order of the text and the first is the entry."""
    inside = set(nodes)
    out: list[int] = []
    for component in _components(nodes, [[t for t in s if t in inside] for s in successors]):
        if len(component) == 1:
            out += component
            continue
        members = set(component)
        entered = {t for n in nodes if n not in members for t in successors[n] if t in members}
        entry = min(entered or members)
        without = [[t for t in s if t != entry] if i in members else s for i, s in enumerate(successors)]
        out += _order([entry, *sorted(members - {entry})], without)
    return out


def _components(nodes: list[int], successors: list[list[int]]) -> list[list[int]]:
    """Strongly connected components in topological order (Tarjan 1972, without recursion)."""
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[list[int]] = []
    for root in nodes:
        if root in number:
            continue
        work = [(root, iter(successors[root]))]
        number[root] = low[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for t in rest:
                if t not in number:
                    number[t] = low[t] = len(number)
                    stack.append(t)
                    on_stack.add(t)
                    work.append((t, iter(successors[t])))
                    break
                if t in on_stack:
                    low[node] = min(low[node], number[t])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == number[node]:
                    component = []
                    while True:
                        component.append(stack.pop())
                        on_stack.remove(component[-1])
                        if component[-1] == node:
                            break
                    found.append(component)
    return found[::-1]
