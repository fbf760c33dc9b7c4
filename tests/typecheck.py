"""The checker of annotations in tests: beartype, with an int accepted where a float is asked for, as Python does.

Of a mapping of tensors the kind alone is checked: stored records are one, and looking at an item would read it at each
call.
"""

from collections.abc import Mapping

from beartype import BeartypeConf, FrozenDict, beartype
from torch import Tensor

overrides = FrozenDict({Mapping[str, Tensor]: Mapping})
checked = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=overrides))
