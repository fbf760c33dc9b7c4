"""One compressed document, several questions: the cache is copied, not computed again."""

import copy

import torch

import kvshrink
from kvshrink.eval import prompt, tasks

model, tokenizer = kvshrink.reference_model()
sample = tasks.get("longeval").samples(1, seed=0, lines=20, official=False)[0]
document, _ = prompt.encode(sample, tokenizer)
cache = kvshrink.make_cache(model, kvshrink.RTN(bits=4))
with torch.inference_mode():
    model(torch.tensor([document]), past_key_values=cache)
    for line in (2, 9, 17):
        key = sample.context.splitlines()[1 + line].split(":")[0].removeprefix("line ")
        question = f"Tell me what is the REGISTER_CONTENT in line {key}? Answer: <"
        ids = torch.tensor([document + tokenizer(question, add_special_tokens=False)["input_ids"]])
        fork = copy.deepcopy(cache)
        out = model.generate(ids, past_key_values=fork, max_new_tokens=6, do_sample=False)
        print(key, tokenizer.decode(out[0, ids.shape[1] :]))
