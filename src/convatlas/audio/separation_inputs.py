"""Separating whatever a user gives: files, folders or a stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convatlas.audio.live_separation import separate_standard_input
from convatlas.audio.separation_files import separate_files
from convatlas.audio.separation_options import Separating
from convatlas.audio.separation_reports import prediction_report
from convatlas.networks.conv_tasnet.network import ConvTasNet
from convatlas.report import Report
from convatlas.training.left_out import tell_skipped

__all__ = ["separate_inputs"]


def separate_inputs(
    model: str, network: ConvTasNet, inputs: Sequence[str | Path], folder: Path, options: Separating
) -> Report:
    """Write one WAV file a source for each recording, and a page to look at and to listen to.

    Recordings of any length, sample rate and number of channels are read; hours take no more memory than minutes.

    Args:
        model: what to call the network.
        network: the network; it is put into evaluation mode.
        inputs: audio files, or folders of them; or ``-`` alone for a stream from standard input.
        folder: where to write.
        options: levels, chunks, and the form of a stream.

    Raises:
        DataError: nothing can be read.
        Unsupported: a stream is asked of a network that needs the future.
        OSError: a file cannot be written.
    """
    network.eval()
    if [str(each) for each in inputs] == ["-"]:
        report = separate_standard_input(model, network, folder, options)
    else:
        done, skipped = separate_files(network, inputs, folder, options)
        tell_skipped(skipped)
        report = prediction_report(model, network.sample_rate, done, skipped)
    report.save(folder)
    return report
