"""ConvFirst: the blocks, and the operations, bytes and attainable times of blocks on a machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convatlas.analysis.waterline import Machine, Waterline, layer_costs, waterline
from convatlas.networks.convfirst import ConvFirstBlock, FusedMBConvBlock, MBConvBlock, MLPBlock
from convatlas.networks.convnext import ConvNeXtBlock
from golden.cases import Case

_BLOCKS = {"ConvFirst": ConvFirstBlock, "MBConv": MBConvBlock, "FusedMBConv": FusedMBConvBlock, "MLP": MLPBlock}
_NAMES = {"expansion_ratio": "expansion", "expansion": "expansion"}


def run(case: Case) -> dict[str, Tensor]:
    return _block(case) if "cls" in case.config else _roofline(case)


def _block(case: Case) -> dict[str, Tensor]:
    case.only(
        *("cls", "in_channels", "out_channels", "kernel_size", "stride", "group_width", "act"),
        *("expansion_ratio", "expansion"),
    )
    options = {_NAMES.get(key, key): value for key, value in case.config.items() if key not in ("cls", "act")}
    options.setdefault("out_channels", options["in_channels"])
    act = getattr(nn, case.config.get("act", "SiLU"))
    block = case.load(_made(case.config["cls"], **options, act=act))
    x = case.inputs["x"].requires_grad_("cotangent" in case.inputs)
    output = block(x)
    if "cotangent" not in case.inputs:
        return {"output": output}
    found = {"output": output, **case.gradients(block, output, {"grad_input": x})}
    return {name: tensor for name, tensor in found.items() if name in case.outputs}


def _made(kind: str, **options: Any) -> nn.Module:
    """The block of that name; a block without a spatial or a grouped convolution takes no such options."""
    kind = kind.removesuffix("Block")
    if kind == "ConvNeXt":
        channels = options["in_channels"]
        if options.get("stride", 1) != 1 or options["out_channels"] != channels:
            raise KeyError("a ConvNeXt block keeps the shape of its input")
        block = ConvNeXtBlock(channels, kernel_size=options.get("kernel_size", 7))
        hidden = options.get("expansion", 4) * channels
        block.pwconv1, block.pwconv2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        return block
    without = {"MLP": ("kernel_size", "stride", "group_width"), "FusedMBConv": ("group_width",)}.get(kind, ())
    return _BLOCKS[kind](**{key: value for key, value in options.items() if key not in without})


def _roofline(case: Case) -> dict[str, Tensor]:
    case.only("columns", "rows", "bytes_per_element", "peak_ops_per_s", "dram_bytes_per_s", "op")
    config = case.config
    machine = Machine(config["peak_ops_per_s"], config["dram_bytes_per_s"])
    lines: list[tuple[Waterline, Waterline]] = []
    for values in config["rows"]:
        row = dict(zip(config["columns"], values, strict=True))
        options = {"kernel_size": "R", "stride": "stride", "group_width": "group_width", "expansion": "expansion"}
        options = {name: row[key] for name, key in options.items() if key in row}
        with torch.device("meta"):
            block = _made(row["kind"], in_channels=row["C"], out_channels=row["K"], **options)
            x = torch.empty(row["N"], row["C"], row["H"], row["W"])
        costs = layer_costs(block, x, bytes_per_element=config["bytes_per_element"])
        lines.append((waterline(costs, machine), waterline(costs, machine, fused=[type(block)])))
    layers = [[bar.layer for bar in line.bars] for line, _ in lines]
    results = {
        "ops_per_layer": _table([[layer.ops for layer in row] for row in layers]),
        "bytes_per_layer": _table([[layer.bytes for layer in row] for row in layers]),
        "total_ops": [line.ops for line, _ in lines],
        "time_unfused": [line.attainable for line, _ in lines],
        "attainable_efficiency_unfused": [line.efficiency for line, _ in lines],
        "fused_bytes": [fused.bytes for _, fused in lines],
        "time_fused": [fused.attainable for _, fused in lines],
        "attainable_efficiency_fused": [fused.efficiency for _, fused in lines],
    }
    return {name: torch.tensor(values, dtype=case.dtype) for name, values in results.items() if name in case.outputs}


def _table(rows: list[list[float]]) -> list[list[float]]:
    """Rows of three layers; what a block does not have is 0."""
    return [row + [0.0] * (3 - len(row)) for row in rows]
