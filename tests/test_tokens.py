"""Trainable tokens against peft, on tied and untied language models, and after the vocabulary was lengthened."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import tiny_text
import torch
from layers import adapted, close, net_of, randomise
from torch import Tensor, nn

from studio.adapters import AdapterConfig, AdapterPlan, AdapterSet, attach_adapters, inject
from studio.errors import ConfigError

VOCABULARY, TOKENS = 30, [28, 3, 17]
IDS = torch.tensor([[3, 5, 17, 3, 28, 9], [1, 2, 17, 29, 0, 4]])


def llama(tied: bool = True) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny_text.llama(vocab_size=VOCABULARY, tie_word_embeddings=tied, attn_implementation="eager")
        return model.requires_grad_(False).eval()


def trained(model: nn.Module, targets: tuple[str, ...], tokens: list[int] = TOKENS) -> AdapterSet:
    config = AdapterConfig("tokens", options={"token_ids": tokens})
    return inject({"net": model}, AdapterPlan(targets, config=config), {})


def run(model: Any, ids: Tensor = IDS) -> Tensor:
    logits = model(input_ids=ids).logits
    logits.sin().sum().backward()
    return logits


@pytest.mark.parametrize("tied", [True, False])
def test_outputs_and_gradients_equal_peft(tied: bool) -> None:
    """peft ties the head wherever the model does: there, both layers are targets."""
    model = llama(tied)
    adapters = trained(model, ("embed_tokens", "lm_head") if tied else ("embed_tokens",))
    randomise(adapters)
    other = peft.get_peft_model(
        llama(tied), peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"])
    )
    theirs = next(p for name, p in other.named_parameters() if "trainable_tokens_delta" in name)
    places = adapters.adapters[0].token_ids.tolist()
    order = [places.index(token) for token in TOKENS]
    rows = adapters.adapters[0].token_rows
    theirs.data.copy_(rows[order])
    assert close(run(model), run(other))
    assert close(rows.grad[order], theirs.grad)
    other.merge_adapter()
    adapters.merge()
    assert close(model(input_ids=IDS).logits, other(input_ids=IDS).logits)
    assert close(model.get_input_embeddings().weight[TOKENS], rows[order])


def test_an_embedding_alone_leaves_a_tied_head_as_it_is() -> None:
    model = llama()
    head = model.lm_head.weight
    adapters = trained(model, ("embed_tokens",))
    randomise(adapters)
    adapters.merge()
    assert model.lm_head.weight is head
    assert not torch.equal(model.get_input_embeddings().weight[TOKENS], head[TOKENS])


def test_tied_layers_train_one_parameter_and_others_their_own() -> None:
    model = llama()
    tied, separate = (trained(one, ("embed_tokens", "lm_head")) for one in (model, llama(tied=False)))
    assert [len(list(one.parameters())) for one in (tied, separate)] == [1, 2]
    assert [sum(len(group["params"]) for group in one.parameter_groups(1e-3)) for one in (tied, separate)] == [1, 2]
    copied = copy.deepcopy(tied)
    assert len(list(copied.parameters())) == 1
    randomise(tied)
    logits, state = model(input_ids=IDS).logits, tied.state()
    tied.detach()
    attach_adapters({"net": model}, state)
    assert close(model(input_ids=IDS).logits, logits)


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_new_tokens_of_a_longer_vocabulary_train(tied: bool) -> None:
    model = llama(tied)
    before = model.get_input_embeddings().weight.clone()
    model.resize_token_embeddings(VOCABULARY + 2)
    model.requires_grad_(False)
    extra = [VOCABULARY, VOCABULARY + 1]
    start = {name: one.weight.clone() for name, one in (("embed", model.model.embed_tokens), ("head", model.lm_head))}
    plan = AdapterPlan(
        ("q_proj", "embed_tokens", "lm_head"),
        config=AdapterConfig("tokens", options={"token_ids": extra}),
        overrides={"q_proj": {"method": "lora", "rank": 2, "options": {}}},
    )
    adapters = inject({"net": model}, plan, {})
    ids = torch.tensor([[1, 2, extra[0], extra[1], extra[0], extra[1]]])
    optimizer = torch.optim.AdamW(adapters.parameter_groups(0.02), weight_decay=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    adapters.merge()
    now = {"embed": model.model.embed_tokens.weight, "head": model.lm_head.weight}
    for name, table in now.items():
        assert torch.equal(table[:VOCABULARY], start[name][:VOCABULARY])
        assert (table[extra] != start[name][extra]).any(dim=1).all()
    assert torch.equal(now["embed"], now["head"]) == tied
    assert torch.equal(start["embed"][:VOCABULARY], before)


def test_a_file_gives_its_rows_whatever_the_base_has_there() -> None:
    """New rows are random: another start of the base has others, and the trained ones replace them."""
    model = llama()
    adapters = trained(model, ("embed_tokens", "lm_head"))
    randomise(adapters)
    logits, state = model(input_ids=IDS).logits, adapters.state()
    fresh = llama()
    fresh.get_input_embeddings().weight[TOKENS] += 1
    again = attach_adapters({"net": fresh}, state)
    assert close(fresh(input_ids=IDS).logits, logits)
    again.set_strength(0.5)
    again.merge()
    rows = state["net.model.embed_tokens"]
    halfway = (llama().get_input_embeddings().weight[rows["token_ids"]] + 1 + rows["token_rows"]) / 2
    assert close(fresh.get_input_embeddings().weight[rows["token_ids"]], halfway)


def test_rows_in_any_order_find_their_tokens() -> None:
    model = llama()
    rows = torch.randn(3, 16)
    attach_adapters({"net": model}, {"net.model.embed_tokens": {"token_ids": torch.tensor(TOKENS), "token_rows": rows}})
    assert close(model.get_input_embeddings()(torch.tensor(TOKENS)), rows)
    assert close(model.get_input_embeddings()(torch.tensor(TOKENS, dtype=torch.int32)), rows)


def test_the_forward_pass_makes_no_table() -> None:
    layer = nn.Embedding(50_000, 8).requires_grad_(False)
    model = nn.Sequential(layer)
    adapters = trained(model, ("0",), [7, 49_999])
    ids = torch.tensor([[7, 8, 49_999]])
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: (kept.append(one.numel()), one)[1], lambda one: one):
        model(ids).sum().backward()
    assert max(kept) < 1000
    assert adapters.adapters[0].token_rows.grad.shape == (2, 8)


@pytest.mark.parametrize("method", ["tokens", "lora", "dora", "diff"])
def test_an_embedding_that_scales_its_rows(method: str) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Gemma3TextScaledWordEmbedding(20, 12, 0, embed_scale=3.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    net, x = Net().requires_grad_(False), net_of("embedding")[1]
    adapters = adapted(net, method)
    beside = net(x)
    adapters.merge()
    assert close(net(x), beside)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "needs the option token_ids"),
        ([3, 3], "names a token twice"),
        ([20], r"token 20 is not in 0\.\.19"),
        ([-1], "token -1 is not in"),
        ([0], "token 0 is the padding"),
    ],
)
def test_what_cannot_train_is_refused(tokens: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(net_of("embedding")[0], ("layer",), tokens)


def test_a_file_that_does_not_fit_is_refused() -> None:
    for ids, width in (([1, 2], 5), ([1.0, 2.0], 12)):
        entry = {"token_ids": torch.tensor(ids), "token_rows": torch.zeros(2, width)}
        with pytest.raises(ConfigError, match=rf"2 tokens .* have rows \(2, {width}\)"):
            attach_adapters({"net": net_of("embedding")[0]}, {"net.layer": entry})


def test_a_model_without_memory_can_be_planned() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(20, 12))
    assert trained(model, ("0",), [4, 7]).adapters[0].token_rows.device.type == "meta"
