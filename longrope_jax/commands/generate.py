"""Text from a model: a pretrained one by its path, or one of an experiment (`--mode=generate`)."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int
from ml_collections import ConfigDict

from longrope_jax import experiment
from longrope_jax.data.tokenizer import Tokenizer
from longrope_jax.interop import load_pretrained
from longrope_jax.interop.factor_files import factors_for
from longrope_jax.model import Llama
from longrope_jax.model.decode import Sampling, complete, generate
from longrope_jax.rope import FactorTable
from longrope_jax.runtime import processes
from longrope_jax.runtime.mesh import Layout, MeshSettings


class Writer(NamedTuple):
    """A loaded model that generates text.

    Attributes:
        model: the architecture.
        params: on the devices of the layout.
        tokenizer: of the model.
        table: factors by length.
        layout: of the devices.
    """

    model: Llama
    params: dict
    tokenizer: Tokenizer
    table: FactorTable
    layout: Layout


def from_path(path: str, factors: str, mesh: MeshSettings) -> Writer:
    """Loads a Hugging Face folder or a GGUF file, with its own rotation or the factors of a file.

    Raises:
        ValueError: it can't be loaded, or the factors don't fit.
    """
    layout = Layout.of(mesh)
    config, params, tokenizer, table = load_pretrained(path, mesh=layout.mesh)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer")
    return Writer(Llama(config), params, tokenizer, factors_for(factors, config) if factors else table, layout)


def from_experiment(config: ConfigDict, workdir: epath.PathLike, factors: str, model: str) -> Writer:
    """Loads the model of a finished stage, with the factors of a table, search or load stage.

    Args:
        factors: the stage; "" means the factors that the model was last trained with.
        model: the stage; "" means the latest.

    Raises:
        ValueError: there is no such stage, or it has not finished.
    """
    context = experiment.reopen(config, workdir)
    for name, wanted, there in (("model", model, context.trained), ("factors", factors, context.factors)):
        if wanted and wanted not in there:
            raise ValueError(f"{name} = {wanted!r} is no finished stage of this work directory that has one; those "
                             f"are {', '.join(there) or 'none'}")  # fmt: skip
    table = context.table(factors, model)
    return Writer(context.model, context.params(model), context.tokenizer, table, context.layout)


def write(
    writer: Writer, prompt_files: Sequence[str], max_new_tokens: int, *, sampling: Sampling, seed: int, switch: str
) -> list[str]:
    """Generates and prints text, for a single prompt token by token. Returns the new text of every prompt.

    Args:
        prompt_files: one text each; several are one batch.
        max_new_tokens: per prompt; fewer if the model ends its text.
        sampling: see `Sampling`.
        seed: of sampling.
        switch: see `model/decode.py`: "ahead" takes the factors of prompt and new tokens together, "running" those of
            the length so far.

    Raises:
        ValueError: a prompt is empty, missing, or too long for the table of factors.
    """
    model, params, tokenizer, table, layout = writer
    prompts = [_prompt(path, tokenizer) for path in prompt_files]
    options: dict[str, Any] = dict(sampling=sampling, stops=tokenizer.stops, seed=seed, switch=switch)
    with layout.active():
        if len(prompts) == 1:
            steps = generate(model, params, table, prompts, max_new_tokens, **options)
            return ["".join(_show(_pieces((step[0] for step in steps), tokenizer)))]
        rows = complete(model, params, table, prompts, max_new_tokens, **options)
    texts = [tokenizer.decode(row) for row in rows]
    _show(f"==> {path} <==\n{text}\n" for path, text in zip(prompt_files, texts, strict=True))
    return texts


def _prompt(path: str, tokenizer: Tokenizer) -> Int[np.ndarray, "tokens"]:
    try:
        text = epath.Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"prompt_file = {path!r} can't be read: {error.strerror or error}") from None
    return tokenizer.encode(text, bos=True, eos=False)


def _pieces(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Pieces of text, each as soon as it is final: a character may take several tokens.

    Decodes all tokens each time, as tokenizers treat the beginning of a text differently.
    """
    seen: list[int] = []
    shown = ""
    for token in tokens:
        seen.append(token)
        text = tokenizer.decode(np.array(seen))
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(np.array(seen, np.int64))[len(shown) :]


def _show(texts: Iterable[str]) -> Sequence[str]:
    """Prints texts as they come, and returns them."""
    shown = []
    for text in texts:
        if processes.is_first():
            print(text, end="", flush=True)
        shown.append(text)
    if processes.is_first():
        print(file=sys.stdout)
    return shown
