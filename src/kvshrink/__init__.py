"""kvshrink: shrink the KV cache of a causal language model, in real bytes, and decode over the shrunken form.

Read the tree in the order the data takes; each line may import only from the lines below it:

    cli/         one module per command: demo, plan, fit, generate, eval (suite, ...), report, inspect, lm-eval
    serve/       pages as records, a store of prefixes on disk, the connector of vLLM
    plan/        search of methods and settings for a budget of bytes or KL: space, bench, search, plan.json
    eval/        run/, tasks/, metrics/, report/: suite, perplexity, fidelity, lm-eval plug-in, figures
    fit/         statistics (streamed moments), layer-by-layer run, key/value split, training and its guard
    attach/      model -> attention hook: attention function, mask function, families, self-check, byte budget
    cache/       KVCache and its layers [sinks | body | window]; attend.py merges segments by log-sum-exp
    methods/     one paper, one small file: lowrank/ quant/ evict/; _roles.py, _policy.py: the roles; artifact.py
    store/       where the bytes live: pages, token table, byte counts, files, logs
    kernels/     <op>/reference.py defines the op in plain torch
    reference/   the bundled model; data/: bundled text and test cases; identity.py, shapes.py, called.py, errors.py,
                 half_linear.py

    model, tokenizer = kvshrink.reference_model()
    artifact = kvshrink.fit(model, kvshrink.CSKV(keep=0.2, bits=4), text, tokenizer=tokenizer)
    cache = kvshrink.make_cache(model, artifact)
    model.generate(**inputs, past_key_values=cache)
    print(cache.report())
"""

from typing import TYPE_CHECKING

from kvshrink.attach import attached, detach, make_cache
from kvshrink.cache import KVCache
from kvshrink.errors import KVShrinkError
from kvshrink.methods.artifact import Artifact
from kvshrink.methods.lowrank.cskv import CSKV
from kvshrink.methods.lowrank.spectral import Spectral
from kvshrink.methods.quant.exact import Full
from kvshrink.methods.quant.rtn import RTN
from kvshrink.reference import reference_model

if TYPE_CHECKING:
    from kvshrink.attach import attach
    from kvshrink.fit import fit
else:  # packages that can be called (called.py), so that `import kvshrink.fit.probe as probe` finds the package
    import kvshrink.attach as attach
    import kvshrink.fit as fit

__all__ = [
    "CSKV",
    "RTN",
    "Artifact",
    "Full",
    "KVCache",
    "KVShrinkError",
    "Spectral",
    "attach",
    "attached",
    "detach",
    "fit",
    "make_cache",
    "reference_model",
]
