"""GraphWalks-like: a list of the edges of a directed graph, and a set of nodes that follows from it.

Source: openai/graphwalks (nodes of 10 hex digits, "a -> b" lines, the operations BFS and parents, set F1). The prompt
is in own words, because the official text could not be verified against its source: do not compare with its scores.

  bfs      the nodes whose shortest path from a node has `hops` edges
  parents  the nodes with an edge to a node

Every node has two edges out, to two others. One edge that the answer needs (of BFS: the first of the start's; of
parents: one to the node) is at the sample's depth; the rest are anywhere.
"""

from random import Random

from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Count, Sample
from kvshrink.eval.tasks._common import check_count, check_known, depth, fill, rng

VARIANTS: dict[str, dict] = {"bfs": {"operation": "bfs"}, "parents": {"operation": "parents"}}
OPERATIONS = ("bfs", "parents")
OUT = 2  # edges out of a node
TOKENS_A_NODE = 13  # 10 hex digits, one token each, and what is between two nodes
TOKENS_OF_FORM = 20  # "Final Answer: []" and a few words
INTRO = (
    "You are given a directed graph as a list of edges, one on each line; 'a -> b' is an edge from a to b. "
    "Carry out the operation that follows the list, and end with a line of this form: Final Answer: [node, node]\n"
    "Operations:\n"
    "BFS from node a with depth d: all nodes whose shortest path from a has exactly d edges.\n"
    "Parents of node a: all nodes that have an edge to a.\n\n"
    "Example\nEdges:\naa11 -> bb22\nbb22 -> cc33\naa11 -> dd44\ndd44 -> cc33\n"
    "Operation: BFS from node aa11 with depth 1.\nFinal Answer: [bb22, dd44]\n"
    "Operation: Parents of node cc33.\nFinal Answer: [bb22, dd44]\n\n"
    "The graph\nEdges:\n"
)
Edge = tuple[str, str]


def samples(
    n: int, seed: int, *, tokens: int = 4000, count: Count, operation: str = "bfs", hops: int = 2
) -> list[Sample]:
    """n graphs of as many nodes as fit into `tokens`. hops: depth of the BFS, 1 to 4; of no effect on parents."""
    check_count("graphwalks", n)
    check_known("graphwalks", "operation", operation, OPERATIONS)
    if not 1 <= hops <= 4:
        raise EvalError(f"graphwalks: hops={hops}. Use 1 to 4: an answer has up to {OUT}**hops nodes.")
    return [_sample(seed, i, operation, hops, tokens, count) for i in range(n)]


def bfs(edges: list[Edge], start: str, hops: int) -> set[str]:
    """The nodes whose shortest path from `start` has exactly `hops` edges."""
    seen = level = {start}
    for _ in range(hops):
        level = {b for a, b in edges if a in level} - seen
        seen = seen | level
    return level


def parents(edges: list[Edge], node: str) -> set[str]:
    """The nodes with an edge to `node`."""
    return {a for a, b in edges if b == node}


def _sample(seed: int, index: int, operation: str, hops: int, tokens: int, count: Count) -> Sample:
    def make(size: int) -> list[Sample]:
        random = rng("graphwalks", seed, index)
        edges = _graph(random, size)
        if operation == "bfs":
            # a start without a node that far is rare, and drawn again
            node = next(a for a in _shuffled(random, {a for a, _ in edges}) if bfs(edges, a, hops))
            answer, asked = bfs(edges, node, hops), f"BFS from node {node} with depth {hops}."
            first = next(i for i, (a, _) in enumerate(edges) if a == node)
        else:
            node = random.choice(edges)[1]
            answer, asked = parents(edges, node), f"Parents of node {node}."
            first = next(i for i, (_, b) in enumerate(edges) if b == node)
        at = round(depth(index) * (len(edges) - 1))
        turn = (first - at) % len(edges)
        meta = {"index": index, "depth": at / (len(edges) - 1), "nodes": size, "node": node}
        context = INTRO + "".join(f"{a} -> {b}\n" for a, b in edges[turn:] + edges[:turn]) + "\n"
        limit = TOKENS_OF_FORM + TOKENS_A_NODE * len(answer)
        return [Sample(context, f"Operation: {asked}\n", "", tuple(sorted(answer)), "set_f1", limit, meta)]

    return fill("graphwalks", make, 2 ** (hops + 1), tokens, "nodes", tokens, count)[0]


def _graph(random: Random, nodes: int) -> list[Edge]:
    names = [f"{code:010x}" for code in random.sample(range(16**10), nodes)]
    # one more than needed, because a node may draw itself
    drawn = [(a, [b for b in random.sample(names, OUT + 1) if b != a]) for a in names]
    edges = [(a, b) for a, others in drawn for b in others[:OUT]]
    return random.sample(edges, len(edges))


def _shuffled(random: Random, items: set[str]) -> list[str]:
    return random.sample(sorted(items), len(items))
