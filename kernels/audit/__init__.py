"""The compile audit (``python -m triton_hybrid.kernels.audit``).

A tool that stands above what it looks at: unlike the kernels it knows rules and predictors, whose
functions they are compiled with.
"""
