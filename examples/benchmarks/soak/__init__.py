"""Thousands of steps in which nothing may grow: `leg` is what happens, `measure` what may not."""
