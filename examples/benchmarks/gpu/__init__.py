"""Checks and measures triton_hybrid on a GPU; each section of the suite is a module."""
