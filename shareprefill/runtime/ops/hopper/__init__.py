"""What the Gluon kernels for Hopper GPUs, and their launches, share."""
