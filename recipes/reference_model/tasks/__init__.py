"""Generated documents whose answers are in the text, used to train and to measure.

Which kinds a training document is drawn from moves with progress: first almost only associations, so that induction
heads form; then every kind; towards the end mostly long records, which is what the model is measured on.
"""

from collections.abc import Callable

from recipes.reference_model.tasks.assignments import variables
from recipes.reference_model.tasks.lookup import assoc, jsonkv
from recipes.reference_model.tasks.needles import haystack, multivalue, needles, passkey
from recipes.reference_model.tasks.registers import lines
from recipes.reference_model.tasks.texts import book, copy
from recipes.reference_model.tasks.world import Example, World

TASKS: dict[str, Callable[[World, int], Example]] = {
    "lines": lines,
    "passkey": passkey,
    "needles": needles,
    "multivalue": multivalue,
    "haystack": haystack,
    "variables": variables,
    "copy": copy,
    "jsonkv": jsonkv,
    "assoc": assoc,
    "book": book,
}

# per cent of the documents: in the bootstrap, right after it, and from the middle of training on
BOOT_END = 0.08
BOOT = {"assoc": 55, "lines": 10, "jsonkv": 12, "copy": 12, "book": 11}
EARLY = {
    "assoc": 26,
    "lines": 22,
    "copy": 8,
    "jsonkv": 12,
    "haystack": 10,
    "needles": 5,
    "passkey": 1,
    "variables": 5,
    "multivalue": 2,
    "book": 14,
}
LATE = {
    "assoc": 5,
    "lines": 42,
    "copy": 2,
    "jsonkv": 8,
    "haystack": 14,
    "needles": 12,
    "passkey": 4,
    "variables": 3,
    "multivalue": 2,
    "book": 8,
}


def mixture(progress: float) -> dict[str, float]:
    """Weight of each task at a progress from 0 to 1."""
    if progress < BOOT_END:
        return BOOT
    t = min(1.0, progress / 0.5)
    return {k: (1 - t) * EARLY[k] + t * LATE[k] for k in EARLY}


def sample(world: World, size: int, progress: float) -> Example:
    """One training document of about `size` tokens."""
    mix = mixture(progress)
    name = world.rng.choices(list(mix), weights=list(mix.values()))[0]
    if name == "assoc" and progress < BOOT_END:
        return assoc(world, size, most=3 + int(12 * progress / BOOT_END))
    return TASKS[name](world, size)
