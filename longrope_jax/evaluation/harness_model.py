"""A model for the lm-evaluation-harness: the short benchmarks of LongRoPE's table 8, and whatever else it has.

An optional extra (requirements-harness.txt). Every request takes the factors of its own length.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from longrope_jax.data.tokenizer import Tokenizer
from longrope_jax.evaluation.scoring import log_likelihoods
from longrope_jax.model import Llama
from longrope_jax.model.decode import ENDED, Sampling, generate
from longrope_jax.rope import FactorTable
from longrope_jax.runtime.mesh import Layout
from longrope_jax.runtime.processes import progress_bar

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table
except ImportError as error:
    raise ImportError(
        f"the benchmarks need the lm-evaluation-harness: pip install -r requirements-harness.txt ({error})"
    ) from None


def find_tasks(names: Sequence[str], folder: str | None = None) -> TaskManager:
    """The harness's own tasks and those of YAML files in a folder; ValueError for names that are none of them."""
    if folder is not None and not epath.Path(folder).is_dir():
        raise ValueError(f"include_path = {folder!r} is not a directory")
    tasks = TaskManager(include_path=folder)
    unknown = [name for name in names if not tasks.match_tasks([name])]
    if unknown or not names:
        raise ValueError(
            f"tasks = {','.join(names)!r}: the harness has no {' and no '.join(unknown) or 'task without a name'}"
        )
    return tasks


def benchmark(
    model: "HarnessModel",
    names: Sequence[str],
    tasks: TaskManager,
    few_shot: int | None = None,
    limit: int | None = None,
) -> tuple[dict[str, Any], str]:
    """The harness's results, JSON-able and without its samples, and its table.

    Args:
        few_shot: examples in every prompt; None leaves it to the task.
        limit: only so many documents of every task.
    """
    results = simple_evaluate(
        model, tasks=list(names), num_fewshot=few_shot, limit=limit, task_manager=tasks, log_samples=False
    )
    return json.loads(json.dumps(results, default=handle_non_serializable)), make_table(results)


class HarnessModel(TemplateLM):
    """What `lm_eval.simple_evaluate` takes as its model.

    Args:
        model: the architecture.
        params: on the mesh of the layout.
        table: factors by length; its last boundary is the longest input, of what is longer the beginning is left out.
        layout: where the arrays lie.
        tokens_at_once: how many tokens one forward pass takes; of generation, prompts and new tokens together.
        bos: whether all that the model reads begins with BOS, also a text that lost its beginning; None as the
            tokenizer's `window_bos`.

    Raises:
        ValueError: the tokenizer has no token to begin with.
    """

    def __init__(
        self,
        model: Llama,
        params: dict,
        tokenizer: Tokenizer,
        table: FactorTable,
        layout: Layout | None = None,
        tokens_at_once: int = 8192,
        bos: bool | None = None,
    ):
        super().__init__()
        self._ends = [token for token in (tokenizer.bos, tokenizer.eos) if token is not None]
        if not self._ends:
            raise ValueError("the tokenizer has neither a BOS nor an EOS token; one has to stand for an empty context")
        self._model, self._params, self._table = model, params, table
        self._text, self._layout, self._tokens_at_once = tokenizer, layout or Layout(), tokens_at_once
        if bos and tokenizer.bos is None:
            raise ValueError("bos = True needs a tokenizer with a BOS token")
        adds_bos = tokenizer.window_bos is not None if bos is None else bos
        self._bos = tokenizer.bos if adds_bos else None
        self.max_length = int(table.boundaries[-1])
        self.max_gen_toks = 256  # where a task does not say; the harness's own default

    @property
    def eot_token_id(self) -> int:
        """What ends a text: EOS, or BOS where the tokenizer has no other."""
        return self._ends[-1]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text: BOS, or EOS where the tokenizer has no other."""
        return self._ends[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Token ids, after BOS unless that is not wanted."""
        bos = self._bos is not None and add_special_tokens is not False
        return self._text.encode(string, bos=bos, eos=False).tolist()

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """For `loglikelihood`: (texts, context, continuation) in tokens -> log-probability in nats, is it greedy."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        loaded = self._model, self._layout, self._params, self._table
        results = log_likelihoods(*loaded, pairs, self._tokens_at_once, self._bos)
        bar = progress_bar(results, "log-likelihoods", len(pairs), unit="request", disable=disable_tqdm)
        for index, likelihood in bar:
            answers[index] = tuple(likelihood)
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in nats; long ones in windows, each token with all the context that fits."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = np.zeros(len(requests))
        for owner, (log_probability, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += log_probability
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model adds to each context, up to a string at which it is to stop.

        Greedy, or drawn where a request says `do_sample` with a `temperature`, `top_k` and `top_p`; prompts of similar
        length are answered together.

        Raises:
            ValueError: the new tokens leave no room for a prompt.
        """
        answers = [""] * len(requests)
        results = self._generated(requests)
        for index, text in progress_bar(results, "generating", len(requests), unit="request", disable=disable_tqdm):
            answers[index] = text
            self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return answers

    def _generated(self, requests: Sequence[Instance]) -> Iterator[tuple[int, str]]:
        groups: dict[tuple, list[tuple[int, list[int]]]] = {}
        for index, request in enumerate(requests):
            context, options = request.args[0], normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            new = options["max_gen_toks"]
            if new >= self.max_length:
                raise ValueError(f"max_gen_toks = {new} leaves no room for a prompt in {self.max_length} tokens")
            prompt = (self.tok_encode(context) or [self.prefix_token_id])[new - self.max_length :]
            if self._bos is not None:
                prompt[0] = self._bos
            groups.setdefault((new, _sampling(options), tuple(filter(None, options["until"]))), []).append(
                (index, prompt)
            )
        for (new, sampling, until), group in groups.items():
            group.sort(key=lambda entry: -len(entry[1]))
            while group:
                at_once = self._layout.row_shards * max(
                    1, self._tokens_at_once // ((len(group[0][1]) + new) * self._layout.row_shards)
                )
                indices, prompts = zip(*group[:at_once], strict=True)
                del group[:at_once]
                # A smaller last batch would compile anew.
                padded = [np.array(prompt) for prompt in prompts] + [np.array(prompts[-1])] * (at_once - len(prompts))
                texts = self._complete(padded, len(indices), new, sampling, until)
                yield from zip(indices, texts, strict=True)

    def _complete(
        self, prompts: list[np.ndarray], wanted: int, new: int, sampling: Sampling, until: tuple[str, ...]
    ) -> list[str]:
        """The texts after the first `wanted` prompts; it ends as soon as each has stopped."""
        tokens, kept = np.zeros((wanted, 0), np.int32), [""] * wanted
        with self._layout.active():
            for step in generate(
                self._model, self._params, self._table, prompts, new, sampling=sampling, stops=self._text.stops
            ):
                tokens = np.concatenate([tokens, step[:wanted, None]], axis=1)
                texts = [self._text.decode(row[row != ENDED]) for row in tokens]
                kept = [postprocess_generated_text(text, list(until), None) for text in texts]
                if all(row[-1] == ENDED or keep != text for row, keep, text in zip(tokens, kept, texts, strict=True)):
                    break
        return kept


def _sampling(options: dict) -> Sampling:
    """Of a request's normalized options: greedy unless it says otherwise, and then at temperature 1."""
    if not options["do_sample"]:
        return Sampling()
    return Sampling(
        float(options["temperature"] or 1), int(options.get("top_k") or 0), float(options.get("top_p") or 1)
    )
