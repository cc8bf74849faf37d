"""Networks that find the colour of the light from what one or two exposures tell: EMLP, ECCC, CCC, FFCC, ensembles.

Afifi, Hu, Liang: "Optimizing Illuminant Estimation in Dual-Exposure HDR Imaging", ECCV 2024, arXiv 2403.02449. Barron:
"Convolutional Color Constancy", ICCV 2015, arXiv 1507.00410. Barron, Tsai: "Fast Fourier Color Constancy", CVPR 2017,
arXiv 1611.07596.

The paper on two exposures publishes neither code nor weights nor the sizes of layers, nor a formula of its feature.
The sizes here are the simplest that give both published numbers of parameters: 354 of EMLP (2-16-16-2) and 6,156 of
ECCC (two filters and four biases of 32 x 32, and a gate of 2 x 4 + 4).
"""
