"""Trainers and logs, one module a library; nothing here is imported by the optimizer.

The libraries come with ``pip install triton-hybrid[trainers]``.
"""
