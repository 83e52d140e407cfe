"""OFT, OFTv2, BOFT and RoAd against LyCORIS and peft, in outputs and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layers import adapted, check_options, check_rows, close, net_of
from torch import Tensor, nn

from studio.adapters import AdapterConfig, AdapterPlan, attach_adapters, inject
from studio.errors import ConfigError

LYCORIS_LAYERS = ["linear", "linear without bias", "conv1d", "conv2d", "conv2d dilated", "conv2d grouped", "conv3d"]


def lycoris_module(name: str, layer: nn.Module, rank: int, **settings: Any) -> nn.Module:
    """A LyCORIS module of random values that acts on `layer`."""
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule

    kinds = {"oft": DiagOFTModule, "boft": ButterflyOFTModule}
    module = kinds[name]("layer", layer, lora_dim=rank, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    module.apply_to()
    return module


def gradients(output: Tensor, parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    """Of a weighted sum of `output`, by the parameters and, where it has one, by `x`."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    return list(torch.autograd.grad((output * weights).sum(), [*parameters, *([x] if x.requires_grad else [])]))


def all_close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(close(one.reshape(other.shape), other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("settings", [{}, {"rescaled": True}, {"constraint": 0.05, "rescaled": True}])
@pytest.mark.parametrize("kind", LYCORIS_LAYERS)
@pytest.mark.parametrize("name", ["oft", "boft"])
def test_a_lycoris_module_is_read_and_does_the_same(name: str, kind: str, settings: dict[str, Any]) -> None:
    net, x = net_of(kind)
    x.requires_grad_()
    reference = copy.deepcopy(net)
    rank = 6 if name == "boft" and len(net.layer.weight) == 12 else 4  # no 4 times a power of two is 12
    module = lycoris_module(name, reference.layer, rank, **settings)
    adapters = attach_adapters({"net": net}, {"net.layer": module.state_dict()})
    adapter = adapters.adapters[0]
    assert adapter.method == name
    assert close(net(x), reference(x))
    rescale = [adapter.rescale] if settings.get("rescaled") else []
    theirs = gradients(reference(x), list(module.parameters()), x)
    assert all_close(gradients(net(x), [adapter.oft_blocks, *rescale], x), theirs)
    assert set(adapters.state()["net.layer"]) == set(module.state_dict())


def peft_model(net: nn.Module, config: Any) -> tuple[nn.Module, Any]:
    """`net` under a peft adapter, and the layer that holds it."""
    from peft import get_peft_model

    model = get_peft_model(net, config)
    return model, model.base_model.model.layer


OFT_CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linear", {}, {}),
    ("linear without bias", {"neumann_terms": 8}, {"num_cayley_neumann_terms": 8}),
    ("linear", {"neumann_terms": 3}, {"num_cayley_neumann_terms": 3}),
    ("linear", {"neumann_terms": 2}, {"num_cayley_neumann_terms": 2}),
    ("linear", {"neumann_terms": 0}, {"use_cayley_neumann": False}),
    ("linear", {"block_share": True}, {"block_share": True}),
    ("linear", {"coft": True, "eps": 0.05}, {"coft": True, "eps": 0.05}),
    ("linear", {"block_size": 6}, {"r": 0, "oft_block_size": 6}),
    ("conv2d 1x1", {}, {}),
    ("embedding", {}, {}),
]


@pytest.mark.parametrize(("kind", "options", "settings"), OFT_CASES)
def test_oftv2_equals_peft(kind: str, options: dict[str, Any], settings: dict[str, Any]) -> None:
    from peft import OFTConfig

    net, x = net_of(kind)
    adapter = adapted(net, "oftv2", options).adapters[0]
    config = OFTConfig(target_modules=["layer"], **{"r": 4, "oft_block_size": 0, **settings})
    model, layer = peft_model(net_of(kind)[0], config)
    held = (layer.oft_embedding_R if kind == "embedding" else layer.oft_R)["default"].weight
    assert held.shape == adapter.oft_R.shape
    with torch.no_grad():
        held.copy_(adapter.oft_R)
    if x.is_floating_point():
        x.requires_grad_()
    theirs = model(x)
    type(adapter).after_step([adapter], 0, None)
    assert close(adapter.oft_R, held)
    assert close(net(x), theirs)
    assert all_close(gradients(net(x), [adapter.oft_R], x), gradients(theirs, [held], x))


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_road_equals_peft(variant: str, size: int) -> None:
    from peft import RoadConfig

    net, x = net_of("linear")
    x.requires_grad_()
    model, layer = peft_model(
        net_of("linear")[0], RoadConfig(target_modules=["layer"], variant=variant, group_size=size)
    )
    adapter = adapted(net, "road", {"variant": variant, "group_size": size}).adapters[0]
    held = [layer.road_theta["default"], layer.road_alpha["default"]]
    with torch.no_grad():
        held[0].copy_(adapter.road_theta)
        held[1].copy_(adapter.road_alpha)
    assert close(net(x), model(x))
    ours = gradients(net(x), [adapter.road_theta, adapter.road_alpha], x)
    assert all_close(ours, gradients(model(x), held, x))


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        ("oft", "linear", {"block_size": 8, "rescaled": True}),
        ("oft", "conv2d grouped", {"block_size": 4, "constraint": 0.01}),
        ("oft", "embedding", {"block_size": 6, "rescaled": True}),
        ("boft", "conv3d", {"rescaled": True, "constraint": 0.01}),
        ("oftv2", "conv2d", {"block_share": True, "neumann_terms": 0}),
        ("oftv2", "conv2d grouped", {"block_size": 2}),
        ("oftv2", "fused", {"block_share": True}),
        ("road", "conv2d", {"variant": "road_2", "group_size": 4}),
        ("road", "embedding", {"variant": "road_4", "group_size": 6}),
    ],
)
def test_options_keep_the_invariants(method: str, kind: str, options: dict[str, Any]) -> None:
    check_options(method, kind, options)


