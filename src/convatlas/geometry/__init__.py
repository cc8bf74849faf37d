"""Points, meshes and voxels."""
