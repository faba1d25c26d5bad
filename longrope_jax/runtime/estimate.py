"""How long a program should take on a chip, from what it computes and sends: a model, not a measurement."""

from dataclasses import dataclass

from longrope_jax.model.flops import Flops
from longrope_jax.runtime.collectives import RING, Traffic

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them (a TPU7x chip is two), with its share of what the chip has.

    Attributes:
        name: as in a topology's name: "v5p".
        device_kind: what JAX calls it.
        peak_flops: bfloat16 products, per second.
        hbm_bytes: memory.
        hbm_bandwidth: bytes per second.
        link_bandwidth: bytes per second, one way, over one of the links to neighbours; 0 where there are no such links.
        torus: number of dimensions of the network, two links in each.
    """

    name: str
    device_kind: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float = 0.0
    torus: int = 0


# Cloud TPU's system architecture pages (a link's share of the stated interconnect bandwidth); NVIDIA's data sheets
# (SXM, without sparsity).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 275e12, 32 * GIB, 1228 * GB, 50 * GB, 3),
        Chip("v5e", "TPU v5 lite", 197e12, 16 * GIB, 819 * GB, 50 * GB, 2),
        Chip("v5p", "TPU v5", 459e12, 95 * GIB, 2765 * GB, 100 * GB, 3),
        Chip("v6e", "TPU v6 lite", 918e12, 32 * GIB, 1640 * GB, 100 * GB, 2),
        Chip("tpu7x", "TPU7x", 1153.5e12, 96 * GIB, 3690 * GB, 100 * GB, 3),
        Chip("h100", "NVIDIA H100 80GB HBM3", 989e12, 80 * GIB, 3350 * GB),
        Chip("h200", "NVIDIA H200", 989e12, 141 * GB, 4800 * GB),
    )
}

TPUS = tuple(name for name, chip in CHIPS.items() if chip.torus)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None for one that is not known, such as a CPU."""
    aliases = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}
    kind = aliases.get(device_kind, device_kind)
    return next((chip for chip in CHIPS.values() if chip.device_kind == kind), None)


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