@pytest.mark.parametrize(("method", "options"), [("oft", {}), ("oftv2", {"neumann_terms": 0}), ("boft", {})])
def test_a_rotation_keeps_the_singular_values(method: str, options: dict[str, Any]) -> None:
    net, _ = net_of("linear")
    before = torch.linalg.svdvals(net.layer.weight)
    with adapted(net, method, options).merged():
        assert close(torch.linalg.svdvals(net.layer.weight), before)


def test_boft_mixes_every_channel_with_every_other() -> None:
    net, _ = net_of("linear without bias")
    adapter = adapted(net, "boft").adapters[0]
    assert adapter.oft_blocks.shape == (3, 4, 4, 4)
    identity = torch.eye(16)
    assert ((identity + adapter.change(identity.dtype)(identity)).abs() > 1e-6).all()


def test_coft_stays_in_its_ball_while_training() -> None:
    net, x = net_of("linear")
    adapters = inject(
        {"net": net}, AdapterPlan(("layer",), config=AdapterConfig("oftv2", 4, options={"coft": True})), {}
    )
    optimizer = torch.optim.SGD(adapters.parameters(), 1.0)
    net(x).square().sum().backward()
    optimizer.step()
    norms = [adapters.adapters[0].oft_R.norm(dim=1) * 2**0.5]
    adapters.after_step(0, optimizer)
    norms.append(adapters.adapters[0].oft_R.norm(dim=1) * 2**0.5)
    assert (norms[0] > 3e-5).all()
    assert torch.allclose(norms[1], torch.full((4,), 6e-5 / 2))


@pytest.mark.parametrize("method", ["oft", "oftv2", "boft", "road"])
def test_every_sample_has_its_own_rotation(method: str) -> None:
    check_rows(method)


@pytest.mark.parametrize(
    ("method", "kind", "options", "rank", "message"),
    [
        ("oft", "linear", {}, 3, r"net\.layer: 8 channels do not divide .* rank 3; .* 2 \(rank 4\), 4 \(rank 2\)"),
        ("oft", "linear", {}, 8, "do not divide into blocks by rank 8"),
        ("oft", "linear", {"block_size": 1}, 4, "block_size is 1; it must be 2 or more"),
        ("oft", "linear", {"constraint": -1}, 4, "constraint is -1; it must be 0"),
        ("oftv2", "linear", {"block_size": 5}, 4, "12 channels do not divide into blocks by block_size 5"),
        ("oftv2", "conv2d grouped", {"block_size": 4}, 4, "cross the groups .* divides 2"),
        ("oftv2", "linear", {"neumann_terms": 1}, 4, "neumann_terms is 1"),
        ("boft", "conv2d", {}, 4, "up to rank 4 .* makes 12 outputs; choose a rank of 6 or more"),
        ("boft", "linear", {}, 1, "up to rank 1 .* choose a rank of 2 or more"),
        ("road", "conv2d", {"group_size": 64}, 4, "12 outputs do not divide into groups of 64"),
        ("road", "linear", {"variant": "road_3"}, 4, "variant is 'road_3'"),
    ],
)
def test_what_cannot_rotate_is_refused(
    method: str, kind: str, options: dict[str, Any], rank: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(net_of(kind)[0], method, options, rank=rank)


@pytest.mark.parametrize("method", ["oft", "oftv2", "boft", "road"])
def test_a_file_for_another_layer_is_refused(method: str) -> None:
    entry = adapted(net_of("linear")[0], method).state()["net.layer"]
    with pytest.raises(ConfigError, match="this layer has|a layer of 24 outputs"):
        attach_adapters({"net": nn.ModuleDict({"layer": nn.Linear(20, 24)})}, {"net.layer": entry})
