"""ConvNeXt V2 and FCMAE in JAX (Woo et al., CVPR 2023, arXiv 2301.00808)."""
