"""What a profiled device and its links could do at most: data sheets and line rates, where a profile has the parts of them that are reached.

Numbers of links that were measured are no limits, so such links limit nothing here.
"""

from __future__ import annotations

from cpbench.projection.light import Limits
from cpbench.projection.links import NIC_PART, Links
from cpbench.projection.profile import DeviceProfile

# bytes per second of all links of a device in one direction, by how the profile calls them; NVIDIA's data sheets give both directions together
LINE_RATES = {
    "NVLink 3, 12 links": 300e9,
    "NVLink 4, 8 links": 200e9,
    "NVLink 4, 18 links": 450e9,
    "NVLink 5, 18 links": 900e9,
    "HCCS full mesh, 7 links of 28 GB/s": 196e9,
    "PCIe 4 x16": 31.5e9,
    "PCIe 5 x16": 63e9,
}


def limits_of(device: DeviceProfile, links: Links, dtype: str) -> Limits:
    """The limits of a device for cells of a dtype, in the topology of `links`. Raises CpbenchError where the profile does not have the dtype."""
    between, fp8 = links.costs.between, device.peaks.get("fp8")
    return Limits(
        flops=device.peak_flops(dtype),
        fp8_flops=fp8.value if fp8 else None,
        memory=device.bandwidth.value,
        link=next((rate for title, rate in LINE_RATES.items() if links.costs.title.startswith(title)), None),
        network=None if between is None or between.rate.kind == "measured" else between.rate.value / NIC_PART.value,
        gpus_per_node=links.topology.gpus_per_node,
    )
