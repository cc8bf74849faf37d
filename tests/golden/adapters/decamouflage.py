"""Decamouflage: scaling matrices, the attack's two programmes, detectors, spectra and thresholds."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from convatlas.ops.colour import rgb_to_gray
from convatlas.ops.rank_filters import maximum_filter, minimum_filter
from convatlas.ops.spectral_points import log_spectrum, spectral_mask, spectral_points
from convatlas.robustness.decamouflage import (
    METRICS,
    Decamouflage,
    Threshold,
    black_box_threshold,
    white_box_threshold,
)
from convatlas.robustness.scaling_attack import Scaler, ScalingAttack
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    if "sizes" in config:
        return _matrices(case)
    if "csp_threshold" in config:
        return _thresholds(case)
    if "source" in inputs:
        return _attack(case)
    if "low" in config:
        return _detectors(case)
    if "ratio" in config or "size" in config:
        return _steganalysis(case)
    raise KeyError(f"{case.system}/{case.name}: the adapter does not know such a case")


def _unknown(case: Case, output: str) -> KeyError:
    return KeyError(f"{case.system}/{case.name}: the adapter does not know the output {output}")


def _matrices(case: Case) -> dict[str, Tensor]:
    case.only("sizes", "note")
    results = {}
    for name in case.outputs:
        match = re.fullmatch(r"(\w+?)_(\w+)_(\d+)to(\d+)", name)
        if match is None:
            raise _unknown(case, name)
        library, algorithm, length, size = match.groups()
        results[name] = Scaler.of(library, algorithm).matrix(int(length), int(size))
    return results


def _attack(case: Case) -> dict[str, Tensor]:
    case.only("lib", "alg", "eps")
    eps = case.config.get("eps", 1.0)
    attack = ScalingAttack(
        Scaler.of(case.config["lib"], case.config["alg"]), tuple(eps) if isinstance(eps, list) else eps
    )
    # Colours come last there, first here.
    source, target, columns = (
        values.movedim(-1, 0) if values.dim() == 3 else values
        for values in (case.inputs["source"], case.inputs["target"], case.outputs["step1_rounded"])
    )
    scaled = attack.scaled_in_width(source, target.shape[-1])
    change1, change2 = attack.change_of_columns(scaled, target), attack.change_of_rows(source, columns)
    made = torch.from_numpy(attack.generate(case.inputs["source"].numpy(), case.inputs["target"].numpy()))
    results = {
        "source_scaled_horizontally": scaled,
        "step1_unrounded": scaled + change1,
        "step1_rounded": (scaled + change1).round().clamp(0, 255),
        "step2_unrounded": source + change2,
        "objective1": change1.square().sum(-2) / 2,
        "objective2": change2.square().sum(-1) / 2,
        "scaled_attack": attack.scaler.resize(made.movedim(-1, 0) if made.dim() == 3 else made, target.shape[-2:]),
    }
    results = {name: values.movedim(0, -1) if source.dim() == 3 else values for name, values in results.items()}
    results["attack"] = made
    return {name: results[name] for name in case.outputs}


def _detectors(case: Case) -> dict[str, Tensor]:
    case.only("low", "lib", "alg", "eps")
    scaler = Scaler.of(case.config["lib"], case.config["alg"])
    detector = Decamouflage(tuple(case.config["low"]), scaler)
    results: dict[str, Tensor] = {}
    for name, image in case.inputs.items():
        x = image.movedim(-1, 0) if image.dim() == 3 else image[None]
        gray = rgb_to_gray(x, "opencv")[0] if len(x) == 3 else x[0]
        pictures = {
            "down": scaler.resize(x, detector.size),
            "up": detector.rescaled(x),
            "minf": minimum_filter(x, 3),
            "maxf": maximum_filter(x, 3),
        }
        results |= {
            f"{name}_{kind}": each.movedim(0, -1) if image.dim() == 3 else each[0] for kind, each in pictures.items()
        }
        results |= {f"{name}_gray": gray, f"{name}_spectrum_uint8": log_spectrum(gray).round().clamp(0, 255)}
        metrics = [metric for metric in METRICS if f"{name}_{metric}" in case.outputs]
        results |= {f"{name}_{metric}": value[0] for metric, value in detector.scores(x[None], metrics).items()}
        for output in case.outputs:
            if match := re.fullmatch(rf"{name}_csp_(\d+)(_pixels)?", output):
                mask = spectral_mask(gray, float(match[1]))
                results[output] = mask.sum() if match[2] else spectral_points(mask)
    return {name: results[name] for name in case.outputs}


def _steganalysis(case: Case) -> dict[str, Tensor]:
    case.only("size", "ratio", "alg")
    results = {}
    for output in case.outputs:
        match = re.fullmatch(r"(\w+)_(csp|pixels|spectrum_row)_?(\d+)", output)
        if match is None:
            raise _unknown(case, output)
        name, kind, number = match[1], match[2], int(match[3])
        image = case.inputs[name]
        gray = rgb_to_gray(image.movedim(-1, 0), "opencv")[0] if image.dim() == 3 else image
        if kind == "spectrum_row":
            results[output] = log_spectrum(gray)[number].round().clamp(0, 255)
        else:
            mask = spectral_mask(gray, number)
            results[output] = mask.sum() if kind == "pixels" else spectral_points(mask)
    return results


def _thresholds(case: Case) -> dict[str, Tensor]:
    case.only("csp_threshold", "percentile")
    if case.config.get("percentile", "numpy linear") != "numpy linear":
        raise KeyError(f"{case.system}/{case.name}: the adapter knows no percentile {case.config['percentile']}")
    scores = {name: values.double() for name, values in case.inputs.items()}
    # What the reference calls mse and ssim is judged like our metrics of scaling.
    ours = {"mse": "scaling_mse", "ssim": "scaling_ssim", "csp": "csp"}
    results: dict[str, float | Tensor] = {}
    thresholds = {"csp": Threshold("csp", "above", float(case.config["csp_threshold"]))}
    for metric in ("mse", "ssim"):
        direction = METRICS[ours[metric]]
        value, accuracy = white_box_threshold(scores[f"benign_{metric}"], scores[f"attack_{metric}"], direction)
        results |= {f"whitebox_{metric}_threshold": value, f"whitebox_{metric}_accuracy": accuracy}
        thresholds[ours[metric]] = Threshold(ours[metric], direction, value)
    for output in case.outputs:
        if match := re.fullmatch(r"blackbox_(mse|ssim)_p(\d+)", output):
            direction = METRICS[ours[match[1]]]
            results[output] = black_box_threshold(scores[f"benign_{match[1]}"], float(match[2]), direction)
    detector = Decamouflage(methods=tuple(thresholds), thresholds=thresholds)
    for kind in ("benign", "attack"):
        rows = zip(*(scores[f"{kind}_{metric}"].tolist() for metric in ours), strict=True)
        votes = [detector.vote(dict(zip(ours.values(), row, strict=True))).attack for row in rows]
        results[f"ensemble_{kind}"] = torch.tensor(votes)
    benign, attack = (torch.as_tensor(results[f"ensemble_{kind}"]).double() for kind in ("benign", "attack"))
    results |= {"frr": benign.mean(), "far": 1 - attack.mean()}
    results["accuracy"] = torch.cat([1 - benign, attack]).mean()
    return {name: torch.as_tensor(results[name], dtype=torch.float64) for name in case.outputs}
