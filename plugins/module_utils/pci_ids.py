"""Names and generations of NVIDIA cards by PCI device id, for a host whose driver cannot be asked.

Source of the names: the PCI ID database (pci-ids.ucw.cz), version 2025.06.09, 3-clause BSD: the generations
Pascal to Blackwell. A card that is not here keeps its raw id as its name.
"""

from __future__ import annotations

from typing import Optional

NVIDIA_VENDOR_ID = "10de"

# First and last device id, generation, compute capability ("-": more than one in the range). The ranges are those
# in which the PCI ID database gives only chips of one generation (GM… maxwell, GP… pascal, …); NVIDIA hands ids out
# by chip. The capability of a chip: NVIDIA's table of compute capabilities (developer.nvidia.com/cuda-gpus).
_RANGES = """\
0fc0 103f kepler -
1040 1140 fermi -
1180 11ff kepler -
1200 125f fermi -
1280 12bf kepler -
1340 143f maxwell -
15f0 15ff pascal 6.0
1617 1667 maxwell -
1725 172f pascal 6.0
174d 17fd maxwell -
1b00 1d7f pascal 6.1
1d80 1dff volta 7.0
1e00 1fff turing 7.5
2080 20ff ampere 8.0
2180 21d1 turing 7.5
2200 223f ampere 8.6
2300 237f hopper 9.0
2400 25ff ampere 8.6
2680 28ff ada 8.9
2900 29ff blackwell 10.0
2b80 2dff blackwell 12.0
2e00 2eff blackwell -
2f00 2fff blackwell 12.0
"""
# The generation of a compute capability, for an id that no range has (the same table).
_BY_CAPABILITY = {
    "5": "maxwell",
    "6": "pascal",
    "7.0": "volta",
    "7.5": "turing",
    "8": "ampere",
    "8.9": "ada",
    "9": "hopper",
    "10": "blackwell",
    "12": "blackwell",
}

