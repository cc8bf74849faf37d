"""UniFormer: one block shape for images and video, convolution in the early stages and self-attention in the late ones.

Li, Wang, Zhang, Gao, Song, Liu, Li, Qiao: "UniFormer: Unifying Convolution and Self-attention for Visual Recognition",
TPAMI 2023, arXiv 2201.09450; for video "UniFormer: Unified Transformer for Efficient Spatiotemporal Representation
Learning", ICLR 2022, arXiv 2201.04676.
"""
