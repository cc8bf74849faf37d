"""Where a network loses time against its operation count: roofline, waterline and efficiency gap of any module.

Lavin: "On the Efficiency of Convolutional Neural Networks", 2024, arXiv 2404.03617. Latency is operations over peak
throughput times efficiency, and a kernel's efficiency is bounded by its operational intensity, operations over bytes
of memory traffic, relative to the machine's balance, peak operations over bandwidth. The formulas here are this
library's reading of the paper.

Operations count two for a multiply-add. A kernel reads its inputs and weights once and writes its output once; norms,
activations, additions and biases ride along with the kernel before them, as folding and fusion make them.
"""

from convatlas.analysis.waterline.gap import EfficiencyGap, GapRow, efficiency_gap
from convatlas.analysis.waterline.layers import LayerCost, LayerCosts, halo_overlap, layer_costs
from convatlas.analysis.waterline.machines import MACHINES, Machine, find_machine, measure_machine
from convatlas.analysis.waterline.roofline import Bar, Waterline, roofline, waterline, waterline_section

__all__ = [
    "MACHINES",
    "Bar",
    "EfficiencyGap",
    "GapRow",
    "LayerCost",
    "LayerCosts",
    "Machine",
    "Waterline",
    "efficiency_gap",
    "find_machine",
    "halo_overlap",
    "layer_costs",
    "measure_machine",
    "roofline",
    "waterline",
    "waterline_section",
]
