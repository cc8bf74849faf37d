"""Networks of translation variant convolutions: face recognition, and segmentation of optic disc and cup."""
