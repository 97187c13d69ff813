"""``nn.MultiheadAttention``: its projections are recorded without ever being called as modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measuring import capture_of, close, half_squares, loop_over_samples, measure, products
from osculate import ArgumentError
from osculate.curvature import Gaussian, Record, discover_layers
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack
from torch.utils.checkpoint import checkpoint

Forward = Callable[[nn.MultiheadAttention, Tensor], Tensor]


def self_attention(attention: nn.MultiheadAttention, x: Tensor, **options: Any) -> Tensor:
    return attention(x, x, x, **options)[0]


def fast(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return self_attention(attention, x, need_weights=False)


def masked(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    mask = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
    return self_attention(attention, x, attn_mask=mask, need_weights=False)


def encoder_decoder(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return attention(x[:, :2], x, x)[0]


def three_inputs(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return attention(x[:, :2], x, x.flip(1), need_weights=False)[0]


def widths(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return attention(x[:, :2], x[..., :3], x[..., 1:])[0]


def keywords(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return attention(query=x, key=x, value=x)[0]


class Attention(nn.Module):
    """One attention module around samples on axis 0; ``batch_first=False`` transposes inside."""

    def __init__(self, forward: Forward, **options: Any) -> None:
        super().__init__()
        self.run = forward
        self.attention = nn.MultiheadAttention(4, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.attention.batch_first:
            return self.run(self.attention, x)
        return self.run(_Transposed(self.attention), x)  # type: ignore[arg-type]


class _Transposed:
    def __init__(self, attention: nn.MultiheadAttention) -> None:
        self.attention = attention

    def __call__(self, *args: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        swapped = {key: value.transpose(0, 1) if key in ("query", "key", "value") else value
                   for key, value in options.items()}  # fmt: skip
        inputs = [value.transpose(0, 1) for value in args]
        if args and args[0] is args[1] is args[2]:
            inputs = [inputs[0]] * 3
        output, weights = self.attention(*inputs, **swapped)
        return output.transpose(0, 1), weights


CASES: dict[str, tuple[Forward, dict[str, Any]]] = {
    "self": (self_attention, {}),
    "self, fused": (fast, {}),
    "self, no bias": (self_attention, {"bias": False}),
    "self, masked": (masked, {}),
    "self, by keyword": (keywords, {}),
    "self, extra tokens": (self_attention, {"add_bias_kv": True, "add_zero_attn": True}),
    "encoder-decoder": (encoder_decoder, {}),
    "encoder-decoder, no bias": (encoder_decoder, {"bias": False}),
    "three inputs": (three_inputs, {}),
    "own widths": (widths, {"kdim": 3, "vdim": 3}),
    "own widths, no bias": (widths, {"kdim": 3, "vdim": 3, "bias": False}),
}


def made(case: str, batch_first: bool = True) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(2)
    forward, options = CASES[case]
    model = Attention(forward, batch_first=batch_first, **options).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, torch.randn(3, 5, 4, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch_first", [True, False])
def test_records_give_gradients_and_per_sample_gradients(case: str, batch_first: bool) -> None:
    model, x = made(case, batch_first)
    statistics = measure(model, [x])
    bias_only = "attention.in_proj" if "own widths" in case else ""
    expected = {"attention.out_proj"} | ({f"attention.{k}_proj" for k in "qkv"} if bias_only else {"attention.in_proj"})
    if bias_only and "no bias" not in case:
        expected.add(bias_only)
    assert statistics.keys() == expected
    order = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    single = loop_over_samples(model, x, lambda out, i: half_squares(out))
    for name, entry in statistics.items():
        assert entry.samples == 3 and entry.layer.kind == "Attention"
        assert entry.layer.is_matrix == (name != bias_only)
        if entry.layer.is_matrix:
            for value, gradient in zip(products(entry), entry.gradients, strict=True):
                close(value, gradient)
        found = entry.per_sample_gradients(entry.preactivation_gradients().flatten(0, 1))
        for value, parameter in zip(found, entry.layer.parameters.values(), strict=True):
            close(value, torch.stack([gradients[order[id(parameter)]] for gradients in single]))


@pytest.mark.parametrize("case", CASES)
def test_scores_are_inner_products(case: str) -> None:
    model, x = made(case)
    record = Record.INPUTS | Record.SAMPLED | Record.MEANS
    for entry in measure(model, [x], record, likelihood=Gaussian()).values():
        directions = tuple(torch.randn_like(parameter) for parameter in entry.layer.parameters.values())
        single = entry.per_sample_gradients(entry.sampled_rows())
        expected = sum((value * along).flatten(1).sum(1) for value, along in zip(single, directions, strict=True))
        close(entry.scores(directions), expected)
        assert entry.mean_preactivation.shape == (entry.layer.parameters.get("weight", torch.ones(12)).shape[0],)


@pytest.mark.parametrize("case", ["self", "encoder-decoder", "own widths"])
def test_micro_batches_and_two_calls(case: str) -> None:
    forward, options = CASES[case]

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention(forward, batch_first=True, **options)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).sum(1) + self.inner(2 * x[:, :4]).sum(1)

    torch.manual_seed(2)
    model, x = Two().double(), torch.randn(4, 5, 4, dtype=torch.float64)
    whole = measure(model, [x])
    pieces = measure(model, x.split(2), loss=lambda out: half_squares(out) / 2)
    order = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    single = loop_over_samples(model, x, lambda out, i: half_squares(out))
    for name, entry in whole.items():
        assert len(entry.calls) == 2 and sum(entry.calls) == entry.positions
        for other in (entry, pieces[name]):
            found = other.per_sample_gradients(other.preactivation_gradients().flatten(0, 1))
            for value, parameter in zip(found, entry.layer.parameters.values(), strict=True):
                close(value, torch.stack([gradients[order[id(parameter)]] for gradients in single]))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_layer_is_covered(batch_first: bool, norm_first: bool) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=batch_first, norm_first=norm_first).double()
    decoder = nn.TransformerDecoderLayer(4, 2, 6, 0.0, batch_first=batch_first).double()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = encoder, decoder

        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            out = self.decoder(x[:, :3] if batch_first else x[:3], self.encoder(x))
            return out if batch_first else out.transpose(0, 1)

    model, x = Model(), torch.randn(3, 5, 4, dtype=torch.float64)
    kinds = {layer.kind for layer in discover_layers(model)}
    assert kinds == {"Attention", "Linear", "LayerNorm"}
    statistics = measure(model, [x])
    assert set().union(*({id(p) for p in e.layer.parameters.values()} for e in statistics.values())) == {
        id(p) for p in model.parameters()
    }
    order = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    single = loop_over_samples(model, x, lambda out, i: half_squares(out))
    for entry in statistics.values():
        assert entry.samples == 3
        found = entry.per_sample_gradients(entry.preactivation_gradients().flatten(0, 1))
        for value, parameter in zip(found, entry.layer.parameters.values(), strict=True):
            close(value, torch.stack([gradients[order[id(parameter)]] for gradients in single]))


def test_evaluation_leaves_no_trace_and_works() -> None:
    model, x = made("self")
    reference = copy.deepcopy(model).eval()
    capture = capture_of(model, Record.INPUTS | Record.GRADIENTS)
    model.eval()
    with torch.no_grad():
        close(model(x), reference(x))
    with torch.inference_mode():
        model(x)
    assert capture.collect() == {} and _len_torch_function_stack() == 0


def test_an_error_inside_attention_leaves_no_mode_behind() -> None:
    model, x = made("self")
    capture = capture_of(model, Record.GRADIENTS | Record.INPUTS)
    with pytest.raises(AssertionError):
        model(x[..., :3])
    assert _len_torch_function_stack() == 0
    half_squares(model(x)).backward()
    assert capture.collect()["attention.in_proj"].samples == 3


def test_unbatched_attention_is_refused() -> None:
    model, x = made("self")
    capture = capture_of(model, Record.GRADIENTS)
    with pytest.raises(ArgumentError, match="unbatched"):
        model(x[0])
    assert _len_torch_function_stack() == 0 and capture.collect() == {}


def test_copies_of_the_model_are_not_recorded() -> None:
    model, x = made("self")
    capture = capture_of(model, Record.GRADIENTS | Record.INPUTS)
    teacher = copy.deepcopy(model)
    half_squares(teacher(x)).backward()
    assert capture.collect() == {}


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight"])
def test_frozen_parameters_of_attention(frozen: str) -> None:
    model, x = made("self")
    model.attention.get_parameter(frozen).requires_grad_(False)
    for entry in measure(model, [x]).values():
        found = entry.per_sample_gradients(entry.preactivation_gradients().flatten(0, 1))
        for value, gradient in zip(found, entry.gradients, strict=True):
            close(value.mean(0), gradient)


def test_look_back_records_frozen_projections() -> None:
    model, x = made("self")
    expected = measure(model.eval(), [x], Record.MEANS)
    capture = capture_of(model, Record.MEANS, kind="look back")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    half_squares(model(x)).backward()
    found = capture.collect()
    assert found.keys() == expected.keys()
    for name, entry in found.items():
        close(entry.mean_preactivation, expected[name].mean_preactivation)
        close(entry.mean_gradient, expected[name].mean_gradient)


def test_checkpointed_attention_counts_once() -> None:
    model, x = made("self")

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, value: Tensor) -> Tensor:
            return checkpoint(self.inner, value, use_reentrant=False)

    for entry in measure(Checkpointed(), [x.requires_grad_()]).values():
        assert entry.samples == 3
        for value, gradient in zip(products(entry), entry.gradients, strict=True):
            close(value, gradient)
    assert _len_torch_function_stack() == 0


def test_tied_attention_has_no_statistics() -> None:
    first, second = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2)
    second.in_proj_weight = first.in_proj_weight
    kinds = {layer.name: layer.kind for layer in discover_layers(nn.ModuleList([first, second]))}
    assert kinds == {"0": "Other", "0.out_proj": "Other", "1": "Other", "1.out_proj": "Other"}
