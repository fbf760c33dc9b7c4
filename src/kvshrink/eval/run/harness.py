"""Model `kvshrink` of lm-evaluation-harness (lm-eval 0.4.13): its tasks, scored through the compressed cache.

lm-eval's own `hf` model scores a continuation in one exact pass over context and continuation. Compression after the
prefill would never be read and every method would equal the full cache. Here the context, without its last token, is
prefilled and compressed first; then the continuation is fed, `chunk` tokens a step, and every prediction reads the
cache as it is held. A rolling text (perplexity) starts from an empty cache, so nothing is scored by an exact prefill.

Departures from `hf`: log-probabilities are float32 in any model dtype (a bfloat16 baseline needs softmax_dtype=float32:
`hf` adds up in bfloat16); a task's max_gen_toks is kept where the model's generation_config has a max_new_tokens;
batch size 1; one process; no --use_cache.
lm-eval gives context and question as one string, so the question is in view while compressing (`query_aware`).
"""

import copy
import logging
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from tqdm import tqdm

from kvshrink.attach import make_cache
from kvshrink.attach.factory import digest_of
from kvshrink.cache import KVCache
from kvshrink.errors import EvalError, KVShrinkError, SettingError
from kvshrink.eval.run import calibration
from kvshrink.eval.run.harness_method import method_of
from kvshrink.eval.run.harness_usage import Usage, describe
from kvshrink.eval.run.teacher import compressed_tokens
from kvshrink.fit import fit
from kvshrink.methods import name_of
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact
from kvshrink.reference import FOLDER
from kvshrink.store.reason import line

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise EvalError(f"lm-eval cannot be used ({error}). Run: pip install 'kvshrink[lm-eval]'") from error

logger = logging.getLogger(__name__)


