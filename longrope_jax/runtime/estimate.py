"""How long a program should take on a chip, from what it computes and sends: a model, not a measurement."""

from dataclasses import dataclass

from longrope_jax.model.arithmetic import Flops
from longrope_jax.runtime.chips import Chip
from longrope_jax.runtime.collectives import RING, Traffic

MATRICES_REACH, ATTENTION_REACHES = 0.75, 0.5
ASSUMPTIONS = (
    f"products with parameters reach {MATRICES_REACH:.0%} of the peak, attention kernels {ATTENTION_REACHES:.0%}",
    "keys and values (ring) go one way over one link to a neighbour, while attention computes",
    "everything else that is sent takes both links of one dimension of the torus, while products are computed",
    "all bytes that a device holds are moved between HBM and the chip twice, while it computes",
    "what takes longer than the work beside it is waited for; nothing else is lost",
)


@dataclass(frozen=True)
class Estimate:
    """Seconds of one run of a program, and the shares that they are made of.

    Attributes:
        matrices, attention: products, at the rates assumed.
        ring: sending keys and values.
        others: sending parameters and gradients.
        memory: HBM.
        total: what one run takes.
        bound: at the chip's peak, if nothing were computed twice and nothing waited for.
        mfu: model FLOPs utilisation that the total means, products with parameters only.
        mfu_with_attention: the same with attention.
    """

    matrices: float
    attention: float
    ring: float
    others: float
    memory: float
    total: float
    bound: float
    mfu: float
    mfu_with_attention: float

    @property
    def attention_share(self) -> float:
        """Of the time of all products."""
        return self.attention / (self.matrices + self.attention)


def estimate(
    chip: Chip, devices: int, needed: Flops, executed: Flops, collectives: dict[str, Traffic], bytes_held: int
) -> Estimate:
    """Of a program on so many devices, whose FLOPs are those of all; `bytes_held` is a device's."""
    peak = devices * chip.peak_flops
    matrices = executed.matrices / peak / MATRICES_REACH
    attention = executed.attention / peak / ATTENTION_REACHES
    ring = collectives.get(RING, Traffic(0, 0)).bytes / chip.link_bandwidth
    others = sum(found.bytes for kind, found in collectives.items() if kind != RING) / (2 * chip.link_bandwidth)
    memory = 2 * bytes_held / chip.hbm_bandwidth
    total = max(max(matrices, others) + max(attention, ring), memory)
    return Estimate(
        matrices=matrices,
        attention=attention,
        ring=ring,
        others=others,
        memory=memory,
        total=total,
        bound=needed.total / peak,
        mfu=needed.matrices / peak / total,
        mfu_with_attention=needed.total / peak / total,
    )
