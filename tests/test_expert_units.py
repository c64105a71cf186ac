import torch

from codequant.units.teacher import pairs_by_expert


def test_pairs_by_expert_are_every_expert_s_own_in_order_of_the_tokens():
    index = torch.rand(50, 7, generator=torch.Generator().manual_seed(0)).topk(3, dim=1).indices
    index[index == 4] = 6  # 4 gets nobody, 6 some token twice
    found = pairs_by_expert(index, 2, 4)
    assert len(found) == 4
    for e, (token, slot) in enumerate(found, start=2):
        expected = (index == e).nonzero(as_tuple=True)
        assert torch.equal(token, expected[0]) and torch.equal(slot, expected[1])
