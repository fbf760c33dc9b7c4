"""Your own questions as an evaluation: two methods at a tenth of the bytes, scored beside the full cache."""

import kvshrink
from kvshrink import data, methods
from kvshrink.eval import Entry, Job, Runner, at_byte_ratio, cells, prompt, summarise, tasks

model, tokenizer = kvshrink.reference_model()
samples = tasks.get("passkey").samples(4, seed=0, tokens=2000, count=prompt.counter(tokenizer))
# or your own: tasks.Sample(context, question, answer_prefix, answers, metric, max_new_tokens, meta)

cskv = at_byte_ratio(kvshrink.CSKV(bits=4), 0.1, model, tokens=2000).method
window = at_byte_ratio(methods.build("streaming_llm", {}), 0.1, model, tokens=2000).method
text = data.path("calibration.txt").read_text(encoding="utf-8")[:60_000]
artifact = kvshrink.fit(model, cskv, text, tokenizer=tokenizer, batch=4)

entries = [Entry("full", None), Entry("cskv", artifact), Entry("window", window)]
for line in summarise(Runner(model, tokenizer, entries).run(Job("passkey"), samples)):
    print(*cells(line), sep="  ")
