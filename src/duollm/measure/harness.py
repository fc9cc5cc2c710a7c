"""Runs lm-evaluation-harness tasks under a policy and keeps the route of every scored or generated token.

Shape letters: B batch, T tokens, G generated tokens, L layers, V vocabulary.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from duollm.data.tokenizer import for_prompts
from duollm.errors import UserError, did_you_mean, in_a_line
from duollm.measure.executor import route_digits
from duollm.models.compat import DuoCausalLMOutput
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What a task may call the length of its answers; lm-eval takes the first that is given."""

TASKS_FOLDER = Path(__file__).parent / "tasks"
"""The shipped tasks; `tools/make_tasks.py` in the source repository makes their items."""
_FEWSHOT_SEED = 1234
"""Draws the examples in the context; lm-eval's default."""


class RoutedLM(HFLM):
    """lm-eval's Hugging Face model under a policy. It keeps the routes of each request.

    A route is a string of L digits (`route_digits`). Rows of a batch do not depend on each other, because the model
    pads on the right when it scores, and on the left under an attention mask when it generates.

    Attributes:
        routes: per request (context, continuation), or (context,) for generation, the routes of the tokens that
            predicted the continuation. Rolling perplexities and beam search keep none.
        shortened: number of requests that were cut to the model's positions, by the part that was cut.
    """

    def __init__(
        self,
        model: DuoForCausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        policy: Policy,
        batch_size: int | Literal["auto"],
    ) -> None:
        super().__init__(pretrained=model, tokenizer=for_prompts(tokenizer), backend="causal", batch_size=batch_size)
        self.shortened: Counter[str] = Counter()
        self.policy = policy
        self.routes: dict[tuple[str, ...], list[str]] = {}
        self.set_cache_hook(self)  # lm-eval tells its cache of each answer as soon as it has it: see add_partial
        self._rows: Iterator[Tensor] = iter(())
        self._answered: Tensor | None = None

    def add_partial(self, kind: str, request: tuple[Any, ...], answer: Any) -> None:
        """Store the routes of a request that lm-eval has just answered."""
        if kind == "loglikelihood" and self._answered is not None:
            self.routes[request] = route_digits(self._answered).tolist()
        elif kind == "generate_until":
            routes_GL = next(self._rows, None)
            if routes_GL is not None:
                self.routes[request[:1]] = route_digits(routes_GL).tolist()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Answer the requests. Progress is shown on a terminal only."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer the requests. An answer that asks for all positions gets at most half of them."""
        for request in requests:
            context, settings = request.args
            request.arguments = (context, self._within_positions(settings))
        return super().generate_until(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _within_positions(self, settings: dict[str, Any]) -> dict[str, Any]:
        asked = next((int(settings[key]) for key in _NEW_TOKENS if settings.get(key) is not None), self.max_gen_toks)
        if asked < 1:
            raise UserError(f"a task asks for answers of {asked} tokens; set its max_gen_toks to at least 1")
        if asked < self.max_length:
            return settings
        most = max(1, self.max_length // 2)
        self.shortened[f"answers of up to {asked} tokens, to {most}"] += 1
        return {key: value for key, value in settings.items() if key not in _NEW_TOKENS} | {"max_gen_toks": most}

    def _loglikelihood_tokens(self, requests: list[Any], *given: Any, **settings: Any) -> list[tuple[float, bool]]:
        for texts, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a task's choice of {len(continuation)} tokens is longer than the model's {self.max_length} "
                    f"positions: {str((texts or ('', ''))[1]).strip()[:40]!r}...; leave that task out"
                )
            if len(context) + len(continuation) > self.max_length + 1:
                self.shortened["contexts, at their beginning"] += 1
        return super()._loglikelihood_tokens(requests, *given, **settings)

    def tok_batch_encode(
        self, strings: list[str], *given: Any, left_truncate_len: int | None = None, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts, and count those that lose their beginning. An empty one is what begins a text."""
        strings = [string or str(self.tokenizer.decode([self.prefix_token_id])) for string in strings]
        if left_truncate_len:
            too_long = sum(len(self.tok_encode(string)) > left_truncate_len for string in strings)
            self.shortened["prompts, at their beginning"] += too_long
        return super().tok_batch_encode(strings, *given, left_truncate_len=left_truncate_len, **settings)

    def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
        with torch.inference_mode():
            output = self.model(inps, policy=self.policy, use_cache=False)
        self._rows = iter(output.routes)
        return output.logits

    def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Tensor:
        """Called for each row of the batch in turn: cut out what predicts the continuation."""
        self._answered = super()._select_cont_toks(next(self._rows), contlen, inplen)
        return super()._select_cont_toks(logits, contlen, inplen)

    def _model_generate(self, context: Tensor, **settings: Any) -> Tensor:
        steps: list[Tensor] = []

        def keep(module: Any, given: Any, output: DuoCausalLMOutput) -> None:
            steps.append(output.routes[:, -1])

        hook = self.model.register_forward_hook(keep)
        try:
            tokens_BT: Tensor = super()._model_generate(context, policy=self.policy, **settings)
        except (ValueError, TypeError) as error:  # what a task's generation_kwargs lead transformers to
            raise UserError(
                f"a task's generation_kwargs are refused: {in_a_line(error)}; correct them, or leave that task out"
            ) from error
        finally:
            hook.remove()
        self._rows = iter(self._until_end(torch.stack(steps, 1), tokens_BT[:, context.shape[1] :]))
        return tokens_BT

    def _until_end(self, routes_BGL: Tensor, generated_BG: Tensor) -> list[Tensor]:
        """The routes of each row up to the token that ends it; nothing if rows were beams."""
        if routes_BGL.shape[:2] != generated_BG.shape:
            return []
        ended_BG = (generated_BG == self.eot_token_id).cumsum(1)
        lengths = [int((row == 0).sum()) + 1 for row in ended_BG]
        return [routes_GL[:length] for routes_GL, length in zip(routes_BGL, lengths, strict=True)]


def run_tasks(
    lm: RoutedLM,
    tasks: Sequence[str],
    folders: Sequence[Path] = (),
    limit: int | None = None,
    fewshot: int | None = None,
) -> dict[str, Any]:
    """Run lm-eval tasks; return its results.

    Each sample in `samples` has a new key `routes`: per request a string of digits per scored token.

    Args:
        tasks: names of shipped tasks, of tasks in `folders`, or of lm-eval's own tasks, which need a network.
        limit: largest number of documents per task.
        fewshot: number of examples in the context, unless the task fixes it.

    Raises:
        UserError: a task is unknown, or its data set cannot be loaded.
    """
    manager, own = _task_manager(tasks, folders)
    try:
        loaded = manager.load(list(tasks))
    except (ConnectionError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"tasks {','.join(tasks)}: the data set cannot be fetched ({reason}); lm-eval's own tasks need a "
            f"network, these do not: {', '.join(own)}"
        ) from None
    for task in loaded["tasks"].values():
        fixed = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=fewshot if fewshot is not None and fixed != 0 else fixed or 0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    results: dict[str, Any] = evaluate(lm, loaded, limit=limit, log_samples=True)
    for sample in (sample for samples in results["samples"].values() for sample in samples):
        texts = [tuple(part for part in request if isinstance(part, str)) for request in sample["arguments"]]
        sample["routes"] = [lm.routes.get(request) for request in texts]
    return results


def _task_manager(tasks: Sequence[str], folders: Sequence[Path]) -> tuple[TaskManager, list[str]]:
    """Know the shipped and local tasks, and lm-eval's own only if one is asked for: reading those takes long.

    Also return the names of the shipped and local tasks.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"include_path {folder}: no such folder")
    paths = [str(TASKS_FOLDER), *map(str, folders)]
    manager = TaskManager(include_path=paths, include_defaults=False)
    own = list(manager.all_tasks)
    if not set(tasks) <= set(own):
        manager = TaskManager(include_path=paths)
    for name in tasks:
        if name not in manager.all_tasks:
            raise UserError(f"unknown task {name!r}; {did_you_mean(name, own)}, or one of lm-eval's own")
    return manager, own
