"""What the examples and benchmarks share.

A command puts the folder `examples` on Python's path and imports from here by full name::

    sys.path.insert(0, str(Path(__file__).resolve().parent))  # from a folder deeper: parents[1]

    from lib.statistics import estimate

Only commands do so. A program of more than one file is a package beside its command (`frontier.py`
and `frontier/`), whose modules import each other by full name too, as in `from frontier.runs
import run_all`. For the tests the same folders stand in pyproject.toml, under `pythonpath`.
"""
