"""A functional LLaMA in Flax Linen, and its loss: parameters and rope factors are arguments of `apply`.

Architecture (arXiv 2302.13971): pre-norm blocks of grouped-query attention with rotary embedding and of SwiGLU. The
layers are one `nn.scan`, their parameters stacked on a leading axis, so compile time does not grow with their number.

Under `jax.set_mesh`, and within `jit`, all arrays with a token axis are sharded over the mesh, sequences included
(`model/sharding.py`). Tokens may be in any order in memory, such as the ring's zigzag, as positions are explicit.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longrope_jax.model.attention_parts import SAVED
from longrope_jax.model.cache import Cache, Memory, attend
from longrope_jax.model.config import LlamaConfig
from longrope_jax.model.ring import ring_attention
from longrope_jax.model.sharding import batch_axis, constrain, length_axis, mesh_axes, partition_spec, shards
from longrope_jax.rope import RopeFactors, apply_rotary, rotary_embedding

MAX_LOGITS = 2**24  # float32 elements on a device, 64 MiB: a bound that does not grow with T


class Llama(nn.Module):
    """`logits = Llama(config).apply({"params": params}, tokens, factors)`.

    Compiled once per shape: lam, n_hat, mscale, positions and segment ids are all traced. Factors may have a leading
    batch axis, then each sequence has its own. Memory O(B T E) a layer with the blockwise attention; with
    `config.remat` the backward pass keeps only what the policy says.

    Attributes:
        config: sizes and numerics.
    """

    config: LlamaConfig

    def setup(self):
        """Declares embed, layers, final_norm and, unless tied, lm_head."""
        config = self.config
        # Looked up in param_dtype and cast afterwards: a frequent token's gradient is a sum over all its positions, for
        # which bfloat16 is too coarse.
        dtype = config.param_dtype
        self.embed = nn.Embed(config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype)
        block = Block
        if config.remat != "none":
            policy = (
                jax.checkpoint_policies.save_only_these_names(SAVED)
                if config.remat == "attention_saveable"
                else getattr(jax.checkpoint_policies, config.remat)
            )
            block = nn.remat(Block, policy=policy, prevent_cse=False)  # scan already separates the passes
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
        )(config)
        self.final_norm = _norm(config, "final_norm")
        if not config.tie_embeddings:
            shape = (config.hidden_size, config.vocab_size)
            self.lm_head = self.param("lm_head", nn.initializers.lecun_normal(), shape, config.param_dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        factors: RopeFactors,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits in float32. Positions default to 0..T-1; tokens of different segments don't see each other."""
        return project(self.hidden(tokens, factors, positions, segment_ids)[0], self._head())

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        factors: RopeFactors,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        memory: Memory | None = None,
    ) -> tuple[Float[Array, "B T E"], Memory | None]:
        """The normalised residual stream that the output head reads, and the memory with these tokens, if there is one.

        Raises:
            ValueError: factors for another head dimension.
        """
        if factors.lam.shape[-1] != self.config.head_dim // 2:
            raise ValueError(
                f"lam has {factors.lam.shape[-1]} factors; a head dimension of {self.config.head_dim} needs "
                f"{self.config.head_dim // 2}"
            )
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        with jax.named_scope("rope"):
            tables = rotary_embedding(positions, factors, self.config.rope_theta)
            rotation = tuple(constrain(part, batch_axis(part), length_axis(part), None) for part in tables)
        # Gathered over fsdp like other parameters at their use, with whole rows: a lookup in parts of rows would make
        # every device compute x for all tokens.
        with jax.named_scope("embed"):
            table = constrain(self.embed.embedding, "vocab", None)
            x = _constrain_tokens(jnp.take(table, tokens, axis=0).astype(self.config.dtype))
        (x, memory), _ = self.layers((x, memory), rotation, positions, segment_ids)
        return self.final_norm(x), memory

    def extend(
        self,
        tokens: Int[Array, "B C"],
        factors: RopeFactors,
        positions: Int[Array, "B C"],
        cache: Cache,
        last: Int[Array, "B"],
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Reads C more tokens of every row; returns float32 logits for the token after number `last` of them, and the
        updated cache. Use: `apply(..., method="extend")`; see `model/cache.py`.

        Raises:
            ValueError: factors for another head dimension.
        """
        hidden, memory = self.hidden(tokens, factors, positions, None, Memory(cache, jnp.int32(0)))
        assert memory is not None  # as one was given
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        return project(hidden, self._head())[:, 0], memory.cache

    def token_nll(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        factors: RopeFactors,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T"]:
        """-log p(targets) in nats, never holding [B, T, V] for long T. Use: `apply(..., method="token_nll")`."""
        return token_nll(self.hidden(tokens, factors, positions, segment_ids)[0], self._head(), targets)

    def _head(self) -> Float[Array, "E V"]:
        return self.embed.embedding.T if self.config.tie_embeddings else self.lm_head


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
        config: sizes and numerics.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, carry: tuple[Float[Array, "B T E"], Memory | None], rotation, positions, segment_ids
    ) -> tuple[tuple[Array, Memory | None], None]:
        """(x, memory) -> ((x, memory), None), as `nn.scan` needs it. Only decoding has a memory."""
        x, memory = carry
        normed = _norm(self.config, "attention_norm")(x)
        mixed, memory = Attention(self.config, name="attention")(normed, memory, rotation, positions, segment_ids)
        x = x + mixed
        x = x + Mlp(self.config, name="mlp")(_norm(self.config, "mlp_norm")(x))
        return (_constrain_tokens(x), memory), None


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding on queries and keys.

    Attributes:
        config: sizes and numerics.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], memory: Memory | None, rotation, positions, segment_ids
    ) -> tuple[Float[Array, "B T E"], Memory | None]:
        """x -> the update of the residual stream; memory -> memory with these tokens, for the next layer."""
        config = self.config

        def heads(name: str, number: int) -> Float[Array, "B T heads D"]:
            return _projection(number * config.head_dim, config, name)(x).reshape(*x.shape[:2], number, -1)

        query, key = heads("query", config.num_heads), heads("key", config.num_kv_heads)
        value = heads("value", config.num_kv_heads)
        with jax.named_scope("rope"):
            query, key = apply_rotary(query, *rotation), apply_rotary(key, *rotation)
        if memory is None:
            with jax.named_scope("attend"):
                mixed = ring_attention(query, key, value, positions, segment_ids, config.attention)
        else:
            mixed, memory = attend(memory, query, key, value, positions)
        return _projection(config.hidden_size, config, "output")(mixed.reshape(*x.shape[:2], -1)), memory


class Mlp(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)).

    Attributes:
        config: sizes and numerics.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """x -> the update of the residual stream."""
        gate = _projection(self.config.intermediate_size, self.config, "gate")(x)
        up = _projection(self.config.intermediate_size, self.config, "up")(x)
        inner = constrain(nn.silu(gate) * up, "batch", length_axis(x), "mlp")
        return _projection(self.config.hidden_size, self.config, "down")(inner)


def _constrain_tokens(x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    return constrain(x, "batch", length_axis(x), None)  # not "embed": fsdp shards the batch here


def _projection(features: int, config: LlamaConfig, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def _norm(config: LlamaConfig, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(config.norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


@jax.named_scope("loss")
def token_nll(
    hidden: Float[Array, "B T E"], head: Float[Array, "E V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """-log p(target) of every position, in nats, float32.

    The sequence is split into equal chunks whose [B, chunk, V] logits stay below `MAX_LOGITS` (one position if
    even that is more); the backward pass recomputes them chunk by chunk. Time O(B T E V), memory O(B T E + B V +
    MAX_LOGITS). Under a mesh, call it within `jit`; B, T and V are then one device's part.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return _in_chunks(hidden, head, targets)
    tokens = partition_spec("batch", "length")
    # Every device processes its own tokens: chunks of whole sequences would first be gathered, and the head's gradient
    # would be summed over devices once per chunk. The compiler shards along the vocabulary.
    return jax.shard_map(
        _in_chunks,
        in_specs=(partition_spec("batch", "length", None), partition_spec(None, None), tokens),
        out_specs=tokens,
        axis_names=mesh_axes("batch", "length"),
        check_vma=False,  # with it, the head's gradient would be summed over devices inside the loop
    )(hidden, head.astype(jnp.float32), targets)  # float32, so that this sum is too


def _in_chunks(hidden: Array, head: Array, targets: Array) -> Array:
    batch, length, _ = hidden.shape
    largest = max(1, MAX_LOGITS * shards("vocab") // (batch * head.shape[1]))
    if length <= largest:
        return _nll(hidden, head, targets)
    chunk = -(-length // -(-length // largest))  # the fewest chunks, evenly filled: little padding
    pad = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)))
    chunks = tuple(jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0) for x in (hidden, targets))
    nll = jax.lax.map(jax.checkpoint(lambda chunk: _nll(chunk[0], head, chunk[1])), chunks)
    return jnp.moveaxis(nll, 0, 1).reshape(batch, -1)[:, :length]


def _nll(hidden: Array, head: Array, targets: Array) -> Array:
    logits = constrain(project(hidden, head), None, None, "vocab")
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def project(hidden: Float[Array, "B T E"], head: Float[Array, "E V"]) -> Float[Array, "B T V"]:
    """Logits in float32; the product is in the type of `hidden`.

    The head is cast here, inside a chunk of the loss, so that its gradient is summed over the chunks in its own type.
    """
    return jnp.einsum("bte,ev->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
