"""What accelerators can do at best, as their makers state it: bounds that measurements and estimates are held to."""

from dataclasses import dataclass

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
