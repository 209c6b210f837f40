"""The Triton kernels of block selection, a file for each thing that they do."""
