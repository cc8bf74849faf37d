"""nnAudio: every layer, its kernels, and the gradients of trained ones; each by its name in the configuration."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from convatlas.nn import spectrogram
from golden.cases import Case

_CQT = {
    *("sr", "hop_length", "fmin", "fmax", "n_bins", "bins_per_octave", "filter_scale", "norm", "basis_norm", "window"),
    *("center", "pad_mode", "gamma", "earlydownsample", "trainable", "trainable_STFT", "trainable_CQT"),
    "output_format",
}
_STFT = {
    *("n_fft", "win_length", "freq_bins", "hop_length", "window", "freq_scale", "center", "pad_mode", "iSTFT"),
    *("fmin", "fmax", "sr", "trainable", "output_format"),
}
#: Smaller magnitudes have no phase.
_NO_PHASE = 1e-3


def run(case: Case) -> dict[str, Tensor]:
    config, outputs = case.config, case.outputs
    cls = config.get("cls", "")
    if {"fr", "fs", "fc", "tc"} & set(config) or "Periodicity" in cls or "CFP" in cls:
        results = _periodicity(case)
    elif "magnitude" in case.inputs:
        results = _griffin_lim(case)
    elif "iSTFT" in cls and "STFT" != cls:
        results = _inverse(case)
    elif cls == "STFT":
        results = _stft(case)
    elif "n_fft" in config:
        results = _bands(case)
    else:
        results = _constant_q(case)
    return {name: results[name] for name in outputs}


def _built(kind: str, options: dict[str, Any], case: Case) -> nn.Module:
    if isinstance(options.get("window"), list):
        options = {**options, "window": tuple(options["window"])}
    return getattr(spectrogram, kind)(**options, dtype=case.dtype)


def _options(case: Case, allowed: set[str], *others: str) -> dict[str, Any]:
    case.only("cls", "note", *allowed, *others)
    return {key: value for key, value in case.config.items() if key in allowed}


def _phase(ours: Tensor, size: Tensor, expected: Tensor) -> Tensor:
    """A phase where there is one, and what is expected where there is none."""
    return torch.where(size > _NO_PHASE, ours, expected.to(ours))


def _stft(case: Case) -> dict[str, Tensor]:
    layer = _built("STFT", {**_options(case, _STFT), "legacy_inverse": True}, case)
    if case.weights:
        case.load(layer)
    x = case.inputs["x"].requires_grad_("cotangent" in case.inputs)
    results: dict[str, Tensor] = {"output": layer(x)}
    for name in case.outputs:
        if name in ("complex", "magnitude", "phase"):
            results[name] = layer(x, name.capitalize())
        elif name.startswith("inverse"):
            length = re.search(r"_length(\d+)", name)
            given = case.inputs.get("X", layer(x, "Complex"))
            results[name] = layer.inverse(given, length=int(length[1]) if length else None)
    if "phase" in results:
        # Angles that differ by whole turns are the same.
        ours, expected = results["phase"], case.outputs["phase"]
        ours = ours + 2 * torch.pi * ((expected - ours) / (2 * torch.pi)).round()
        results["phase"] = _phase(ours, layer(x, "Magnitude"), expected)
    results |= dict(layer.named_buffers())
    if "cotangent" in case.inputs:
        form = layer.output_format.lower()
        results |= case.gradients(layer, results.get(form, layer(x)), {"grad_input": x})
    return results


def _inverse(case: Case) -> dict[str, Tensor]:
    allowed = (_STFT | {"trainable_kernels", "trainable_window"}) - {"pad_mode", "iSTFT", "trainable", "output_format"}
    options = _options(case, allowed, "onesided", "length")
    layer = _built("iSTFT", {**options, "legacy_inverse": True}, case)
    if case.weights:
        case.load(layer)
    X = next(value for value in case.inputs.values() if value.dim() == 4)
    onesided = case.config.get("onesided", X.shape[1] != layer.n_fft)
    results = {}
    for name in case.outputs:
        length = re.search(r"length(\d+)", name)
        results[name] = layer(X, onesided=onesided, length=int(length[1]) if length else case.config.get("length"))
    return results


def _bands(case: Case) -> dict[str, Tensor]:
    kinds = {"mel": "MelSpectrogram", "mfcc": "MFCC", "gammatone": "Gammatonegram"}
    common = {key: value for key, value in case.config.items() if not isinstance(value, dict)}
    case.only(*common, *(key for key in case.config if key.partition("_")[0] in kinds))
    cls = common.pop("cls", None)
    parts = {key: value for key, value in case.config.items() if isinstance(value, dict)}
    if cls is not None and not parts:
        parts = {next(key for key, kind in kinds.items() if kind == cls): {}}
    results = {}
    x = case.inputs["x"].requires_grad_("cotangent" in case.inputs)
    for key, options in parts.items():
        kind = kinds[key.partition("_")[0]]
        options = {**common, **options}
        if kind == "MFCC":
            options["legacy_arguments"] = True
        elif kind == "Gammatonegram":  # for which the reference takes the arguments of its Mel filters and ignores them
            options = {name: value for name, value in options.items() if name not in ("htk", "norm")}
        layer = _built(kind, options, case)
        if case.weights:
            case.load(layer)
        results[key] = layer(x)
        if len(parts) == 1:
            if "cotangent" in case.inputs:
                results |= case.gradients(layer, results[key], {"grad_input": x})
            results |= dict.fromkeys(("output", "magnitude"), results[key])
        basis = getattr(layer, "mel_basis", getattr(layer, "gammatone_basis", None))
        if basis is not None:
            results[f"{key}_basis"] = basis
    return results


def _constant_q(case: Case) -> dict[str, Tensor]:
    options = _options(case, _CQT)
    cls = case.config.get("cls", "VQT" if "gamma" in options else "")
    early_given, gammas = options.pop("earlydownsample", None), options.pop("gamma", None)
    results: dict[str, Tensor] = {}
    for name in case.outputs:
        kind, rest, more = cls, name, {}
        if match := re.match(r"v([12])_(?:early([01])_)?(.*)", name):
            kind, rest = ("CQT2010", "CQT2010v2")[int(match[1]) - 1], match[3]
            more = {"earlydownsample": match[2] == "1"} if match[2] else {}
        elif match := re.match(r"(cqt1992(?:v2)?|vqt|cqt2010(?:v2)?)_(.*)", name):
            kind, rest = match[1].upper().replace("V2", "v2"), match[2]
        elif match := re.match(r"gamma([\d.]+)_(.*)", name):
            kind, rest, more = "VQT", match[2], {"gamma": float(match[1])}
        elif isinstance(gammas, int | float):
            more = {"gamma": gammas}
        if not kind:
            kind = "CQT2010v2"  # the filters are those of every transform by octaves
        if kind in ("CQT2010", "CQT2010v2", "VQT"):
            early = {} if early_given is None else {"earlydownsample": early_given}
            legacy = ("legacy_downsample", "legacy_arguments", "legacy_octave")
            more = {**dict.fromkeys(legacy, True), **early, **more}
            if kind == "CQT2010":
                more["legacy_spectra"] = True
            dropped = {"norm", "center"}
        else:
            dropped = {"basis_norm"}
            more = more | ({"legacy_spectra": True} if kind == "CQT1992" else {})
            if "basis_norm" in options:
                more["norm"] = options["basis_norm"]
        layer = _built(kind, {k: v for k, v in options.items() if k not in dropped} | more, case)
        if case.weights:
            case.load(layer)
        if rest.startswith("grad_"):
            x = case.inputs["x"].detach().requires_grad_()
            results[name] = case.gradients(layer, layer(x), {"grad_input": x})[rest]
        else:
            results[name] = _part(layer, case.inputs["x"], rest, case.outputs[name])
    return results


def _part(layer: Any, x: Tensor, name: str, expected: Tensor) -> Tensor:
    filters = {"lengths": "lengths", "lowpass_filter": "lowpass_filter", "early_filter": "early_downsample_filter"}
    if name in filters:
        return getattr(layer, filters[name]).flatten()
    if match := re.fullmatch(r"kernel_row(\d+)_(real|imag)", name):
        return getattr(layer, f"cqt_kernels_{match[2]}")[int(match[1])].flatten()
    kind, _, form = name.rpartition("_")
    form = layer.output_format.lower() if form == "output" else form
    output = layer(x, form.capitalize(), kind or "librosa")
    return _phase(output, layer(x, "Magnitude", kind or "librosa")[..., None], expected) if form == "phase" else output


def _griffin_lim(case: Case) -> dict[str, Tensor]:
    case.only("cls", "n_fft", "hop_length", "win_length", "window", "pad_mode", "center", "n_iter", "momentum")
    options = {key: value for key, value in case.config.items() if key not in ("cls", "n_iter", "momentum")}
    results = {}
    for name in case.outputs:
        match = re.fullmatch(r"wave_iter(\d+)_m([\d.]+)", name)
        layer = spectrogram.Griffin_Lim(**options, n_iter=int(match[1]), momentum=float(match[2]))
        results[name] = layer(case.inputs["magnitude"], case.inputs["initial_phase"])
    return results


def _periodicity(case: Case) -> dict[str, Tensor]:
    allowed = {"fr", "fs", "hop_length", "window_size", "fc", "tc", "g", "NumPerOct"}
    options = _options(case, allowed)
    inner, whole = (_built(kind, options, case) for kind in ("Combined_Frequency_Periodicity", "CFP"))
    x = case.inputs["x"]
    maps, every = inner(x)._asdict(), whole(x)._asdict()
    matrices = {name: getattr(inner, f"{name}_matrix") for name in ("freq2logfreq", "quef2logfreq")}
    return maps | {f"cfp_{name}": value for name, value in every.items()} | matrices
