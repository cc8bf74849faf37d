"""STDO: the network WDSR, and the division of a video into chunks by PSNR."""

from __future__ import annotations

import torch
from torch import Tensor

from convatlas.networks.wdsr import WDSRConfig
from convatlas.restoration.video_chunks import PatchGrid, chunk_by_psnr, patch_errors, patch_psnr, whole_psnr
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    if "size_h" in case.config:
        return _chunking(case)
    if "num_residual_units" in case.config:
        return _network(case)
    raise KeyError(f"{case.system}/{case.name}: the adapter does not know such a case")


def _network(case: Case) -> dict[str, Tensor]:
    case.only("scale", "num_residual_units", "num_blocks", "width_multiplier", "temporal_size", "num_channels")
    config, x = case.config, case.inputs["x"]
    frames = config.get("temporal_size") or 1
    model = WDSRConfig(
        scale=config["scale"],
        in_channels=config.get("num_channels", 3),
        frames=frames,
        dim=config["num_residual_units"],
        depth=config["num_blocks"],
        expansion=config["width_multiplier"],
    ).build()
    case.load(model)
    # A burst has an axis of its frames, whose channels the reference joins.
    joined = x.flatten(1, 2) if x.dim() == 5 else x
    if "cotangent" not in case.inputs:
        y = model(joined)
        return {"y": y.unsqueeze(2) if x.dim() == 5 else y}
    given = joined.requires_grad_()
    y = model(given).reshape(case.inputs["cotangent"].shape)
    found = {"y": y, **case.gradients(model, y, {"grad_input": given})}
    found["grad_input"] = found["grad_input"].reshape(x.shape)
    return {name: found[name] for name in case.outputs}


def _chunking(case: Case) -> dict[str, Tensor]:
    case.only("T", "H", "W", "size_h", "size_w", "scale", "shave", "k")
    config = case.config
    grid = PatchGrid(config["size_h"], config["size_w"])
    errors = patch_errors(
        case.inputs["sr_float"], case.inputs["hr_uint8"], grid, shave=config.get("shave", config["scale"] + 4)
    )
    labels = patch_psnr(errors)
    found = {"labels_psnr": labels, "patch_mse": errors, "psnr_whole": torch.tensor(whole_psnr(errors))}
    counts = config["k"] if isinstance(config["k"], list) else [config["k"]]
    for k in counts:
        chunks = chunk_by_psnr(labels, k)
        found[f"chunk_k{k}"] = torch.from_numpy(chunks.index)
        found[f"thresholds_k{k}"] = torch.from_numpy(chunks.thresholds)
    return found
