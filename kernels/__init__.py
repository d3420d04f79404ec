"""Triton kernels over lists of tensors: tensors in, tensors out.

Bottom first: ``launch`` and ``rows`` say how a kernel is launched and reaches its tensors,
``chunks`` keeps many tensors ready for one launch, ``ledger`` names the scalars of decisions.
``adamw``, ``predict``, ``gram``, ``correct`` and ``divergence`` each hold their kernels, the
launchers, and the plain-torch references, which are test oracle and CPU backend. ``audit``
and its parts compile all of it without a GPU. Nothing here knows about phases.
"""
