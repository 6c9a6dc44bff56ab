"""Does it do what every selector must, is the operator right, and is the kernel the operator?"""

import math

import pytest
import torch
from group_max import GroupMax
from group_max.scores import INSTANTIATIONS, KERNELS, STRUCTS, group_max

from twilight import compiling, kernels
from twilight.errors import KernelError, MissingExtraError


def nvrtc_missing():
    try:
        compiling.supported_archs()
    except (KernelError, MissingExtraError) as error:
        return str(error)


@pytest.mark.twilight_selector("group_max")
def test_it_is_a_selector(conformance):
    conformance()


@pytest.mark.twilight_selector(GroupMax, recent=8, geometry={"head_dim": 32, "page_size": 8})
def test_it_is_a_selector_on_other_sizes(conformance):
    conformance()


def case(device="cpu", dtype=torch.float32):
    """Three rows over 12 pages, one of them empty."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 6, 40, generator=generator)
    means = torch.randn(12, 2, 40, generator=generator)
    table = torch.tensor([[3, 7, 1, 9], [0, 0, 0, 0], [5, 2, 0, 0]], dtype=torch.int32)
    lens = torch.tensor([50, 0, 17], dtype=torch.int32)
    return q.to(device, dtype), means.to(device, dtype), table.to(device), lens.to(device)


def test_the_reference_is_its_definition():
    q, means, table, lens = case()
    found = group_max(q, means, table, lens, page_size=16)
    for row in range(3):
        for head in range(2):
            for page in range(4):
                expected = -math.inf
                if page * 16 < int(lens[row]):
                    mean = means[int(table[row, page]), head].double()
                    expected = max(float(q[row, 3 * head + g].double() @ mean) for g in range(3))
                assert float(found[row, head, page]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.skipif(nvrtc_missing() is not None, reason="needs NVRTC")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_kernel_compiles_and_spills_nothing(arch):
    found = compiling.compile_source("group_max", INSTANTIATIONS, arch, structs=STRUCTS, source_folder=KERNELS)
    assert len(found) == 3
    assert not any(each.wasteful for each in found)


@pytest.mark.skipif(
    not (torch.cuda.is_available() and kernels.available(torch.device("cuda"))), reason="needs a GPU of 8.0 or more"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_is_the_reference(dtype):
    q, means, table, lens = case("cuda", dtype)
    have, want = (group_max(q, means, table, lens, page_size=16, backend=each) for each in ("cuda", "torch"))
    torch.testing.assert_close(have, want, atol=1e-4, rtol=1e-4)
