"""Several tensors in one copy: each arrives as it was."""

import torch

from dinogen.transfer import _joined, _parted, to_device_together

MIXED = (
    torch.arange(5),
    torch.tensor([True, False, True]),
    torch.tensor(0.5),
    torch.randn(2, 3, dtype=torch.float64),
    torch.zeros(0, 4),
    torch.randn(3, 1),
)


def test_any_types_come_out_of_one_copy_as_they_went_in():
    rows = [one[None] for one in MIXED]
    joined = _joined(rows, pin_memory=False)
    assert joined.shape[0] == 1
    for found, one in zip(_parted(joined[0], rows), MIXED, strict=True):
        assert found.dtype == one.dtype
        assert torch.equal(found, one)


def test_one_of_several_is_chosen_where_the_choice_is_known():
    rows = [torch.stack([one, one + one, one]) for one in MIXED if one.dtype != torch.bool]
    joined = _joined(rows, pin_memory=False)
    chosen = joined.index_select(0, torch.tensor([1]))[0]
    for found, row in zip(_parted(chosen, rows), rows, strict=True):
        assert torch.equal(found, row[1])
    cpu = torch.device("cpu")
    for found, row in zip(to_device_together(rows, cpu, torch.tensor(1)), rows, strict=True):
        assert torch.equal(found, row[1])
