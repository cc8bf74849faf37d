"""Spectrograms as layers: inside a network, on its device, with gradients, and with kernels that may be trained.

Cheuk, Anderson, Agres, Herremans: "nnAudio: An on-the-fly GPU Audio to Spectrogram Conversion Toolbox Using 1D
Convolution Neural Networks", IEEE Access 2020, arXiv 1912.12055. Names and arguments are those of nnAudio 0.3; where it
errs, the right numbers are the default and a switch whose name begins with ``legacy`` gives those of nnAudio.

Every layer takes signals (L,), (B, L) or (B, 1, L), floating point. Kernels that are not trained are not convolved with
where a Fourier transform or a shorter kernel gives the same numbers.
"""

from convatlas.nn.spectrogram.constant_q import CQT, CQT1992, CQT1992v2
from convatlas.nn.spectrogram.fourier import STFT, Griffin_Lim, iSTFT
from convatlas.nn.spectrogram.mel import MFCC, Gammatonegram, MelSpectrogram
from convatlas.nn.spectrogram.octaves import CQT2010, VQT, CQT2010v2
from convatlas.nn.spectrogram.periodicity import CFP, Combined_Frequency_Periodicity
from convatlas.nn.spectrogram.signals import NNAUDIO_LAYOUT, least_squares_inverse

__all__ = [
    "CFP",
    "CQT",
    "CQT1992",
    "CQT2010",
    "MFCC",
    "NNAUDIO_LAYOUT",
    "STFT",
    "VQT",
    "CQT1992v2",
    "CQT2010v2",
    "Combined_Frequency_Periodicity",
    "Gammatonegram",
    "Griffin_Lim",
    "MelSpectrogram",
    "iSTFT",
    "least_squares_inverse",
]
