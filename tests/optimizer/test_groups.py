"""Which parameters go to Muon, and how fused ones are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from triton_hybrid import HybridConfig, HybridOptimizer, split_param_groups


def names(model: nn.Module, group: dict[str, Any]) -> list[str]:
    chosen = {id(param) for param in group["params"]}
    return [name for name, param in model.named_parameters() if id(param) in chosen]


def test_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_positions=24, n_embd=24, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    muon, adamw = split_param_groups(model, lr=1e-3, muon_lr=2e-3, weight_decay=0.1)
    layer = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    expected = [f"transformer.h.{i}.{part}.weight" for i in range(2) for part in layer]
    assert names(model, muon) == expected
    assert muon["blocks"] == ((1, 3), (1, 1), (1, 1), (1, 1)) * 2
    assert muon["transposed"] == (True,) * 8
    assert (muon["lr"], adamw["lr"]) == (2e-3, 1e-3)
    assert muon["weight_decay"] == adamw["weight_decay"] == 0.1
    assert len(muon["params"]) + len(adamw["params"]) == len(list(model.parameters()))
    assert "transformer.wte.weight" in names(model, adamw), "tied to the head"


def test_untied_head_goes_to_adamw() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 8)
            self.hidden = nn.Linear(8, 8)
            self.to_words = nn.Linear(8, 50)

    model = Model()
    muon, adamw = split_param_groups(model)
    assert names(model, muon) == ["hidden.weight"]
    assert "to_words.weight" in names(model, adamw)
    assert "lr" not in muon
    assert "lr" not in adamw


def test_attention_and_its_fused_projection() -> None:
    model = nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=16)
    wrapped = nn.Sequential(nn.Embedding(10, 8), model)
    muon, _ = split_param_groups(wrapped)
    cut = dict(zip(names(wrapped, muon), muon["blocks"]))
    assert cut == {
        "1.self_attn.in_proj_weight": (3, 1),
        "1.self_attn.out_proj.weight": (1, 1),
        "1.linear1.weight": (1, 1),
        "1.linear2.weight": (1, 1),
    }


def test_first_and_last_layer_of_a_plain_network_go_to_adamw() -> None:
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)]
    muon, _ = split_param_groups(nn.Sequential(*layers))
    assert muon["params"] == [layers[2].weight]


def test_a_convolution_reads_the_input() -> None:
    layers = [nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 7), nn.Linear(7, 3)]
    muon, adamw = split_param_groups(nn.Sequential(*layers))
    assert muon["params"] == [layers[2].weight]
    assert layers[0].weight in set(adamw["params"])


def test_exclude_blocks_and_frozen() -> None:
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 6))
    model[3].weight.requires_grad_(False)
    muon, adamw = split_param_groups(model, exclude=("2.*",), blocks={"1.weight": 4}, momentum=0.9)
    assert names(model, muon) == ["1.weight"]
    assert muon["blocks"] == ((4, 1),)
    assert muon["momentum"] == 0.9
    assert "3.weight" not in names(model, adamw)
    with pytest.raises(ValueError, match=r"blocks\['1.\*'\]=5: must divide the 12 outputs"):
        split_param_groups(model, blocks={"1.*": 5})


def test_grouped_queries_are_left_whole() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 8)
            self.qkv_proj = nn.Linear(8, 12)
            self.gate_up_proj = nn.Linear(8, 12)

    muon, _ = split_param_groups(Layer())
    assert muon["blocks"] == ((1, 1), (2, 1))


def test_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="no hidden matrix for Muon"):
        split_param_groups(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))


def test_groups_train() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    groups = split_param_groups(model, lr=3e-2)
    optimizer = HybridOptimizer(groups, hybrid=HybridConfig(predictor="none"))
    x = torch.randn(64, 4)
    target = x.prod(1, keepdim=True)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("mark", "owner"), [("ds_id", "DeepSpeed"), ("main_grad", "Megatron")])
def test_parameters_that_other_trainers_manage_are_refused(
    mark: str, owner: str, late: bool
) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = HybridOptimizer([param]) if late else None
    setattr(param, mark, 7)
    param.grad = torch.ones(3)
    with pytest.raises(NotImplementedError, match=owner):
        optimizer.step() if optimizer else HybridOptimizer([param])
    assert torch.equal(param, torch.ones(3))
