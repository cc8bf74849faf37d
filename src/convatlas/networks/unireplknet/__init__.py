"""UniRepLKNet for images, and the same network behind front ends for sound, video, point clouds and time series."""
