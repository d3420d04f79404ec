"""Parameter groups: their checks, and which parameters go to which base rule."""

from __future__ import annotations

import itertools
import operator
import zlib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from triton_hybrid.checks import check_choice, check_flag, check_number, require
from triton_hybrid.flat_shards import check_flat, whole_shape
from triton_hybrid.kernels.rows import TRITON_DTYPES
from triton_hybrid.kernels.update_rule import UpdateRule
from triton_hybrid.rules import OPTIONS, RULES
from triton_hybrid.shards import check_dtensor, is_dtensor

HEADS = ("lm_head", "head", "classifier", "score", "embed_out", "unembed", "output_projection")
"""Last parts of a module's name that make it the output layer."""

FUSED = dict.fromkeys(("c_attn", "qkv", "qkv_proj", "wqkv", "in_proj"), 3)
FUSED |= dict.fromkeys(("kv_proj", "gate_up_proj"), 2)
"""Layers that are several matrices in one, by the last part of their name, and how many.
Orthogonalised as one they train worse. Only where the outputs divide evenly: query, key and
value of equal size. Weights interleaved by heads (GPT-NeoX) are left whole."""


PARAMS = operator.itemgetter("params")
REFUSED = ("amsgrad", "differentiable")
"""Options of torch's AdamW that would change the result, and are not built."""


FOREIGN = {"ds_id": "DeepSpeed ZeRO-3", "main_grad": "Megatron-LM's gradient buffers"}
"""Attributes by which other trainers mark parameters whose gradients or shards they keep."""


def own_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of an optimizer without those of torch's AdamW that change nothing.

    Raises:
        TypeError: An unknown one.
        ValueError: One that is not built.
    """
    for name in REFUSED:
        require(not options.get(name), name, options.get(name), "False: it is not built")
    own = {key: options[key] for key in options.keys() - {"fused", "foreach", *REFUSED}}
    wrong = sorted(own.keys() - OPTIONS.keys())
    if wrong:
        raise TypeError(
            f"HybridOptimizer got unknown arguments {wrong}; base rules have {sorted(OPTIONS)}"
        )
    return own


def as_rate(lr: Any) -> Any:
    """A learning rate as it is kept: a tensor, or a Python number for one of NumPy's."""
    other = not isinstance(lr, (Tensor, float, int)) and hasattr(lr, "item")
    return lr.item() if other else lr