_NAMES = """\
15f0 Quadro GP100
15f7 Tesla P100 PCIe 12GB
15f8 Tesla P100 PCIe 16GB
15f9 Tesla P100 SXM2 16GB
15fc Tesla P100-DGXS-16GB
1b00 TITAN X Pascal
1b01 GeForce GTX 1080 Ti 10GB
1b02 TITAN Xp
1b06 GeForce GTX 1080 Ti
1b30 Quadro P6000
1b38 Tesla P40
1b39 Tesla P10
1b80 GeForce GTX 1080
1b81 GeForce GTX 1070
1b82 GeForce GTX 1070 Ti
1b83 GeForce GTX 1060 6GB
1b84 GeForce GTX 1060 3GB
1ba0 GeForce GTX 1080 Mobile
1ba1 GeForce GTX 1070 Mobile
1ba2 GeForce GTX 1070 Mobile
1bb0 Quadro P5000
1bb1 Quadro P4000
1bb3 Tesla P4
1bb4 Tesla P6
1bb5 Quadro P5200 Mobile
1bb6 Quadro P5000 Mobile
1bb7 Quadro P4000 Mobile
1bb8 Quadro P3000 Mobile
1bb9 Quadro P4200 Mobile
1bbb Quadro P3200 Mobile
1be0 GeForce GTX 1080 Mobile
1be1 GeForce GTX 1070 Mobile
1c02 GeForce GTX 1060 3GB
1c03 GeForce GTX 1060 6GB
1c04 GeForce GTX 1060 5GB
1c06 GeForce GTX 1060 6GB Rev. 2
1c20 GeForce GTX 1060 Mobile
1c21 GeForce GTX 1050 Ti Mobile
1c22 GeForce GTX 1050 Mobile
1c23 GeForce GTX 1060 Mobile Rev. 2
1c30 Quadro P2000
1c31 Quadro P2200
1c60 GeForce GTX 1060 Mobile 6GB
1c61 GeForce GTX 1050 Ti Mobile
1c62 GeForce GTX 1050 Mobile
1c81 GeForce GTX 1050
1c82 GeForce GTX 1050 Ti
1c83 GeForce GTX 1050 3GB
1c8c GeForce GTX 1050 Ti Mobile
1c8d GeForce GTX 1050 Mobile
1c8f GeForce GTX 1050 Ti Max-Q
1c91 GeForce GTX 1050 3 GB Max-Q
1c92 GeForce GTX 1050 Mobile
1cb1 Quadro P1000
1cb2 Quadro P600
1cb3 Quadro P400
1cb6 Quadro P620
1cba Quadro P2000 Mobile
1cbb Quadro P1000 Mobile
1cbc Quadro P600 Mobile
1cbd Quadro P620
1ccc GeForce GTX 1050 Ti Mobile
1ccd GeForce GTX 1050 Mobile
1cfa Quadro P2000
1cfb Quadro P1000
1d33 Quadro P500 Mobile
1d34 Quadro P520
1d81 TITAN V
1db1 Tesla V100 SXM2 16GB
1db2 Tesla V100 DGXS 16GB
1db3 Tesla V100 FHHL 16GB
1db4 Tesla V100 PCIe 16GB
1db5 Tesla V100 SXM2 32GB
1db6 Tesla V100 PCIe 32GB
1db7 Tesla V100 DGXS 32GB
1db8 Tesla V100 SXM3 32GB
1dba Quadro GV100
1dbd Tesla GV100 DGX1-V
1df5 Tesla V100 SXM2 16GB
1df6 Tesla V100S PCIe 32GB
1e02 TITAN RTX
1e03 GeForce RTX 2080 Ti 12GB
1e04 GeForce RTX 2080 Ti
1e07 GeForce RTX 2080 Ti Rev. A
1e30 Quadro RTX 6000/8000
1e35 Tesla T10
1e36 Quadro RTX 6000
1e38 Tesla T40 24GB
1e78 Quadro RTX 6000/8000
1e81 GeForce RTX 2080 SUPER
1e82 GeForce RTX 2080
1e84 GeForce RTX 2070 SUPER
1e87 GeForce RTX 2080 Rev. A
1e89 GeForce RTX 2060
1e90 GeForce RTX 2080 Mobile
1e91 GeForce RTX 2070 SUPER Mobile / Max-Q
1e93 GeForce RTX 2080 SUPER Mobile / Max-Q
1eb0 Quadro RTX 5000
1eb1 Quadro RTX 4000
1eb4 T4G
1eb5 Quadro RTX 5000 Mobile / Max-Q
1eb6 Quadro RTX 4000 Mobile / Max-Q
1eb8 Tesla T4
1ec2 GeForce RTX 2070 SUPER
1ec7 GeForce RTX 2070 SUPER
1ed0 GeForce RTX 2080 Mobile
1ed1 GeForce RTX 2070 SUPER Mobile / Max-Q
1ed3 GeForce RTX 2080 SUPER Mobile / Max-Q
1ef5 Quadro RTX 5000 Mobile Refresh
1f02 GeForce RTX 2070
1f03 GeForce RTX 2060 12GB
1f06 GeForce RTX 2060 SUPER
1f07 GeForce RTX 2070 Rev. A
1f08 GeForce RTX 2060 Rev. A
1f09 GeForce GTX 1660 SUPER
1f0a GeForce GTX 1650
1f10 GeForce RTX 2070 Mobile
1f11 GeForce RTX 2060 Mobile
1f12 GeForce RTX 2060 Max-Q
1f14 GeForce RTX 2070 Mobile / Max-Q Refresh
1f15 GeForce RTX 2060 Mobile
1f36 Quadro RTX 3000 Mobile / Max-Q
1f42 GeForce RTX 2060 SUPER
1f47 GeForce RTX 2060 SUPER
1f50 GeForce RTX 2070 Mobile / Max-Q
1f51 GeForce RTX 2060 Mobile
1f54 GeForce RTX 2070 Mobile
1f55 GeForce RTX 2060 Mobile
1f76 Quadro RTX 3000 Mobile Refresh
1f82 GeForce GTX 1650
1f83 GeForce GTX 1630
1f91 GeForce GTX 1650 Mobile / Max-Q
1f92 GeForce GTX 1650 Mobile
1f94 GeForce GTX 1650 Mobile
1f95 GeForce GTX 1650 Ti Mobile
1f96 GeForce GTX 1650 Mobile / Max-Q
1f99 GeForce GTX 1650 Mobile / Max-Q
1f9d GeForce GTX 1650 Mobile / Max-Q
1fb0 Quadro T1000 Mobile
1fb1 T600
1fb2 Quadro T400 Mobile
1fb6 T600 Laptop GPU
1fb7 T550 Laptop GPU
1fb8 Quadro T2000 Mobile / Max-Q
1fb9 Quadro T1000 Mobile
1fba T600 Mobile
1fbb Quadro T500 Mobile
1fbc T1200 Laptop GPU
1fd9 GeForce GTX 1650 Mobile Refresh
1fdd GeForce GTX 1650 Mobile Refresh
1ff0 T1000 8GB
1ff2 T400 4GB / T400E
1ff9 Quadro T1000 Mobile
20b0 A100 SXM4 40GB
20b1 A100 PCIe 40GB
20b2 A100 SXM4 80GB
20b3 A100-SXM-64GB
20b5 A100 PCIe 80GB
20b7 A30 PCIe
20b8 A100X
20b9 A30X
20bd A800 SXM4 40GB
20f1 A100 PCIe 40GB
20f3 A800-SXM4-80GB
20f5 A800 80GB PCIe
20f6 A800 40GB PCIe
20fd AX800 Converged Accelerator
2182 GeForce GTX 1660 Ti
2184 GeForce GTX 1660
2187 GeForce GTX 1650 SUPER
2188 GeForce GTX 1650
2191 GeForce GTX 1660 Ti Mobile
2192 GeForce GTX 1650 Ti Mobile
21c4 GeForce GTX 1660 SUPER
21d1 GeForce GTX 1660 Ti Mobile
2203 GeForce RTX 3090 Ti
2204 GeForce RTX 3090
2205 GeForce RTX 3080 Ti 20GB
2206 GeForce RTX 3080
2207 GeForce RTX 3070 Ti
2208 GeForce RTX 3080 Ti
220a GeForce RTX 3080 12GB
2216 GeForce RTX 3080 Lite Hash Rate
2230 RTX A6000
2231 RTX A5000
2232 RTX A4500
2233 RTX A5500
2235 A40
2236 A10
2237 A10G
2238 A10M
230e H20 NVL16
2313 H100 CNX
2321 H100L 94GB
2322 H800 PCIe
2324 H800
2328 H20B
2329 H20
232c H20 HBM3e
2330 H100 SXM5 80GB
2331 H100 PCIe
2335 H200 SXM 141GB
2336 H100
2337 H100 SXM5 64GB
2338 H100 SXM5 96GB
2339 H100 SXM5 94GB
233a H800L 94GB
233b H200 NVL
233d H100 96GB
2342 GH200 120GB / 480GB
2348 GH200 144G HBM3e
2414 GeForce RTX 3060 Ti
2420 GeForce RTX 3080 Ti Mobile
2438 RTX A5500 Laptop GPU
2460 GeForce RTX 3080 Ti Laptop GPU
2482 GeForce RTX 3070 Ti
2484 GeForce RTX 3070
2486 GeForce RTX 3060 Ti
2487 GeForce RTX 3060
2488 GeForce RTX 3070 Lite Hash Rate
2489 GeForce RTX 3060 Ti Lite Hash Rate
248c GeForce RTX 3070 Ti
248d GeForce RTX 3070
248e GeForce RTX 3060 Ti
249c GeForce RTX 3080 Mobile / Max-Q 8GB/16GB
249d GeForce RTX 3070 Mobile / Max-Q
24a0 Geforce RTX 3070 Ti Laptop GPU
24b0 RTX A4000
24b1 RTX A4000H
24b6 RTX A5000 Mobile
24b7 RTX A4000 Mobile
24b8 RTX A3000 Mobile
24b9 RTX A3000 12GB Laptop GPU
24ba RTX A4500 Laptop GPU
24bb RTX A3000 Laptop GPU
24c7 GeForce RTX 3060 8GB
24c8 GeForce RTX 3070 GDDR6X
24c9 GeForce RTX 3060 Ti GDDR6X
24dc GeForce RTX 3080 Mobile / Max-Q 8GB/16GB
24dd GeForce RTX 3070 Mobile / Max-Q
24e0 Geforce RTX 3070 Ti Laptop GPU
24fa RTX A4500 Embedded GPU
2501 GeForce RTX 3060
2503 GeForce RTX 3060
2504 GeForce RTX 3060 Lite Hash Rate
2507 Geforce RTX 3050
2508 GeForce RTX 3050 OEM
2509 GeForce RTX 3060 12GB Rev. 2
2520 GeForce RTX 3060 Mobile / Max-Q
2521 GeForce RTX 3060 Laptop GPU
2523 GeForce RTX 3050 Ti Mobile / Max-Q
2531 RTX A2000
2544 GeForce RTX 3060
2560 GeForce RTX 3060 Mobile / Max-Q
2561 GeForce RTX 3060 Laptop GPU
2563 GeForce RTX 3050 Ti Mobile / Max-Q
2571 RTX A2000 12GB
2582 GeForce RTX 3050 8GB
2583 GeForce RTX 3050 4GB
2584 GeForce RTX 3050 6GB
25a0 GeForce RTX 3050 Ti Mobile
25a2 GeForce RTX 3050 Mobile
25a5 GeForce RTX 3050 Mobile
25a9 GeForce RTX 2050
25ab GeForce RTX 3050 4GB Laptop GPU
25ac GeForce RTX 3050 6GB Laptop GPU
25ad GeForce RTX 2050
25b0 RTX A1000
25b2 RTX A400
25b5 RTX A4 Mobile
25b6 A2 / A16
25b8 RTX A2000 Mobile
25b9 RTX A1000 Laptop GPU
25ba RTX A2000 8GB Laptop GPU
25bb RTX A500 Laptop GPU
25bc RTX A1000 6GB Laptop GPU
25bd RTX A500 Laptop GPU
25e0 GeForce RTX 3050 Ti Mobile
25e2 GeForce RTX 3050 Mobile
25e5 GeForce RTX 3050 Mobile
25ec GeForce RTX 3050 6GB Laptop GPU
25ed GeForce RTX 2050
25f9 RTX A1000 Embedded GPU
25fa RTX A2000 Embedded GPU
25fb RTX A500 Embedded GPU
2681 RTX TITAN Ada
2684 GeForce RTX 4090
2685 GeForce RTX 4090 D
2689 GeForce RTX 4070 Ti SUPER
26b1 RTX 6000 Ada Generation
26b2 RTX 5000 Ada Generation
26b3 RTX 5880 Ada Generation
26b5 L40
26b7 L20
26b8 L40G
26b9 L40S
26ba L20
26bb L30
26f5 L40 CNX
2702 GeForce RTX 4080 SUPER
2703 GeForce RTX 4080 SUPER
2704 GeForce RTX 4080
2705 GeForce RTX 4070 Ti SUPER
2709 GeForce RTX 4070
2717 GeForce RTX 4090 Laptop GPU
2730 RTX 5000 Ada Generation Laptop GPU
2757 GeForce RTX 4090 Laptop GPU
2770 RTX 5000 Ada Generation Embedded GPU
2782 GeForce RTX 4070 Ti
2783 GeForce RTX 4070 SUPER
2786 GeForce RTX 4070
2788 GeForce RTX 4060 Ti
27a0 GeForce RTX 4080 Max-Q / Mobile
27b0 RTX 4000 SFF Ada Generation
27b1 RTX 4500 Ada Generation
27b2 RTX 4000 Ada Generation
27b6 L2
27b7 L16
27b8 L4
27ba RTX 4000 Ada Generation Laptop GPU
27bb RTX 3500 Ada Generation Laptop GPU
27e0 GeForce RTX 4080 Max-Q / Mobile
27fa RTX 4000 Ada Generation Embedded GPU
27fb RTX 3500 Ada Generation Embedded GPU
2803 GeForce RTX 4060 Ti
2805 GeForce RTX 4060 Ti 16GB
2808 GeForce RTX 4060
2820 GeForce RTX 4070 Max-Q / Mobile
2822 GeForce RTX 3050 A Laptop GPU
2838 RTX 3000 Ada Generation Laptop GPU
2860 GeForce RTX 4070 Max-Q / Mobile
2878 RTX 3000 Ada Generation Embedded GPU
2882 GeForce RTX 4060
28a0 GeForce RTX 4060 Max-Q / Mobile
28a1 GeForce RTX 4050 Max-Q / Mobile
28a3 GeForce RTX 3050 A Laptop GPU
28b0 RTX 2000 / 2000E Ada Generation
28b8 RTX 2000 Ada Generation Laptop GPU
28b9 RTX 1000 Ada Generation Laptop GPU
28ba RTX 500 Ada Generation Laptop GPU
28bb RTX 500 Ada Generation Laptop GPU
28e0 GeForce RTX 4060 Max-Q / Mobile
28e1 GeForce RTX 4050 Max-Q / Mobile
28e3 GeForce RTX 3050 A Laptop GPU
28f8 RTX 2000 Ada Generation Embedded GPU
2901 B200
2941 HGX GB200
29bc B100
2b85 GeForce RTX 5090
2b87 GeForce RTX 5090 D
2bb1 RTX PRO 6000 Blackwell Workstation Edition
2bb3 RTX PRO 5000 Blackwell
2bb4 RTX PRO 6000 Blackwell Max-Q Workstation Edition
2bb5 RTX PRO 6000 Blackwell Server Edition
2c02 GeForce RTX 5080
2c05 GeForce RTX 5070 Ti
2c18 GeForce RTX 5090 Max-Q / Mobile
2c19 GeForce RTX 5080 Max-Q / Mobile
2c38 RTX PRO 5000 Blackwell Generation Laptop GPU
2c39 RTX PRO 4000 Blackwell Generation Laptop GPU
2c58 GeForce RTX 5090 Max-Q / Mobile
2c59 GeForce RTX 5080 Max-Q / Mobile
2d04 GeForce RTX 5060 Ti
2d05 GeForce RTX 5060
2d18 GeForce RTX 5070 Max-Q / Mobile
2d19 GeForce RTX 5060 Max-Q / Mobile
2d39 RTX PRO 2000 Blackwell Generation Laptop GPU
2d58 GeForce RTX 5070 Max-Q / Mobile
2d59 GeForce RTX 5060 Max-Q / Mobile
2d98 GeForce RTX 5050 Max-Q / Mobile
2db8 RTX PRO 1000 Blackwell Generation Laptop GPU
2db9 RTX PRO 500 Blackwell Generation Laptop GPU
2dd8 GeForce RTX 5050 Max-Q / Mobile
2f04 GeForce RTX 5070
2f18 GeForce RTX 5070 Ti Mobile
2f38 RTX PRO 3000 Blackwell Generation Laptop GPU
2f58 GeForce RTX 5070 Ti Mobile
"""

