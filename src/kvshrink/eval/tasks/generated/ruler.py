"""RULER: retrieval, tracing, counting and question answering at any length.

Source: arXiv 2404.06654, in the wording of github.com/NVIDIA/RULER@c3f5e3b4; scored by its string match.
The context ends where the haystack ends; question and answer prefix follow, as kvpress splits it. Together they are
the official prompt, character by character.

Differs from upstream:
  essays    Paul Graham's are not free to ship. The essay tasks hide their needles in the bundled held-out book, and a
            report names them so: niah_single_2[books]. With path= it is that file's name.
  lengths   each sample has as many lines, words or documents as fit, instead of all the number found for the first.
  draws     every sample has its own random source, so it does not depend on those before it.
cwe has the words of wonderwords only. qa_1 and qa_2 read a local file. The modules _ruler_*.py have the rest.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Count, Sample, _book, _ruler_cwe, _ruler_fwe, _ruler_niah, _ruler_qa, _ruler_vt
from kvshrink.eval.tasks._common import check_count, check_known, fill, rng
from kvshrink.eval.tasks._ruler_draft import Draft

NIAH, QA = _ruler_niah.TASKS, _ruler_qa.TASKS
ESSAYS = [task for task, kind in NIAH.items() if kind.haystack == "essay"]
TASKS = [*NIAH, "vt", "cwe", "fwe", *QA]
VARIANTS = {f"{task}[books]" if task in ESSAYS else task: {"task": task} for task in TASKS if task not in QA}


def samples(
    n: int,
    seed: int,
    *,
    task: str = "niah_single_1",
    tokens: int = 4096,
    count: Count,
    path: str | Path | None = None,
) -> list[Sample]:
    """n samples of one task, each filling `tokens` tokens with bos and answer.

    path: a text file to hide needles in instead of the bundled book (essay tasks), or the data of qa_1 and qa_2.

    Raises EvalError for an unknown task, a file that cannot be used, or `tokens` that are too few or too many.
    """
    check_count("ruler", n)
    check_known("ruler", "task", task, TASKS)
    if path is not None and task not in [*ESSAYS, *QA]:
        raise EvalError(f"ruler {task}: reads no file, got path={path}. Drop path= or use {', '.join([*ESSAYS, *QA])}.")
    name = f"{task}[{'books' if path is None else Path(path).name}]" if task in ESSAYS else task
    draft = _drafts(n, task, tokens, count, path)
    return [_fit(name, i, draft(i, rng(f"ruler/{task}", seed, i)), tokens, count) for i in range(n)]


def _drafts(n: int, task: str, tokens: int, count: Count, path: str | Path | None) -> Callable[[int, Random], Draft]:
    """What drafts sample i from its random source. Files are read here, once."""
    if task in NIAH:
        essay = _book.words(path) if task in ESSAYS else ()
        if task in ESSAYS and not essay:
            raise EvalError(f"ruler {task}: {path} has no words. Give a text file as path=.")
        return lambda i, random: _ruler_niah.draft(NIAH[task], essay, random, tokens)
    if task in QA:
        questions, documents = _ruler_qa.load(task, path)
        if n > len(questions):
            raise EvalError(f"ruler {task}: {n} samples asked, {path} has {len(questions)}. Ask for at most as many.")
        return lambda i, random: _ruler_qa.draft(questions[i], documents, random, tokens)
    module = {"vt": _ruler_vt, "cwe": _ruler_cwe, "fwe": _ruler_fwe}[task]
    return lambda i, random: module.draft(random, tokens, count)


def _fit(name: str, index: int, draft: Draft, tokens: int, count: Count) -> Sample:
    (sample,) = fill(f"ruler {name}", lambda n: [draft.make(n)], draft.low, draft.high, draft.units, tokens, count)
    return replace(sample, meta={"index": index, "task": name, **sample.meta})
