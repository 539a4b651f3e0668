"""Fast ways to compute what a model computes; they know tensors and modules, and no view."""
