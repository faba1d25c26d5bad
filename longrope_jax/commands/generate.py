"""Text from a model: a pretrained one by its path, or one that an experiment has made (`--mode=generate`)."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class GenerateSettings:
    """What is written, and how it is drawn.

    Attributes:
        prompt_files: a text each; several are one batch.
        max_new_tokens: at most so many a prompt; less where the model ends its text.
        sampling: see `Sampling`.
        seed: of the draws.
        switch: see `model/decode.py`: "ahead" takes the factors of prompt and new tokens together, "running" those of
            the length so far.
    """

    prompt_files: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    switch: str


class Writer(NamedTuple):
    """All that generation needs.

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
    """A Hugging Face folder or a GGUF file, with the rotation it came with or that of a file of factors.

    Raises:
        ValueError: it can't be loaded, or the factors don't fit.
    """
    layout = Layout.of(mesh)
    config, params, tokenizer, table = load_pretrained(path, mesh=layout.mesh)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer")
    return Writer(Llama(config), params, tokenizer, factors_for(factors, config) if factors else table, layout)


def from_experiment(config: ConfigDict, workdir: epath.PathLike, factors: str, model: str) -> Writer:
    """The model of a finished stage, with the factors of a table, search or load stage.

    Args:
        factors: the stage; "" is what the model was last trained with.
        model: the stage; "" is the latest.

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


def write(writer: Writer, settings: GenerateSettings) -> list[str]:
    """Generates and prints; one prompt's text appears as it is made. Returns what was added to every prompt.

    Raises:
        ValueError: a prompt is empty or not there, or is too long for the table of factors.
    """
    model, params, tokenizer, table, layout = writer
    prompts = [_prompt(path, tokenizer) for path in settings.prompt_files]
    options: dict[str, Any] = dict(
        sampling=settings.sampling, stops=tokenizer.stops, seed=settings.seed, switch=settings.switch
    )
    with layout.active():
        if len(prompts) == 1:
            steps = generate(model, params, table, prompts, settings.max_new_tokens, **options)
            return ["".join(_show(_pieces((step[0] for step in steps), tokenizer)))]
        rows = complete(model, params, table, prompts, settings.max_new_tokens, **options)
    texts = [tokenizer.decode(row) for row in rows]
    _show(f"==> {path} <==\n{text}\n" for path, text in zip(settings.prompt_files, texts, strict=True))
    return texts


def _prompt(path: str, tokenizer: Tokenizer) -> Int[np.ndarray, "tokens"]:
    try:
        text = epath.Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"prompt_file = {path!r} can't be read: {error.strerror or error}") from None
    return tokenizer.encode(text, bos=True, eos=False)


def _pieces(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text as it grows. A character may take several tokens: what may still change is held back.

    All tokens so far are decoded each time, as tokenizers treat the beginning of a text differently.
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
    """Prints them one after the other as they come, and returns them."""
    shown = []
    for text in texts:
        if processes.is_first():
            print(text, end="", flush=True)
        shown.append(text)
    if processes.is_first():
        print(file=sys.stdout)
    return shown
