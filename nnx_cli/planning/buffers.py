"""What compiled code holds of memory while it runs: the buffers that its kernels hand to each other.

A chain of pointwise operations is one kernel, whose intermediate results never exist. The rules here are those of
torch's compiler, Inductor: which results are written, which kernels become one, in which order they run, and which
buffers are used again. What is read or made by functions that are not its own (products, attention) always exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

ATEN = torch.ops.aten
PRODUCTS = (ATEN.mm.default, ATEN.bmm.default, ATEN.addmm.default, ATEN.baddbmm.default)
SHARED_READS, MOST_READS, MOST_OPERATIONS = 4, 8, 30  # before a result is written: torch/_inductor/config.py, realize_*

Workspaces = Mapping[Any, Callable[..., int]]


@dataclass(eq=False)
class Kernel:
    """A kernel: the storages it reads, the tensors it makes, by storage, and bytes that it holds while it runs.

    `size` is how many numbers it runs over, None where its code is not the compiler's; `sums` whether it sums rows of
    them, columns, or neither. Storages of `last` are free afterwards, those of `overwritten` become its results.
    """

    reads: set[int]
    makes: dict[int, Tensor]
    size: int | None
    sums: str = ""
    workspace: int = 0
    last: set[int] = field(default_factory=set)
    overwritten: set[int] = field(default_factory=set)


@dataclass
class Formula:
    """A result that no kernel has written: the storages, and the operations and constants that it is computed from. The
    number beside each tells parts of one tensor apart."""

    result: Tensor
    reads: set[tuple[int, int]]
    operations: set[tuple[Node | float, int]]


def storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def tensors(node: Node) -> Iterator[Tensor]:
    """What a node of a graph returns, as far as it is tensors."""
    value = node.meta.get("val")
    return (x for x in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(x, Tensor))


def is_own(func: Any) -> bool:
    """Whether the compiler writes the code of an operator itself."""
    from torch._inductor.lowering import fallbacks, lowerings

    return func in lowerings and func not in fallbacks and func not in PRODUCTS


def kernels_of(graph: Graph, workspaces: Workspaces) -> list[Kernel]:
    """The kernels that a graph becomes, in the order in which they run."""
    results = {storage_of(x) for node in graph.output_node().all_input_nodes for x in tensors(node)}
    sizes = {storage_of(x): x.untyped_storage().nbytes() for node in graph.nodes for x in tensors(node)}
    kept = [x for node in graph.find_nodes(op="placeholder") if node.name.startswith("primals") for x in tensors(node)]
    kernels = fused(lowered(graph, workspaces, results), results)
    later = set(results)
    for kernel in reversed(kernels):
        kernel.last = (kernel.reads | kernel.makes.keys()) - later
        later |= kernel.last
    reuse(kernels, sizes | {storage_of(x): 0 for x in kept})
    return kernels


def lowered(graph: Graph, workspaces: Workspaces, results: set[int]) -> list[Kernel]:
    """A kernel for every result that is written, before any become one."""
    kernels: list[Kernel] = []
    formulas: dict[int, Formula] = {}
    known: set[int] = set()

    def write(storage: int) -> None:
        if formula := formulas.pop(storage, None):
            reads = {read for read, _ in formula.reads}
            kernels.append(Kernel(reads, {storage: formula.result}, formula.result.numel()))

    for node in graph.nodes:
        made = {storage_of(x): x for x in tensors(node) if storage_of(x) not in known}  # none for a view
        known |= made.keys()
        if node.op == "call_function" and made:
            given = [x for n in node.all_input_nodes for x in tensors(n)]
            own = is_own(node.target)
            for x in given if not own else ():
                write(storage_of(x))
            constants = {(x, 0) for x in node.args if type(x) in (int, float)}
            reads, operations = set(), {(node, 0)} | constants
            for x in given:
                part = int(x.storage_offset())
                formula = formulas.get(storage_of(x)) or Formula(x, {(storage_of(x), 0)}, set())
                reads |= {(read, other + part) for read, other in formula.reads}
                operations |= {(n, other + part) for n, other in formula.operations}
            if own and torch.Tag.reduction not in node.target.tags:
                formulas |= {storage: Formula(x, reads, operations) for storage, x in made.items()}
            else:
                arguments = torch.fx.map_arg(node.args, lambda n: n.meta["val"])
                workspace = workspaces[node.target](*arguments) if not own and node.target in workspaces else 0
                size = max(x.numel() for x in given) if own else None
                sums = "rows" if own else ""
                if own and given[0].dim() > 1 and next(iter(made.values())).shape[-1:] == given[0].shape[-1:]:
                    sums = "columns"
                kernels.append(Kernel({read for read, _ in reads}, made, size, sums, workspace))
        for x in tensors(node):
            if formula := formulas.get(storage_of(x)):
                n_reads = len(formula.reads)
                long = n_reads + len(formula.operations) > MOST_OPERATIONS
                shared = len(node.users) > 1 and (n_reads > SHARED_READS or long)
                if shared or n_reads > MOST_READS or (n_reads > 1 and long) or storage_of(x) in results:
                    write(storage_of(x))
    return kernels


def makers(kernel: Kernel, kernels: list[Kernel]) -> list[Kernel]:
    """Those that make what a kernel reads."""
    return [other for other in kernels if other is not kernel and not kernel.reads.isdisjoint(other.makes)]


def circle(kernel: Kernel, other: Kernel, kernels: list[Kernel]) -> bool:
    """Whether one of two needs what a third makes that needs the other."""
    for a, b in ((kernel, other), (other, kernel)):
        needed = [x for x in makers(a, kernels) if x is not b]
        for x in needed:  # grows
            needed += [maker for maker in makers(x, kernels) if maker not in needed]
        if b in needed:
            return True
    return False


def merge(kernels: list[Kernel], pairs: set[tuple[str, str]]) -> list[Kernel]:
    """Kernels over as many numbers that read the same, or each other's results, become one, where their sums are one of
    `pairs`. It comes where the first of them did."""
    found: list[Kernel] = []
    for place, kernel in enumerate(kernels):
        for other in found if kernel.size else ():
            meet = kernel.reads & (other.reads | other.makes.keys())
            fit = kernel.size == other.size and (kernel.sums, other.sums) in pairs
            if meet and fit and not circle(kernel, other, found + kernels[place:]):
                other.sums = "rows" if "rows" in (kernel.sums, other.sums) else other.sums
                other.makes |= kernel.makes
                other.reads = (other.reads | kernel.reads) - other.makes.keys()
                break
        else:
            found.append(kernel)
    return found


def fused(kernels: list[Kernel], results: set[int]) -> list[Kernel]:
    """Kernels as they become one, each behind what it needs. What no other reads of their results is not written."""
    kernels = merge(kernels, {("", ""), ("rows", "rows"), ("columns", "columns"), ("", "rows"), ("rows", "")})
    read = results.union(*(kernel.reads for kernel in kernels))
    for kernel in kernels:
        if kernel.size is not None:
            kernel.makes = {storage: x for storage, x in kernel.makes.items() if storage in read}
    kernels = merge(kernels, {("rows", "columns"), ("columns", "rows")})
    order: list[Kernel] = []

    def visit(kernel: Kernel) -> None:
        if kernel not in order:
            for maker in makers(kernel, kernels):
                visit(maker)
            order.append(kernel)

    for kernel in kernels:
        visit(kernel)
    return order


def reuse(kernels: list[Kernel], sizes: Mapping[int, int]) -> None:
    """Keep buffers that kernels have made for later ones of the same size, where that does not raise the peak."""
    made = [sum(sizes[x] for x in kernel.makes) for kernel in kernels]
    freed = [sum(sizes[x] for x in kernel.last) for kernel in kernels]
    before = accumulate((a - b for a, b in zip(made, freed, strict=True)), initial=0)
    level = [a + b for a, b in zip(before, made, strict=False)]
    most = max(level, default=0)
    kinds: dict[int, tuple[int, torch.dtype]] = {}
    free: list[tuple[int, int]] = []  # buffers, and the kernel that used each last
    for place, kernel in enumerate(kernels):
        buffers = kernel.makes if kernel.size is not None or len(kernel.makes) == 1 else {}
        kinds |= {storage: (sizes[storage], x.dtype) for storage, x in buffers.items()}
        for storage in buffers:
            for old, since in reversed(free):
                between = range(since + 1, place)
                if kinds[old] == kinds[storage] and all(level[i] + sizes[old] <= most for i in between):
                    for i in between:
                        level[i] += sizes[old]
                    kernels[since].last.remove(old)
                    kernel.overwritten.add(old)
                    free.remove((old, since))
                    break
        free += [(storage, place) for storage in kernel.last if storage in kinds]


def imitation(graph: GraphModule, workspaces: Workspaces, count: Callable[..., None]) -> Callable[..., Any]:
    """A function that makes and frees tensors as the compiled graph does, and computes nothing."""
    kernels = kernels_of(graph.graph, workspaces)
    inputs = graph.graph.find_nodes(op="placeholder")
    results = graph.graph.output_node().args[0]

    def run(arguments: list[Any]) -> list[Any]:
        held: dict[int, list[Tensor]] = {}
        returned = {node: x for node, x in zip(inputs, arguments, strict=True) if node in results}
        for node in inputs:
            x = arguments.pop(0)
            for told in tensors(node):
                held.setdefault(storage_of(told), []).append(x)
        del x
        for kernel in kernels:
            for storage in kernel.overwritten:
                held.pop(storage)
            for storage, x in kernel.makes.items():
                held[storage] = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)]
            count([held[storage][0] for storage in kernel.makes], kernel.workspace)
            for storage in kernel.last:
                held.pop(storage)
        for node in results:
            if isinstance(node, Node) and node not in returned:
                returned[node] = x = node.meta["val"]
                if isinstance(x, Tensor):
                    returned[node] = held[storage_of(x)][0].as_strided(x.shape, x.stride(), x.storage_offset())
        return [returned[x] if isinstance(x, Node) else x for x in results]

    run._boxed_call = True  # it empties its list of arguments
    return run


def compile_imitations(blocks: nn.ModuleList, workspaces: Workspaces, count: Callable[..., None]) -> None:
    """Compile blocks as `compile_blocks` does, to code that only takes the memory that theirs would take. `count` is
    told the tensors that a kernel makes, and its workspace."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def compiler(graph: GraphModule, inputs: Any) -> Callable[..., Any]:
        return imitation(graph, workspaces, count)

    backend = aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
