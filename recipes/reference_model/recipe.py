"""What defines a run. Two runs with the same Recipe and budget are the same experiment.

The recipe is written into the run's folder, so that an interrupted run goes on with the settings it began with,
and a typing error cannot mix two experiments in one folder.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

HEAD_DIM = 64
LARGEST = 7_000_000


class RecipeError(ValueError):
    """Something the user can correct; the command prints it as one line."""


@dataclass(frozen=True)
class Recipe:
    books: str
    held_out_books: str | None = None
    vocab: int = 3072
    hidden: int = 256
    layers: int = 4
    kv_heads: int = 2
    ff: int = 704
    context: int = 4096
    batch_tokens: int = 16384
    lr: float = 4e-3
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_DIM

    @property
    def parameters(self) -> int:
        """Embedding (tied with the head), then per layer q and o, k and v, the three MLP matrices, two norms."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * HEAD_DIM
        layer = attention + 3 * self.hidden * self.ff + 2 * self.hidden
        return self.vocab * self.hidden + self.layers * layer + self.hidden


def check(recipe: Recipe, allow_large: bool = False) -> None:
    """Raise RecipeError for a shape that cannot be built or that this recipe was not made for."""
    if recipe.hidden % HEAD_DIM or recipe.hidden < 2 * HEAD_DIM:
        raise RecipeError(f"--hidden {recipe.hidden}: use a multiple of {HEAD_DIM}, at least {2 * HEAD_DIM}.")
    if recipe.kv_heads < 1 or recipe.heads % recipe.kv_heads or recipe.heads == recipe.kv_heads:
        # the mimetic start needs two query heads on the first KV head
        raise RecipeError(f"--kv-heads {recipe.kv_heads}: must divide {recipe.heads} query heads and be fewer.")
    if min(recipe.layers, recipe.ff) < 1 or recipe.context < 128 or recipe.batch_tokens < 128:
        raise RecipeError("--layers and --ff must be at least 1, --context and --batch-tokens at least 128.")
    if recipe.vocab < 320:
        raise RecipeError(f"--vocab {recipe.vocab}: 256 bytes and 3 special tokens need some merges; use at least 320.")
    if recipe.parameters > LARGEST and not allow_large:
        raise RecipeError(
            f"{recipe.parameters:,} parameters are more than {LARGEST:,}: use a smaller --hidden, --layers or --ff, "
            "or --allow-large."
        )


def begin(recipe: Recipe, folder: Path) -> None:
    """Write the recipe into a new run's folder; refuse to go on with a run that has another one."""
    path = folder / "recipe.json"
    wanted = dataclasses.asdict(recipe)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted, indent=1) + "\n")
        return
    begun = json.loads(path.read_text())
    other = [f"{k} {begun.get(k)!r} (now {v!r})" for k, v in wanted.items() if begun.get(k) != v]
    if other:
        raise RecipeError(f"{folder} was begun with {', '.join(other)}: use the same settings or another --out.")
