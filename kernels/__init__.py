"""Triton kernels over lists of tensors: tensors in, tensors out.

Every module holds a kernel, its launcher, and its plain-torch reference, which is the test
oracle and the CPU backend. Nothing here knows about phases.
"""
