"""Fit CSKV on the bundled model and generate over the shrunken cache."""

import torch

import kvshrink
from kvshrink import data

model, tokenizer = kvshrink.reference_model()
text = data.path("calibration.txt").read_text(encoding="utf-8")[:60_000]
artifact = kvshrink.fit(model, kvshrink.CSKV(keep=0.2, bits=4), text, tokenizer=tokenizer, batch=4)

prompt = "<|bos|>" + data.path("heldout.txt").read_text(encoding="utf-8")[:6000]
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
cache = kvshrink.make_cache(model, artifact)
with torch.inference_mode():
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(out[0, inputs.input_ids.shape[1] :]))
print(cache.report())
