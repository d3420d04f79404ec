"""Problems of the kernel tests: tensors of all rows in guarded memory.

`Problem.check` knows what must hold after every launch, whatever it computed: nothing was written
between the tensors, and a 16-bit parameter is its rounded master. Which rows there are is what
rules and predictors declare.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import kernel_specs
import pytest
import torch
from hypothesis import strategies as st
from kernel_memory import Arena, assert_near, assert_same_bits
from kernel_specs import FP32, FP64, GROUPS, ONE, Precision, Spec
from torch import Tensor
from triton_hybrid.kernels.displacement import Displacement
from triton_hybrid.kernels.launch import Tiling
from triton_hybrid.kernels.ledger import FRACTION_COLUMN, INDEX, PART_COLUMN, read_ledger
from triton_hybrid.kernels.multi_tensor import TensorSet, remainder_of
from triton_hybrid.kernels.residue import UNMOVED
from triton_hybrid.kernels.rows import NONE, OWN, SPLIT
from triton_hybrid.kernels.scalars import Scalars

from triton_hybrid.config import HybridConfig
from triton_hybrid.predictors import PREDICTORS
from triton_hybrid.rules import OPTIONS, RULES
from triton_hybrid.state import WEIGHTS, Member

DOWNHILL = {"slow_ema": 1.0, "direction": 1.0, "displacement": -1.0}
"""Rows that predictions move along, and their sign against exp_avg."""


@lru_cache(maxsize=64)
def _noise(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """FP64 on the host, so that a device changes no value."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Problem:
    """Tensors of every row that launches reach, and the numbers that their launches share.

    The values of a tensor follow from its spec alone, so the same spec in another list, at
    another place or in another order means the same numbers. ``groups`` are the hyperparameters
    of the groups that specs name, ``options`` those of the rule; ``without`` rows it keeps none of.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        *,
        rule: str = "adamw",
        precision: Precision = FP32,
        tiling: Tiling | None = ONE,
        groups: Sequence[dict[str, float]] = GROUPS,
        without: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.specs, self.rule, self.precision = list(specs), RULES[rule], precision
        same = {"rule": rule, "precision": precision, "tiling": tiling, "groups": groups}
        same |= {"without": without}
        self.twin = partial(Problem, self.specs, **same, **options)
        """Makes another problem like this one, but for some options."""
        self.arena = Arena()
        group = {**OPTIONS, "ns_dtype": "float32", "ns_steps": 2, **options}
        predictors = [make(HybridConfig(history=3)) for make in PREDICTORS.values()]
        rows = [*self.rule.rows, *(row for each in predictors for row in each.rows_for(self.rule))]
        self.masters = precision.kept == OWN and precision.wide != precision.param
        self.declared = [
            row
            for row in dict.fromkeys(rows)
            if row.shape is None and not ((row.in_place and self.masters) or row.name in without)
        ]
        self.again: Displacement | None = None
        """The displacement that stands, where it can be computed again."""
        like = torch.empty(0, dtype=precision.param)
        dtypes = {row.name: row.dtype(like, group) for row in self.declared}
        dtypes["param"] = precision.param
        if precision.kept == SPLIT:
            dtypes["remainder"] = torch.int16
        elif self.masters:
            dtypes["weight"] = precision.wide
        carve = self.arena.carve
        self.rows: dict[str, list[Tensor]] = {
            name: [carve(spec.shape, dtype, spec.order, spec.shift) for spec in self.specs]
            for name, dtype in dtypes.items()
        }
        if precision.wide == precision.param:
            self.rows["weight"] = self.rows["param"]
        indices = [spec.group for spec in self.specs]
        self.tensors = TensorSet(self.rows, tiling, precision.kept, indices, self.rule.kernels)
        self.rows["grad"] = [
            carve(spec.shape, precision.grad, spec.grad_order, spec.shift) for spec in self.specs
        ]
        for index, spec in enumerate(self.specs):
            self._fill({name: tensors[index] for name, tensors in self.rows.items()}, spec)
        self.set_gradients()
        if self.rule.bind is not None:
            params = enumerate(zip(self.rows["param"], indices))
            self.rule.bind(self.tensors, [Member(p, group, g, i, p) for i, (p, g) in params])
        self.tensors.group = self.arena.put(self.tensors.group)
        self.tensors.steps = self.arena.put(torch.tensor([float(s.step) for s in self.specs]))
        self.scalars = self._guarded([self.tensors], kernel_specs.hyper_table(groups, rule))
        chunks = self.tensors.chunks(every=True).count
        self._scratch = carve((3 * chunks,), torch.float32)
        self.products = torch.empty(len(self.specs), 0)
        """What the end of a cycle measured."""
        self.returned: Any = None
        """By the last launch, where a test keeps it."""

    def _fill(self, here: dict[str, Tensor], spec: Spec) -> None:
        here["grad"].copy_(_noise(spec.shape, spec.seed, "grad"))
        weight = torch.empty_like(here["param"], dtype=self.precision.wide)
        weight.copy_(_noise(spec.shape, spec.seed, "weight"))
        here.get("weight", weight).copy_(weight)
        here["param"].copy_(weight)
        if "remainder" in here:
            here["remainder"].copy_(remainder_of(weight, here["param"]))
        for row in self.declared:
            noise = _noise(spec.shape, spec.seed, row.name)
            values = (0.2 + noise.abs()).square() if row.name.endswith("_sq") else 0.3 * noise
            if row.name in DOWNHILL:
                # A move uphill would not be made.
                along = 0.3 * _noise(spec.shape, spec.seed, "exp_avg")
                values = DOWNHILL[row.name] * along * (0.5 + noise.abs())
            if row.init == WEIGHTS or row.name == "snapshot":
                values = weight.cpu() + 0.1 * noise
            if row.saved:
                here[row.name].copy_(values)

    def _guarded(self, sets: Sequence[TensorSet], table: Tensor) -> Scalars:
        scalars = Scalars(sets)
        scalars.hyperparameters = table
        scalars.sums.fill_(math.nan)
        for name, tensor in vars(scalars).items():
            setattr(scalars, name, self.arena.put(tensor))
        return scalars

    @property
    def ledger(self) -> Tensor:
        return self.scalars.ledger

    @property
    def sums(self) -> Tensor:
        return self.scalars.sums[self.tensors.place]

    @property
    def prediction(self) -> Tensor:
        return self.scalars.prediction[self.tensors.place]

    @property
    def state(self) -> list[str]:
        """The weight and every row that lasts from step to step."""
        return ["weight", *(row.name for row in self.declared if row.saved)]

    @property
    def moments(self) -> list[str]:
        """Rows of the rule among them."""
        return [row.name for row in self.rule.rows if row.saved]

    @property
    def worked_out(self) -> list[str]:
        """Rows that a step may leave anything in."""
        return [row.name for row in self.declared if not row.saved]

    def values(self, name: str) -> list[Tensor]:
        """The tensors of a row; weights also where they are kept in pieces.

        ``point``: where the model stands, with a prediction that the masters do not have yet.
        """
        if name == "point":
            weights = self.values("weight")
            if self.again is None or not self.masters:
                return weights
            return [weight + self.moved(index) for index, weight in enumerate(weights)]
        if name != "weight" or name in self.rows:
            return self.rows[name]
        flat = [self.tensors.weight(i, slice(0, n)) for i, n in enumerate(self.tensors.lengths)]
        return [w.as_strided(p.shape, p.stride()) for w, p in zip(flat, self.rows["param"])]

    def moved(self, index: int) -> Tensor:
        """The displacement of a tensor, from the table of moves."""
        rows, param = self.tensors.block_rows(index), self.rows["param"][index]
        numbers = self.scalars.moves[self.tensors.place][index]
        assert self.again is not None
        found = self.again.standing(self.rule.kernels, rows, numbers)
        return found.as_strided(param.shape, param.stride())

    def keep_snapshot(self) -> None:
        """Copies the weights."""
        for snapshot, weight in zip(self.rows["snapshot"], self.values("weight")):
            snapshot.copy_(weight)

    def set_gradients(self) -> None:
        """Gives the set its gradients anew, None where the spec says absent."""
        pairs = zip(self.rows["grad"], self.specs)
        self.tensors.set_row("grad", [grad if spec.present else None for grad, spec in pairs])

    def share(self, *others: Problem) -> None:
        """Puts the tensors of all problems on one device: from now on they share scalars."""
        every = (self, *others)
        known = [problem.scalars for problem in every]
        predictions = torch.cat([problem.prediction for problem in every])
        moves = torch.cat([problem.scalars.moves[problem.tensors.place] for problem in every])
        table = torch.cat([scalars.hyperparameters for scalars in known])
        shared = self._guarded([problem.tensors for problem in every], table)
        shared.ledger.copy_(known[0].ledger)
        shared.prediction.copy_(predictions)
        shared.moves.copy_(moves)
        for number, problem in enumerate(every):
            problem.tensors.group += sum(len(scalars.hyperparameters) for scalars in known[:number])
            problem.scalars = shared

    def poison(self, columns: int) -> None:
        """Makes scratch for the next launch as small as it may rely on, and fills it with NaN."""
        needed = self.tensors.chunks(every=True).count * columns
        self.sums.fill_(math.nan)
        self.tensors._partials = self._scratch[len(self._scratch) - needed :].fill_(math.nan)

    def promoted(self) -> Problem:
        """The same problem in FP64: what plain torch turns into an oracle."""
        other = self.twin(precision=FP64)
        for name, tensors in other.rows.items():
            if name == "residue" and self.masters:
                continue  # nothing is lost yet
            for mine, theirs in zip(tensors, self.values("weight" if name == "param" else name)):
                mine.copy_(theirs)
        other.tensors.steps.copy_(self.tensors.steps)
        for name in ("hyperparameters", "ledger", "prediction", "moves"):
            getattr(other.scalars, name).copy_(getattr(self.scalars, name))
        other.set_gradients()
        return other

    def note(self, **entries: float) -> Problem:
        """Writes ledger entries by name."""
        for name, value in entries.items():
            self.ledger[INDEX[name]] = value
        return self

    def confident(self, **entries: float) -> Problem:
        """Lets the gate open: confident, calm, with a usual update to compare with."""
        self.prediction[:, PART_COLUMN.value] = 1.0
        return self.note(**{"confidence": 0.9, "update_square": 1.0, "horizon": 0.75, **entries})

    def decided(self, *fractions: float, decision: float = 1.0) -> Problem:
        """A decision in the ledger, and step fractions, repeated as needed."""
        for index in range(len(self.specs)):
            self.prediction[index, FRACTION_COLUMN.value] = fractions[index % len(fractions)]
        return self.note(decision=decision)

    def ratios(self) -> Tensor:
        """A coefficient for each tensor, by spec and not by place."""
        return self.arena.put(torch.tensor([0.3 + spec.seed % 7 for spec in self.specs]))

    def check(self) -> None:
        """Asserts what holds after every launch."""
        self.arena.check()
        for index, param in enumerate(self.rows["param"]):
            # Where a prediction stands in the parameter alone, the master is where it began.
            places = [self.values(name)[index].to(param.dtype) for name in ("weight", "point")]
            # A NaN is a NaN: hardware and torch give it different payloads.
            for rounded in places:
                rounded.copy_(torch.where(param.isnan() & rounded.isnan(), param, rounded))
            same = [bool(((at == param) | param.isnan()).all()) for at in places]
            rounded = places[same.index(True) if True in same else 0]
            assert_same_bits(param, rounded, f"param[{index}], rounded master")

    def snapshot(self) -> dict[str, list[Tensor]]:
        """Copies of every tensor, and of the tables a kernel may write."""
        rows = {name: [t.clone() for t in self.values(name)] for name in {*self.rows, "weight"}}
        return {
            **rows,
            "steps": [self.tensors.steps.clone()],
            "prediction": [self.prediction.clone()],
            "moves": [self.scalars.moves[self.tensors.place].clone()],
        }

    def assert_unchanged(self, before: dict[str, list[Tensor]], *, but: Sequence[str] = ()) -> None:
        """Asserts that every byte is what `snapshot` saw, but for some rows.

        With the weight, what it is kept in may differ too.
        """
        if "weight" in but:
            but = (*but, "param", "remainder")
        for name, tensors in self.snapshot().items():
            for index, (now, then) in enumerate(zip(tensors, before[name])):
                if name not in but:
                    assert_same_bits(now, then, f"{name}[{index}]")

    def assert_near(
        self, other: Problem, rows: Sequence[str], rtol: float = 2e-6, atol: float = 1e-7
    ) -> None:
        """Asserts that rows agree with those of another problem."""
        for name in rows:
            rounded = name in ("weight", "point") and self.precision.kept == NONE
            near = max(rtol, torch.finfo(self.precision.param).eps) if rounded else rtol
            for index, (mine, theirs) in enumerate(zip(self.values(name), other.values(name))):
                if self.rule.name == "lion":
                    # Of millions of signs, the last bit decides a few.
                    flipped = (mine - theirs).abs() > 1e-3
                    few = int(flipped.sum()) <= mine.numel() // 100_000
                    mine = torch.where(flipped & few, theirs.to(mine.dtype), mine)
                if name == "point" and self.again is not None and "residue" in self.rows:
                    # Too small beside its displacement: it stays (`residue`), as few do.
                    still = self.rows["residue"][index] == UNMOVED
                    assert int(still.sum()) <= 3 + mine.numel() // 50
                    theirs = torch.where(still, mine.double(), theirs.double())
                assert_near(mine, theirs, f"{name}[{index}] {self.specs[index]}", near, atol)

    def assert_same(
        self, other: Problem, indices: Sequence[int] | None = None, rows: Sequence[str] = ()
    ) -> None:
        """Asserts that ``self[i]`` is ``other[indices[i]]`` bit for bit; by default all in order.

        Without ``rows`` every row is compared, and the tables of each tensor.
        """
        at = list(range(len(self.specs)) if indices is None else indices)
        for name in rows or {*self.rows, "weight"}:
            theirs = other.values(name)
            for mine, index in zip(self.values(name), at, strict=True):
                assert_same_bits(mine, theirs[index], f"{name}[{index}]")
        if not rows:
            assert_same_bits(self.tensors.steps, other.tensors.steps[at], "steps")
            for name in ("sums", "prediction", "products"):
                assert_same_bits(getattr(self, name), getattr(other, name)[at], name)


Make = partial[Problem]
"""Makes a problem; takes further options of it."""


def problems(rule: str = "adamw", **lists: Any) -> st.SearchStrategy[Make]:
    """Problems of a rule with tensors as `spec_lists` draws them, in any precision and tiling."""

    def make(specs: list[Spec], precision: Precision, tiling: Tiling | None) -> Make:
        # In three programs the FP32 sums of millions of elements would not be near.
        cut = None if any(spec.numel > 1 << 16 for spec in specs) else tiling
        return partial(Problem, specs, rule=rule, precision=precision, tiling=cut)

    return st.builds(
        make,
        kernel_specs.spec_lists(rule=rule, **lists),
        kernel_specs.precisions,
        st.sampled_from(kernel_specs.TILINGS),
    )


def assert_ledgers_near(actual: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    """Asserts that two ledgers agree, entry by entry; products of many signs less closely."""
    left, right = read_ledger(actual), read_ledger(expected)
    unit = math.sqrt(right["update_update"] * right["slow_slow"])
    slack = {"update_slow": 1e-6 * unit}
    slack |= {"confidence": 1e-6, "signal": 1e-6}
    wrong = {
        name: (left[name], value)
        for name, value in right.items()
        if left[name] != pytest.approx(value, rel=rtol, abs=slack.get(name, 1e-9), nan_ok=True)
    }
    assert not wrong, f"ledger entries differ: {wrong}"


def changed_entries(before: Tensor, after: Tensor) -> set[str]:
    """Names of the ledger entries that differ."""
    left, right = read_ledger(before), read_ledger(after)
    return {n for n in left if left[n] != pytest.approx(right[n], rel=0, abs=0, nan_ok=True)}
