"""``convatlas spectrogram``: the spectrogram of an audio file, as an array or as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence

from convatlas.cli.parser import Parser, UsageError

__all__ = ["run"]

_KINDS = ("cqt", "cqt2010", "gammatone", "mel", "mfcc", "stft", "vqt")


def run(argv: Sequence[str]) -> int:
    """Read a file block by block and write its spectrogram."""
    parser = Parser("convatlas spectrogram", description="The spectrogram of an audio file, as an array or a picture.")
    parser.add_argument("source", metavar="FILE", help="WAV, FLAC or another audio file")
    parser.add_argument("--kind", choices=_KINDS, default="mel", help="which spectrogram (default: mel)")
    parser.add_argument("-o", "--out", required=True, help="file to write: .npy (channels, F, T) or .png")
    parser.add_argument("--rate", type=int, help="sample rate in Hz to resample to; by default that of the file")
    parser.add_argument("--channels", action="store_true", help="keep the channels apart instead of their mean")
    parser.add_argument("--options", default="{}", help="JSON, of the layer, e.g. '{\"hop_length\": 256}'")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    arguments = parser.parse_args(argv)
    if not arguments.out.endswith((".npy", ".png")):
        raise UsageError(f"--out must end in .npy or .png, got {arguments.out}")
    try:
        options = json.loads(arguments.options)
    except json.JSONDecodeError as error:
        raise UsageError(f"--options is no JSON: {error}") from None
    if not isinstance(options, dict):
        raise UsageError(f"--options must be a JSON object, got {arguments.options}")
    from convatlas.audio.spectrogram import save_spectrogram

    shape = save_spectrogram(
        arguments.source,
        arguments.out,
        arguments.kind,
        sample_rate=arguments.rate,
        mono=not arguments.channels,
        **options,
    )
    done = {"file": arguments.out, "kind": arguments.kind, "shape": list(shape)}
    print(json.dumps(done) if arguments.json else f"written: {arguments.out}, (channels, F, T) = {tuple(shape)}")
    return 0
