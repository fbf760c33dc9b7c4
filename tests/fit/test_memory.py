"""A model larger than memory can be fitted: weights come from disk one layer at a time."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = """
import json, re, sys, torch
torch.set_num_threads(1)
import kvshrink
from kvshrink import CSKV
rows = torch.randint(0, 4000, (8, 64), generator=torch.Generator().manual_seed(0))
# not getrusage: a child's ru_maxrss starts at its parent's
status = lambda name: 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
kvshrink.fit(sys.argv[1], CSKV(keep=0.2, bits=4), rows, progress=False)  # a tiny model: the libraries' own memory
before, high = status("VmRSS"), status("VmHWM")
kvshrink.fit(sys.argv[2], CSKV(keep=0.2, bits=4), rows, progress=False)
print(json.dumps({"peak": status("VmHWM") - before, "earlier": high - before}))
"""


def _saved(folder, hidden, layers):
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=4000,
        tie_word_embeddings=True,
    )
    net = LlamaForCausalLM(config)
    net.save_pretrained(folder, max_shard_size="80MB")
    return net


@pytest.mark.slow
def test_peak_memory_is_two_layers_embeddings_hidden_states_and_statistics(tmp_path, capsys):
    torch.manual_seed(0)
    _saved(tmp_path / "tiny", 32, 2)
    net = _saved(tmp_path / "model", 1024, 10)
    layer = sum(p.nbytes for p in net.model.layers[0].parameters())
    embeddings = net.model.embed_tokens.weight.nbytes
    whole = sum(p.nbytes for p in net.parameters())
    del net
    hidden = 8 * 64 * 1024 * 4
    n = 2 * 128
    statistics = 2 * n * n * 8 * 2
    command = [sys.executable, "-c", SCRIPT, *(str(tmp_path / n) for n in ("tiny", "model"))]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(out.stdout.splitlines()[-1])
    peak = measured["peak"]
    assert peak > layer > measured["earlier"], "the high-water mark must be the fit's own"
    limit = 2 * layer + embeddings + hidden + statistics
    with capsys.disabled():
        mib = [round(x / 2**20, 1) for x in (peak, limit, layer, whole)]
        print(f"\nfit from disk: peak {mib[0]} MiB above baseline, limit {mib[1]} (layer {mib[2]}, model {mib[3]})")
    assert peak < limit
    assert whole > 2 * limit, "the test would pass with the whole model in memory"
