"""UniRepLKNet: its block and network, the front ends of other modalities, receptive fields and shape bias."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.analysis.effective_receptive_field import contribution_map, erf_area, log_contributions
from convatlas.analysis.shape_bias import CATEGORIES, category_probabilities, shape_bias
from convatlas.networks.unireplknet.audio import LogMelFrontEnd
from convatlas.networks.unireplknet.backbone import (
    MergedUniRepLKNetBlock,
    UniRepLKNet,
    UniRepLKNetBlock,
    UniRepLKNetConfig,
)
from convatlas.networks.unireplknet.corrformer import CorrformerDecoder
from convatlas.networks.unireplknet.points import PointToImage
from convatlas.networks.unireplknet.video import video_to_image
from convatlas.nn.mixers.dilated_reparam import DilatedReparamBlock
from convatlas.surgery import merge
from golden.cases import Case, renamed


def run(case: Case) -> dict[str, Tensor]:
    makers = {
        "DilatedReparamBlock": _reparam,
        "UniRepLKNetBlock": _block,
        "UniRepLKNet": _network,
        "ERF": _receptive_field,
        "cue-conflict": _shape_bias,
        "(B,C,T": _video,
        "wav": _filter_bank,
        "Corrformer Decoder": _decoder,
        "ProjEnc": _projection,
    }
    what = str(case.config.get("cls") or case.config["op"])
    kind = what if what in makers else next((kind for kind in makers if what.startswith(kind)), what)
    if kind not in makers:
        raise KeyError(f"{case.system}/{case.name}: the adapter does not know {what}")
    results = makers[kind](case)
    return {name: results[name] for name in case.outputs}


def _gradients(case: Case, layer: nn.Module, x: Tensor, output: Tensor) -> dict[str, Tensor]:
    if "cotangent" not in case.inputs:
        return {}
    found = case.gradients(layer, output, {"grad_input": x})
    return {
        name: value.reshape(case.outputs[name].shape) if name in case.outputs else value
        for name, value in found.items()
    }


def _training(case: Case, layer: nn.Module) -> nn.Module:
    mode = case.config.get("mode", "eval")
    return layer.train(mode.startswith("train"))


def _reparam(case: Case) -> dict[str, Tensor]:
    case.only("cls", "channels", "kernel_size", "deploy", "mode", "kernel_sizes", "dilates", "attempt_use_lk_impl")
    config = case.config
    layer = DilatedReparamBlock(
        config["channels"],
        config["kernel_size"],
        kernel_sizes=config.get("kernel_sizes"),
        dilations=config.get("dilates"),
    )
    if config.get("deploy"):
        layer = layer.merged()
        layer.layouts = {"authors": UniRepLKNetBlock.layouts["authors_deployed"]}
    layer = _training(case, case.load(layer))
    x = case.inputs["x"].requires_grad_("cotangent" in case.inputs)
    output = layer(x)
    results = {"output": output, **_gradients(case, layer, x, output)}
    plain: Any = layer if config.get("deploy") else layer.eval().merged()
    return {**results, "merged_weight": plain.weight, "merged_bias": plain.bias}


def _block(case: Case) -> dict[str, Tensor]:
    case.only("cls", "dim", "kernel_size", "deploy", "mode", "layer_scale_init_value", "drop_path", "ffn_factor")
    config = case.config
    options = {"expansion": config.get("ffn_factor", 4)}
    if config.get("deploy"):
        block: nn.Module = MergedUniRepLKNetBlock(config["dim"], config["kernel_size"], **options)
    else:
        scale = 1e-6 if "gamma" in case.weights else None
        block = UniRepLKNetBlock(config["dim"], config["kernel_size"], layer_scale_init=scale, **options)
    block = _training(case, case.load(block))
    x = case.inputs["x"].requires_grad_("cotangent" in case.inputs)
    output = block(x)
    results = {"output": output, **_gradients(case, block, x, output)}
    merged = merge(block, x.detach()).model
    state = merged.state_dict()
    for name, expected in case.outputs.items():
        if name.startswith("deploy."):
            key = name.removeprefix("deploy.").replace("lk_origin.", "")
            results[name] = state[renamed(merged, key)].reshape(expected.shape)
    return results


def _config(case: Case, **changes: Any) -> UniRepLKNetConfig:
    config = case.config
    return UniRepLKNetConfig(
        depths=tuple(config["depths"]),
        dims=tuple(config["dims"]),
        kernel_sizes=tuple(tuple(stage) for stage in config["kernel_sizes"]),
        in_channels=config.get("in_chans", case.weights["downsample_layers.0.0.weight"].shape[1]),
        num_classes=len(case.weights["head.weight"]) if "head.weight" in case.weights else 0,
        layer_scale_init=1e-6 if any(key.endswith(".gamma") and ".act." not in key for key in case.weights) else None,
        dense="norm0.weight" in case.weights,
        deploy=config.get("deploy", False),
        **changes,
    )


def _network(case: Case) -> dict[str, Tensor]:
    case.only("cls", "depths", "dims", "num_classes", "kernel_sizes", "in_chans", "deploy")
    model = case.load(UniRepLKNet(_config(case)))
    features = model.forward_features(case.inputs["x"])
    results = {f"stage{index}": feature for index, feature in enumerate(features)}
    return {**results, "logits": model.forward_head(features[-1])}


def _receptive_field(case: Case) -> dict[str, Tensor]:
    case.only("cls", "thresholds", "depths", "dims", "kernel_sizes", "note", "in_chans", "deploy")
    model = case.load(UniRepLKNet(_config(case)))
    contributions = contribution_map(model, case.inputs["images"])
    areas = erf_area(contributions, case.config["thresholds"])
    return {
        "mean_map": contributions,
        "log_map": log_contributions(contributions),
        "side": torch.tensor([-1 if area.side is None else area.side for area in areas]),
        "area_ratio": torch.tensor([-1.0 if area.ratio is None else area.ratio for area in areas], dtype=torch.float64),
    }


def _shape_bias(case: Case) -> dict[str, Tensor]:
    case.only("op", "categories", "aggregation")
    if tuple(case.config["categories"]) != tuple(CATEGORIES) or not case.config["aggregation"].startswith("mean"):
        raise KeyError(f"{case.system}/{case.name}: the adapter handles the mean over the 16 categories only")
    logits = case.inputs["logits"]
    found = shape_bias(logits, case.inputs["shape_label"], case.inputs["texture_label"])
    return {
        "category_probability": category_probabilities(logits.softmax(1)),
        "decision": found.decisions,
        "shape_hits": torch.tensor(found.shape_hits),
        "texture_hits": torch.tensor(found.texture_hits),
        "shape_bias": torch.tensor(found.bias),
    }


def _video(case: Case) -> dict[str, Tensor]:
    case.only("op")
    return {"image": video_to_image(case.inputs["video"])}


def _filter_bank(case: Case) -> dict[str, Tensor]:
    keys = ("sample_rate", "num_mel_bins", "window", "shift_ms", "target_length", "norm_mean", "norm_std")
    case.only("op", *keys)
    config = case.config
    if config.get("window", "hanning 25 ms") != "hanning 25 ms" or config.get("shift_ms", 10) != 10:
        raise KeyError(f"{case.system}/{case.name}: the adapter handles Hann windows of 25 ms every 10 ms only")
    front_end = LogMelFrontEnd(
        config["sample_rate"],
        num_filters=config["num_mel_bins"],
        target_length=config["target_length"],
        mean=config["norm_mean"],
        std=config["norm_std"],
    )
    waveform = case.inputs["waveform"]
    bank, normalised = front_end.filter_bank(waveform), front_end(waveform)
    if case.outputs["fbank"].dim() == 2:
        bank, normalised = bank.squeeze(0), normalised.squeeze(0)
    return {"fbank": bank, "normalized": normalised}


def _projection(case: Case) -> dict[str, Tensor]:
    sizes = ("N", "num_views", "obj_size", "img_size", "local_size", "trans_dim", "graph_dim", "imgblock_dim")
    case.only("cls", *sizes, "atten_fusion", "euler_views")
    config = case.config
    if config.get("atten_fusion"):
        raise KeyError(f"{case.system}/{case.name}: the adapter does not know the reference's names in the fusion")
    front_end = PointToImage(
        config["num_views"],
        grid_size=config["obj_size"],
        image_size=config["img_size"],
        neighbours=config["local_size"],
        point_channels=config["trans_dim"],
        edge_channels=config["graph_dim"],
        channels=len(case.weights["proj_layer.weight"]),
        fusion=False,
    )
    front_end = case.load(front_end)
    points = case.inputs["points"]
    return {"image": front_end(points), "view_points": front_end.view_points(points)}


def _decoder(case: Case) -> dict[str, Tensor]:
    sizes = ("d_model", "n_heads", "dec_len", "cross_len", "node_num", "node_list", "c_out", "d_ff")
    case.only("cls", *sizes, "moving_avg", "activation", "factor")
    config = case.config
    acts = {"gelu": F.gelu, "relu": F.relu}
    layers = {key.split(".network.")[1].split(".")[0] for key in case.weights if ".network." in key}
    decoder = CorrformerDecoder(
        config["d_model"],
        config["n_heads"],
        config["c_out"],
        length=config["dec_len"],
        tree=config["node_list"],
        depth=len({key.split(".")[1] for key in case.weights if key.startswith("layers.")}),
        window=config["moving_avg"],
        hidden_channels=config["d_ff"],
        factor=config["factor"],
        num_layers=len(layers),
        act=acts[config["activation"]],
    )
    decoder = case.load(decoder)
    seasonal, trend = decoder(case.inputs["x"], case.inputs["cross"], case.inputs["trend"])
    return {"seasonal": seasonal, "trend": trend}
