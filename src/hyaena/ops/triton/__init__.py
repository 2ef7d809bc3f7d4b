"""The fused kernels of the Hyena operator, in Triton; each names the plain function that it equals."""