@register_model("kvshrink")
class KVShrinkLM(HFLM):
    """`hf` with a compressed cache. What is not listed here (dtype, max_length, revision, ...) is as for `hf`.

    pretrained: folder, hub id, "reference" (bundled), or a loaded model (then give tokenizer=).
    method:     name, with settings as "cskv:keep=0.2;bits=4" (a comma would end the argument), or a Method or Artifact.
    keep, bits: settings that `method` does not name. artifact: folder or hub id of a fitted method, instead of these.
    text:       file to fit a method on that needs it (default: the bundled calibration text).
    chunk:      tokens scored a step. Those of one chunk see each other exactly, so more is faster and less strict.
    """

    def __init__(
        self,
        pretrained: Any,
        method: str | Method | Artifact | None = None,
        artifact: str | None = None,
        keep: float | None = None,
        bits: int | None = None,
        text: str | None = None,
        chunk: int = 1,
        batch_size: int | str = 1,
        device: str | None = None,
        **kwargs,
    ) -> None:
        if str(batch_size) != "1":
            raise EvalError(f"batch_size={batch_size}: one sequence is scored at a time. Leave --batch_size out.")
        if type(chunk) is not int or chunk < 1:
            raise EvalError(f"chunk={chunk!r} is not possible. Use a whole number of at least 1.")
        if kwargs.get("mixed_precision_dtype") is not None:
            raise EvalError("mixed_precision_dtype would change the cache's dtype. Load the model with dtype=.")
        found = method_of(method, artifact, keep, bits, text)
        super().__init__(
            str(FOLDER) if isinstance(pretrained, str) and pretrained == "reference" else pretrained,
            batch_size=1,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            **kwargs,
        )
        if self.world_size > 1:
            raise EvalError(f"{self.world_size} processes run, 1 is possible. Start without accelerate launch.")
        if isinstance(found, Method) and (found.needs_fit or text is not None):
            found = fit(self.model, found, calibration.texts(text), self.tokenizer, batch=4)
        make_cache(self.model, found)  # what cannot work is refused before any task is loaded
        self.method, self.chunk = found, chunk
        self.usage: dict[str, Usage] = {}
        self._task = Usage()

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Answers stored by --use_cache are found by their text alone, so another method's would be taken for ours."""
        raise EvalError("--use_cache does not tell methods apart and would return another one's answers. Leave it out.")

    # --- the three kinds of request, counted task by task ---

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._by_task(requests, partial(super().loglikelihood, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        return self._by_task(requests, partial(super().loglikelihood_rolling, disable_tqdm=disable_tqdm))

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        return self._by_task(requests, partial(super().generate_until, disable_tqdm=disable_tqdm))

    def _by_task(self, requests: list, run: Callable[[list], list]) -> list:
        answers: dict[int, Any] = {}
        for name in dict.fromkeys(r.task_name for r in requests):
            members = [i for i, r in enumerate(requests) if r.task_name == name]
            self._task = self.usage.setdefault(str(name), Usage())
            answers.update(zip(members, run([requests[i] for i in members]), strict=True))
            if not self._task.sequences_read:
                logger.warning("%s: no request was long enough to read a compressed token.", name)
        return [answers[i] for i in range(len(requests))]

    # --- what HFLM does the rest with: pairs of token lists to score, a context to continue ---

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score (_, context, continuation) triples. Those that share a context share its prefill and its cache."""
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, pair in enumerate(pairs):
            groups.setdefault(tuple(pair[0]), []).append(i)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), desc="Scoring", disable=disable_tqdm) as bar:
            for context, members in groups.items():
                filled = self._filled(list(context[:-1]))
                for i in members:
                    answers[i] = self._score(copy.deepcopy(filled), context[-1], pairs[i][1])
                    bar.update()
        return [answers[i] for i in range(len(pairs))]

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """As `hf`: what the model cannot hold is cut off the context's left end."""
        n = len(continuation)
        if not 1 <= n <= self.max_length:
            raise EvalError(f"a continuation has {n} tokens, 1 to max_length={self.max_length} can be scored.")
        room = self.max_length + 1 - n
        if len(context) > room:
            logger.warning("%d tokens are cut off the left of a context of %d.", len(context) - room, len(context))
        return context[-room:], continuation

    @torch.inference_mode()
    def _filled(self, tokens: list[int]) -> KVCache:
        """A cache that holds these tokens, compressed. The prefill itself is the model's own, exact attention."""
        cache = make_cache(self.model, self.method)
        if tokens:
            self.model(input_ids=self._row(tokens), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    @torch.inference_mode()
    def _score(self, cache: KVCache, last: int, continuation: list[int]) -> tuple[float, bool]:
        """(log-likelihood, whether greedy decoding would give it) of tokens after the cached ones and `last`."""
        fed, wanted = self._row([last, *continuation[:-1]]), self._row(continuation)
        scores, hits, steps = [], [], []
        for at in range(0, len(continuation), self.chunk):
            ids, targets = fed[:, at : at + self.chunk], wanted[0, at : at + self.chunk]
            steps.append((ids.shape[1], compressed_tokens(cache) > 0))
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
            logs = log_softmax(logits, -1, dtype=self.softmax_dtype or torch.float32)
            scores.append(logs.gather(-1, targets[:, None]).sum())
            hits.append((logits.argmax(-1) == targets).all())
        self._task.add(steps, cache)
        return float(torch.stack(scores).sum()), bool(torch.stack(hits).all())

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs) -> Tensor:
        """As `hf` (stop strings, sampling settings), continued from a compressed cache."""
        # a model's own max_new_tokens would take the place of the task's
        if self.model.generation_config.max_new_tokens is not None:
            generation_kwargs["max_new_tokens"] = max_length - context.shape[1]
        cache = self._filled(context[0, :-1].tolist())
        steps: list[tuple[int, bool]] = []
        hook = self.model.register_forward_pre_hook(lambda *_: steps.append((1, compressed_tokens(cache) > 0)))
        try:
            out = super()._model_generate(context, max_length, stop, past_key_values=cache, **generation_kwargs)
        finally:
            hook.remove()
        self._task.add(steps, cache)
        return out

    def _row(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.device)

    def get_model_info(self) -> dict:
        """Goes into the results' "config"; counts start anew. Raises EvalError if nothing read a compressed token."""
        method = self.method.method if isinstance(self.method, Artifact) else self.method
        info = {
            "method": name_of(method),
            "settings": method.settings(),
            "digest": digest_of(self.method),
            "provenance": self.method.provenance if isinstance(self.method, Artifact) else {},
            "query_aware": True,
            "chunk": self.chunk,
            "tasks": describe(self.usage),
        }
        self.usage = {}
        return super().get_model_info() | {"kvshrink": info}


def main(args: list[str]) -> None:
    """lm-eval's own command line, which now knows the model. lm-eval 0.4.13 finds no plug-ins by itself."""
    sys.argv = ["lm-eval", *args]
    try:
        with patch.object(ArgumentParser, "error", _usage):
            cli_evaluate()
    except KVShrinkError:
        raise
    except Exception as error:  # another program, with what its tasks, data sets and models may raise
        if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
            wrong = str(error).split("argument")[-1].strip()
            said = f"model argument {wrong} is not known. A method's settings have ; between them."
            raise SettingError(said) from error
        raise EvalError(
            f"lm-eval: {type(error).__name__}: {line(error)}. See `kvshrink lm-eval run --help` and `... ls tasks`."
        ) from error


def _usage(parser: ArgumentParser, message: str) -> NoReturn:
    """In place of a usage text of many lines."""
    raise SettingError(f"{parser.prog}: {message}. See `kvshrink lm-eval run --help`.")
