"""Autograd functions over the core: products, changes of layout and of cuts, sums of gradients, derivatives of derivatives."""
