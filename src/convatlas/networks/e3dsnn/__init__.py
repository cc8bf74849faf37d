"""E-3DSNN: spiking networks on voxels, whose sparse convolutions only add where a neuron has fired.

Qiu, Yao, Zhang, Chou, Qiao, Zhou, Xu, Li: "Efficient 3D Recognition with Event-driven Spike Sparse Convolution",
AAAI 2025, arXiv 2412.07360.
"""
