"""Triton kernels over lists of tensors: tensors in, tensors out.

Bottom first: ``launch`` and ``rows`` say how a kernel is launched and reaches its tensors,
``multi_tensor`` keeps many tensors ready for one launch, ``ledger`` names the scalars of decisions.
``step``, ``predict``, ``verify``, ``gram`` and ``newton_schulz`` each hold their kernels and
launchers; the same in plain torch, there or in ``*_torch``, is test oracle and CPU backend.
``audit`` compiles all of it without a GPU. Nothing here knows about phases.
"""