_BY_DEVICE_ID = dict(line.split(" ", 1) for line in _NAMES.splitlines())


def card_name(pci_device_id: str) -> str:
    """Return the card's name for an id such as ``10de:2684``, or the id itself where the table lacks it."""
    vendor, _colon, device = pci_device_id.lower().partition(":")
    name = _BY_DEVICE_ID.get(device) if vendor == NVIDIA_VENDOR_ID else None
    return f"NVIDIA {name}" if name else pci_device_id


_GENERATIONS = [
    (int(first, 16), int(last, 16), generation, None if capability == "-" else capability)
    for first, last, generation, capability in (line.split() for line in _RANGES.splitlines())
]


def card_generation(
    pci_device_id: str, compute_capability: Optional[str] = None
) -> tuple[Optional[str], Optional[str]]:
    """Return the generation (``ada``) and compute capability (``8.9``) of a card, null where unknown.

    ``compute_capability`` is what the driver says: it stands, and tells the generation of an unknown id.
    """
    vendor, _colon, device = pci_device_id.lower().partition(":")
    if vendor == NVIDIA_VENDOR_ID:
        for first, last, generation, capability in _GENERATIONS:
            if first <= int(device, 16) <= last:
                return generation, compute_capability or capability
    if compute_capability is None:
        return None, None
    major = compute_capability.partition(".")[0]
    return _BY_CAPABILITY.get(compute_capability, _BY_CAPABILITY.get(major)), compute_capability
