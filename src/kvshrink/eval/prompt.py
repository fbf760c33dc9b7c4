"""A sample's text to token ids: context and question apart, so that the context can be compressed first."""

from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Sample

MARK = "\u241e"  # stands for the border between context and question while a chat template is applied


def encode(sample: Sample, tokenizer) -> tuple[list[int], list[int]]:
    """(context ids, question ids). A chat template is applied if the tokenizer has one, else bos is put in front."""
    before, after, bos = sample.context, sample.question + sample.answer_prefix, []
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": f"{sample.context}{MARK}{sample.question}"}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        if text.count(MARK) != 1:
            raise EvalError("the tokenizer's chat template changes the user's text. Use a tokenizer without one.")
        before, after = text.split(MARK)
        after += sample.answer_prefix
    elif tokenizer.bos_token_id is not None:
        bos = [tokenizer.bos_token_id]
    context = bos + tokenizer(before, add_special_tokens=False)["input_ids"]
    return context, tokenizer(after, add_special_tokens=False)["input_ids"]
