"""Variable tracking (RULER): VAR A = 12345, VAR B = VAR A, ... Which variables hold a value, what does one hold?"""

import string

from recipes.reference_model.tasks.world import ANSWER, PROMPT, RECORD, Example, World


def variables(
    world: World, size: int, chains: int | None = None, hops: int | None = None, noise: bool | None = None
) -> Example:
    """`chains` values, each handed on over `hops` assignments, in shuffled order; noise: book text in between."""
    ex = Example()
    hops = world.rng.randint(1, 4) if hops is None else hops
    chain_cost = (hops + 1) * 10 + 26 * (hops + 1)
    chains = chains or max(1, min(24, int(size * world.rng.uniform(0.3, 1.0) / chain_cost)))
    groups = _names(world, chains, hops + 1)
    values = [world.digits(5) for _ in range(chains)]
    statements = _statements(world, groups, values)
    room = max(0, size - chains * chain_cost)
    if (world.rng.random() < 0.5 if noise is None else noise) and room > 40:
        ex.segments += world.scatter([s + "." for s in statements], room)
    else:
        ex.add("\n".join(statements) + "\n", RECORD)
    for i in world.rng.sample(range(chains), chains):
        _ask(world, ex, groups[i], values[i])
    return ex


def _names(world: World, chains: int, per_chain: int) -> list[list[str]]:
    names: dict[str, None] = {}
    while len(names) < chains * per_chain:
        names["".join(world.rng.choice(string.ascii_uppercase) for _ in range(3))] = None
    pool = list(names)
    return [pool[i * per_chain : (i + 1) * per_chain] for i in range(chains)]


def _statements(world: World, groups: list[list[str]], values: list[str]) -> list[str]:
    """Assignments of all chains in random order; within a chain a variable is set before it is used."""
    slots = [i for i, group in enumerate(groups) for _ in group]
    world.rng.shuffle(slots)
    at = [0] * len(groups)
    statements = []
    for i in slots:
        source = f"VAR {groups[i][at[i] - 1]}" if at[i] else values[i]
        statements.append(f"VAR {groups[i][at[i]]} = {source}")
        at[i] += 1
    return statements


def _ask(world: World, ex: Example, group: list[str], value: str) -> None:
    j = world.rng.randrange(len(group))
    if world.rng.random() < 0.5:
        ex.add(f"Question: What is the value of VAR {group[j]}? Answer: ", PROMPT)
        ex.add(value, ANSWER)
    else:
        ex.add(f"Question: Find all variables that are assigned the value {value}. Answer:", PROMPT)
        for k, name in enumerate(group):
            ex.add(", VAR" if k else " VAR", PROMPT)
            ex.add(f" {name}", ANSWER)
    ex.add(".\n", PROMPT)
