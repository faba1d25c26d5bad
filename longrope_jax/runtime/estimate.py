"""Estimated time of a program on a chip, from its FLOPs and communication: a roofline model, not a measurement."""

from dataclasses import dataclass

from longrope_jax.model.flops import Flops
from longrope_jax.runtime.collectives import RING, Traffic

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them (a TPU7x chip is two devices), with its share of the chip's resources.

    Attributes:
        name: as in the name of a topology, "v5p".
        device_kind: JAX's name.
        peak_flops: bfloat16 products, per second.
        hbm_bytes: memory.
        hbm_bandwidth: bytes per second.
        link_bandwidth: bytes per second, one way, over one link to a neighbour; 0 without such links.
        torus: dimensions of the network, with two links each; 0 without a torus.
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
    """The chip of a device kind; None for an unknown one, such as a CPU."""
    aliases = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}
    kind = aliases.get(device_kind, device_kind)
    return next((chip for chip in CHIPS.values() if chip.device_kind == kind), None)


MATRICES_MFU, ATTENTION_MFU = 0.75, 0.5  # assumed shares of the peak
ASSUMPTIONS = (
    f"products with parameters reach {MATRICES_MFU:.0%} of the peak, attention kernels {ATTENTION_MFU:.0%}",
    "keys and values (ring) go one way over one link to a neighbour, while attention computes",
    "all other communication uses both links of one dimension of the torus, while products are computed",
    "all memory in use is moved between HBM and the chip twice, while it computes",
    "communication that takes longer than the computation it overlaps with is waited for; nothing else is lost",
)


@dataclass(frozen=True)
class Estimate:
    """Seconds of one call of a program, and their parts.

    Attributes:
        matrices, attention: products, at the rates assumed.
        ring: sending keys and values.
        others: sending parameters and gradients.
        memory: HBM.
        total: of one call.
        bound: at the chip's peak, without recomputation and waiting.
        mfu: model FLOPs utilisation at `total`, products with parameters only.
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
        """Share of attention in the time of all products."""
        return self.attention / (self.matrices + self.attention)


def estimate(
    chip: Chip, devices: int, needed: Flops, executed: Flops, collectives: dict[str, Traffic], memory_bytes: int
) -> Estimate:
    """The estimate of a program on `devices` devices; FLOPs are those of all devices, `memory_bytes` of one."""
    peak = devices * chip.peak_flops
    matrices = executed.matrices / peak / MATRICES_MFU
    attention = executed.attention / peak / ATTENTION_MFU
    ring = collectives.get(RING, Traffic(0, 0)).bytes / chip.link_bandwidth
    others = sum(found.bytes for kind, found in collectives.items() if kind != RING) / (2 * chip.link_bandwidth)
    memory = 2 * memory_bytes / chip.hbm_bandwidth
    total = max(max(matrices, others) + max(attention, ring), memory)
    bound, mfu = needed.total / peak, needed.matrices / peak / total
    return Estimate(matrices, attention, ring, others, memory, total, bound, mfu, mfu_with_attention=bound / total)
