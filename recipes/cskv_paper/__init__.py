"""Ablations: the tables and figures of the CSKV paper (arXiv 2409.10593) in shape, on any model, one file each.

An experiment is a module with TITLE, `run(lab)` (plain values: rows and whatever else it measured), `draw(data)` (a
figure of them) and `say(data)` (sentences that follow from them), and perhaps `table(data)`, one more table.
"""

from types import ModuleType

from kvshrink.errors import SettingError
from recipes.cskv_paper import initialisation, methods, quantisation, split, training, window

EXPERIMENTS: dict[str, ModuleType] = {
    module.__name__.rsplit(".", 1)[1]: module
    for module in (methods, initialisation, window, split, quantisation, training)
}


def chosen(only: tuple[str, ...]) -> dict[str, ModuleType]:
    """The experiments of these names, all for none. Raises SettingError on a name that is not known."""
    if wrong := [name for name in only if name not in EXPERIMENTS]:
        raise SettingError(f"no ablation {wrong[0]!r}. Known: {', '.join(EXPERIMENTS)}.")
    return {name: module for name, module in EXPERIMENTS.items() if not only or name in only}