def complete_group(group: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Adds what a group of another optimizer's checkpoint lacks."""
    if group.get("base") == "muon" and "betas" not in group:
        group["betas"] = (group.get("momentum", defaults["momentum"]), defaults["betas"][1])
    for name, value in defaults.items():
        group.setdefault(name, value)


WRAPPERS = {"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "module",
            "base_layer", "original_module"}  # fmt: skip
ADAPTERS = {"modules_to_save", "lora_A", "lora_B"}
"""Parts of names that wrapped modules have; after the latter comes the name of an adapter."""


def bare_name(name: str) -> str:
    """A parameter's name without the parts that wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def layer_name(name: str) -> str:
    """The last part of a module's name that is its own and not a wrapper's."""
    parts: list[str] = []
    of_adapter = False
    for part in name.split("."):
        if not of_adapter and part not in WRAPPERS | ADAPTERS:
            parts.append(part)
        of_adapter = part in ADAPTERS
    return parts[-1] if parts else ""


def first_device(groups: Sequence[Mapping[str, Any]]) -> torch.device:
    """Where the first parameter lies; the CPU without any."""
    params = (param for group in groups for param in group["params"])
    return next((param.device for param in params), torch.device("cpu"))


def check_group(group: Mapping[str, Any]) -> None:
    """Checks the options of a parameter group."""
    lr, betas = group["lr"], group["betas"]
    if not isinstance(lr, Tensor):
        check_number("lr", lr, "a finite number >= 0, or a one-element tensor")
    elif lr.numel() != 1:
        raise ValueError(f"lr has shape {tuple(lr.shape)}: a tensor must have one element")
    elif lr.device.type == "cpu":
        check_number("lr", float(lr), "a finite number >= 0")
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    require(pair, "betas", betas, "two numbers in [0, 1)")
    for index, beta in enumerate(betas):
        check_number(f"betas[{index}]", beta, "a number in [0, 1)", lambda x: 0 <= x < 1)
    for name in ("eps", "weight_decay"):
        check_number(name, group[name], "a finite number >= 0")
    for name in REFUSED:
        require(not group.get(name), name, group.get(name), "False: it is not built")
    check_flag("maximize", group["maximize"])
    check_choice("base", group["base"], RULES)
    count = len(group["params"]) if "params" in group else None
    for name, option in RULES[group["base"]].options.items():
        require(option.ok(group[name], count), name, group[name], option.allowed)


def check_parameter(group: Mapping[str, Any], index: int, param: Any, masters: str) -> None:
    """Checks that a parameter of a complete group can be optimised; leaves wrong types to torch."""
    if not isinstance(param, Tensor):
        return
    if is_dtensor(param):
        check_dtensor(param, index)
    check_flat(param, index, group["base"])
    for mark, owner in FOREIGN.items():
        if hasattr(param, mark):
            raise NotImplementedError(
                f"{owner} (a parameter has {mark!r}): not supported, gradients or shards are kept "
                "elsewhere than in .grad; use the optimizer of that library"
            )
    if param.layout is not torch.strided:
        raise ValueError(f"params: layout {param.layout}, must be torch.strided")
    if param.dtype not in TRITON_DTYPES:
        raise ValueError(f"params: dtype {param.dtype}, must be one of {list(TRITON_DTYPES)}")
    if any(size > 1 and step == 0 for size, step in zip(param.shape, param.stride())):
        raise ValueError(
            f"params: strides {param.stride()} of shape {tuple(param.shape)}: elements of an "
            "expanded tensor share memory, and cannot be updated each by itself"
        )
    if masters == "split" and param.dtype == torch.float16:
        # Its exponent has 5 bits, that of FP32 8: what is missing is not 16 bits, and small
        # weights would lose all of it.
        raise ValueError(
            "master_weights='split' with an FP16 parameter: allowed for BF16 only, whose bits are "
            "the upper half of FP32's; use 'auto' (FP32 masters) or BF16"
        )
    RULES[group["base"]].check_parameter(group, index, param)


def split_param_groups(
    model: nn.Module,
    *,
    lr: float | Tensor | None = None,
    muon_lr: float | Tensor | None = None,
    weight_decay: float | None = None,
    exclude: Sequence[str] = (),
    blocks: Mapping[str, int] | None = None,
    **muon: Any,
) -> list[dict[str, Any]]:
    """Makes the two parameter groups of a model for ``HybridOptimizer``.

    To Muon go the weights of linear layers (``nn.Linear``, GPT-2's ``Conv1D``, the fused
    projection of ``nn.MultiheadAttention``) inside the model. To AdamW go embeddings and what is
    tied to them, the output layer, in a model without embeddings the first linear layer too
    (unless a convolution comes before it), and everything that is not a matrix.

    Args:
        model: The model.
        lr: Learning rate of both groups; None leaves it to the optimizer.
        muon_lr: Learning rate of the Muon group; `lr` when None. With the default
            ``adjust_lr_fn`` a rate that suits AdamW suits Muon.
        weight_decay: Of both groups; None leaves it to the optimizer.
        exclude: Patterns (``fnmatch``) of parameter names that AdamW keeps.
        blocks: Patterns of parameter names, and into how many equal blocks along its outputs
            such a matrix is cut; before the names of fused layers that are known.
        muon: Further options of the Muon group, such as ``momentum``.

    Returns:
        The Muon group and the AdamW group.

    Raises:
        ValueError: The model has no hidden matrix, or blocks do not divide a matrix.
        NotImplementedError: FSDP1 has made one parameter of several.
    """
    named = dict(model.named_parameters())
    for place, param in enumerate(named.values()):
        check_flat(param, place, "muon")
    hidden = _hidden_layers(model)
    matrices: list[tuple[Tensor, tuple[int, int], bool]] = []
    rest: list[Tensor] = []
    for name, param in named.items():
        if not param.requires_grad:
            continue
        if id(param) not in hidden or any(fnmatch(name, pattern) for pattern in exclude):
            rest.append(param)
            continue
        inputs_first = hidden[id(param)]
        shape = whole_shape(param)
        outputs, inputs = shape[::-1] if inputs_first else shape
        if ".lora_B." in name:  # the inputs of the layer that it adapts
            inputs = whole_shape(named[name.replace(".lora_B.", ".lora_A.")])[1]
        parts = 1 if ".lora_A." in name else _parts(name, outputs, inputs, blocks or {})
        matrices.append((param, (1, parts) if inputs_first else (parts, 1), inputs_first))
    if not matrices:
        raise ValueError("model has no hidden matrix for Muon: use base='adamw' for all of it")
    params, grids, transposed = zip(*matrices)
    group: dict[str, Any] = {"params": list(params), "base": "muon"}
    group |= {"blocks": grids, "transposed": transposed, **muon}
    other: dict[str, Any] = {"params": rest, "base": "adamw"}
    for its, rate in ((group, lr if muon_lr is None else muon_lr), (other, lr)):
        shared = {"lr": rate, "weight_decay": weight_decay}
        its.update({name: value for name, value in shared.items() if value is not None})
    return [group, other] if rest else [group]


def _hidden_layers(model: nn.Module) -> dict[int, bool]:
    """Identities of the hidden matrices, and whether their rows are inputs."""
    modules = list(model.named_modules())
    embeddings = [m for _, m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    layers: list[tuple[str, Any]] = [
        (name, m) for name, m in modules if isinstance(m, nn.Linear) or _is_conv1d(m)
    ]
    hidden = {id(layer.weight): _is_conv1d(layer) for _, layer in layers}
    for _, m in modules:
        if isinstance(m, nn.MultiheadAttention):
            fused = (m.in_proj_weight, m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
            hidden |= {id(weight): False for weight in fused if weight is not None}
    known = getattr(model, "get_output_embeddings", None)
    outer: list[Any] = [module.weight for module in embeddings]
    outer += [layer.weight for name, layer in layers if layer_name(name) in HEADS]
    outer.append(getattr(known() if callable(known) else None, "weight", None))
    if layers:
        last = layers[-1][1]
        sizes = {module.num_embeddings for module in embeddings}
        if not embeddings or (isinstance(last, nn.Linear) and last.out_features in sizes):
            outer.append(last.weight)
    if layers and not embeddings:
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        first = next(m for _, m in modules if isinstance(m, kinds) or _is_conv1d(m))
        if first is layers[0][1]:
            outer.append(first.weight)
    not_hidden = {id(weight) for weight in outer}
    return {index: first for index, first in hidden.items() if index not in not_hidden}


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is ``[inputs, outputs]``."""
    weight = getattr(module, "weight", None)
    named = type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)
    return named and isinstance(weight, torch.Tensor) and weight.ndim == 2


