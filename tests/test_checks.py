"""Checks: a message names the argument, what came and what was expected."""

from __future__ import annotations

import math

import pytest
import torch

from twilight import Geometry
from twilight.checks import check_p, check_positive, check_tensor
from twilight.errors import TwilightError, did_you_mean, missing_extra, unknown_name


def test_tensor_that_fits_comes_back() -> None:
    value = torch.zeros(2, 5, 3)
    assert check_tensor("x", value) is value
    fits = check_tensor("x", value, (2, None, 3), dtype=(torch.float16, torch.float32), device=torch.device("cpu"))
    assert fits is value


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5), r"x: expected shape \[2, 5\], got \[2, 5, 3\]"),
        ((2, 5, 4), r"x: expected shape \[2, 5, 4\], got \[2, 5, 3\]"),
        ((None, 6, None), r"x: expected shape \[any, 6, any\], got \[2, 5, 3\]"),
        ((2, 5, 3, 1), r"x: expected shape \[2, 5, 3, 1\], got \[2, 5, 3\]"),
    ],
)
def test_wrong_shape(shape: tuple[int | None, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tensor("x", torch.zeros(2, 5, 3), shape)


def test_wrong_type() -> None:
    with pytest.raises(TypeError, match="x: expected a torch.Tensor, got list"):
        check_tensor("x", [1, 2])
    with pytest.raises(TypeError, match="x: expected dtype uint8, got float32"):
        check_tensor("x", torch.zeros(1), dtype=torch.uint8)
    with pytest.raises(TypeError, match="x: expected dtype float16 or bfloat16, got float32"):
        check_tensor("x", torch.zeros(1), dtype=[torch.float16, torch.bfloat16])


def test_wrong_device() -> None:
    with pytest.raises(ValueError, match="x: expected device cpu, got meta"):
        check_tensor("x", torch.zeros(1, device="meta"), device=torch.device("cpu"))


def test_a_device_without_a_number_is_any_of_its_kind() -> None:
    # What "cuda" is to a tensor on "cuda:0", "cpu:0" is to a tensor on "cpu".
    check_tensor("x", torch.zeros(1), device=torch.device("cpu", 0))


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-3, ValueError), (1.0, TypeError), (True, TypeError)])
def test_positive(value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="n: expected"):
        check_positive("n", value)


def test_mass() -> None:
    assert check_p(1) == 1.0 and isinstance(check_p(1), float)
    assert check_p(5e-324) > 0
    for value in (0, 0.0, -0.1, 1.0000001, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"p: expected a float in \(0, 1\], got {value}"):
            check_p(value)
    for wrong in (True, "0.9", None, torch.tensor(0.9)):
        with pytest.raises(TypeError, match=r"p: expected a float in \(0, 1\], got"):
            check_p(wrong)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"num_layers": 0}, ValueError, "num_layers: expected at least 1, got 0"),
        ({"page_size": 16.0}, TypeError, "page_size: expected an int, got float"),
        ({"num_q_heads": 5}, ValueError, "num_q_heads: expected a multiple of num_kv_heads=2, got 5"),
        ({"head_dim": 7}, ValueError, "head_dim: expected an even number, got 7"),
        ({"head_dim": 6, "page_size": 3}, ValueError, "page_size"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected a floating point type, got torch.int8"),
        ({"layer_ids": (0, 1, 2)}, ValueError, "layer_ids: expected 2 numbers, got 3"),
    ],
)
def test_geometry(sizes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Geometry(**{"num_layers": 2, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8, **sizes})


def test_geometry_fills_in_layers_and_device() -> None:
    geometry = Geometry(3, 8, 2, 64, device="cpu")  # type: ignore[arg-type]
    assert geometry.layer_ids == (0, 1, 2) and geometry.device == torch.device("cpu")
    assert geometry.group_size == 4 and geometry.sm_scale == 0.125


def test_unknown_names_get_a_suggestion_and_what_there_is() -> None:
    assert did_you_mean("qest", ["full", "quest"]) == " Did you mean 'quest'?"
    assert did_you_mean("xyz", ["full", "quest"]) == ""
    error = unknown_name("selector", "qest", ["quest", "full"], see="twilight plugins list")
    assert isinstance(error, TwilightError) and isinstance(error, ValueError)
    lines = ["no selector 'qest'. Did you mean 'quest'?", "  installed: full, quest  (twilight plugins list)"]
    assert str(error).splitlines() == lines
    assert "pip install 'twilight-attn[hf]'" in str(missing_extra("transformers", "hf", "attach"))
