"""Samples to token ids: context and question apart, so that the context can be compressed first."""

from collections.abc import Sequence

from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Count, Sample

SPACE = "\u2581"  # how SentencePiece writes a space
ALL_OF = ("string_match_all", "set_f1")  # metrics whose answer is all references together
MARK = "\u241e"  # stands for the border between context and question while a chat template is applied


def encode(sample: Sample, tokenizer) -> tuple[list[int], list[int]]:
    """(context ids, question ids). A chat template is applied if the tokenizer has one, else bos is put in front."""
    context, turns = encode_turns([sample], tokenizer)
    return context, turns[0][0]


def encode_turns(samples: Sequence[Sample], tokenizer) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """(context ids, [(question ids, ids of the reference answer)]) of one conversation about one context.

    The questions are the samples', in order; each stands after the reference answers of those before it.
    """
    bos = []
    # some benchmarks run some of their tasks without a template (LongBench's few-shot ones)
    if getattr(tokenizer, "chat_template", None) and samples[0].meta.get("chat", True):
        texts = _templated(samples, tokenizer)
    else:
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        # a new line ends an answer
        ends = ["", *("\n" for _ in samples[1:])]
        questions = [f"{end}{s.question}{s.answer_prefix}" for end, s in zip(ends, samples, strict=True)]
        texts = samples[0].context, [(q, reference_answer(s)) for q, s in zip(questions, samples, strict=True)]

    turns = [(_ids(tokenizer, question), _ids(tokenizer, answer)) for question, answer in texts[1]]
    return bos + tokenizer(texts[0], add_special_tokens=False)["input_ids"], turns


def _ids(tokenizer, text: str) -> list[int]:
    """Ids of a text that follows another one."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids or not hasattr(tokenizer, "convert_ids_to_tokens"):
        return ids
    if not text.startswith(" ") and str(tokenizer.convert_ids_to_tokens(ids[0])).startswith(SPACE):
        # SentencePiece puts a space before whatever it is given; behind a line break it has put it there already
        before = tokenizer("\n", add_special_tokens=False)["input_ids"]
        return tokenizer(f"\n{text}", add_special_tokens=False)["input_ids"][len(before) :]
    return ids


def reference_answer(sample: Sample) -> str:
    """The answer as it stands after the prefix: all references where the metric wants all, else the first."""
    answer = ", ".join(sample.answers if sample.metric in ALL_OF else sample.answers[:1])
    return f" {answer}" if sample.answer_prefix[-1:].isalnum() or sample.answer_prefix.endswith(":") else answer


def counter(tokenizer) -> Count:
    """Tokens of a text, without special ones."""
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def overhead(tokenizer) -> int:
    """Tokens that the chat template puts around a prompt."""
    if not getattr(tokenizer, "chat_template", None):
        return 0
    context, question = encode(Sample("a", "b", "", (), "", 0, {}), tokenizer)
    return len(context) + len(question) - 2


def _templated(samples: Sequence[Sample], tokenizer) -> tuple[str, list[tuple[str, str]]]:
    """(text before the first question, [(question text, answer text)]) of the templated conversation."""
    messages, done, context, turns = [], "", "", []
    for i, sample in enumerate(samples):
        shown = f"{sample.context}{MARK}{sample.question}" if i == 0 else sample.question
        messages.append({"role": "user", "content": shown})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if text.count(MARK) != 1:
            raise EvalError("the tokenizer's chat template changes the user's text. Use a tokenizer without one.")
        before, after = text.split(MARK)
        if i == 0:
            context = before
        elif not after.startswith(done):
            raise EvalError("the chat template changes earlier turns. Use mode agnostic, or a tokenizer without one.")
        answer = reference_answer(sample)
        turns.append((after.removeprefix(done) + sample.answer_prefix, answer))
        done = after + sample.answer_prefix + answer
        messages.append({"role": "assistant", "content": sample.answer_prefix + answer})
    return context, turns