def _parts(name: str, outputs: int, inputs: int, blocks: Mapping[str, int]) -> int:
    """Into how many blocks along its outputs a matrix is cut."""
    for pattern, parts in blocks.items():
        if fnmatch(name, pattern):
            if parts < 1 or outputs % parts:
                raise ValueError(
                    f"blocks[{pattern!r}]={parts}: must divide the {outputs} outputs of {name}"
                )
            return parts
    layer = layer_name(name.removesuffix(".weight").removesuffix("_weight")).lower()
    parts = FUSED.get(layer, 1)
    if parts == 3:
        return parts if outputs == 3 * inputs else 1
    return parts if outputs % parts == 0 else 1


def every_parameter(groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """The parameters of all groups."""
    return [*itertools.chain.from_iterable(map(PARAMS, groups))]


def with_kernels(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, UpdateRule]]:
    """The parameters of all groups, with the kernels of their base rules."""
    return [(param, RULES[group["base"]].kernels) for group in groups for param in group["params"]]


def places_number(groups: Sequence[Mapping[str, Any]], params: Iterable[Tensor]) -> int:
    """A number for the places that some parameters have among all."""
    some = {*map(id, params)}
    return zlib.crc32(bytes(id(param) in some for param in every_parameter(groups)))


def is_trained(param: Tensor) -> bool:
    """Whether a parameter may get a gradient."""
    return param.requires_grad and not is_lazy(param)
