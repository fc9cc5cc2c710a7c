import torch

from duollm.ridge import ridge


def test_the_penalty_is_a_row_of_its_own_for_each_weight():
    """The naive truth: least squares on the data with a row added for each penalised weight."""
    x_NF, y_NC = (torch.randn(30, size, generator=torch.Generator().manual_seed(size)).double() for size in (5, 2))
    weight_FC = ridge(x_NF.T @ x_NF, x_NF.T @ y_NC, 0.3, held=4)
    scale = x_NF[:, :4].square().sum(0).mean()
    rows_FF = torch.tensor([0.3, 0.3, 0.3, 0.3, 0.0]).double().mul(scale).sqrt().diag()
    stacked = torch.cat([x_NF, rows_FF]), torch.cat([y_NC, torch.zeros(5, 2)])
    torch.testing.assert_close(weight_FC, torch.linalg.lstsq(*stacked).solution)


def test_inputs_that_are_zero_throughout_get_no_weight():
    x_NF, y_NC = torch.ones(4, 2).double(), torch.ones(4, 1).double()
    x_NF[:, 1] = 0
    weight_FC = ridge(x_NF.T @ x_NF, x_NF.T @ y_NC, 1e-9, held=1, free=1e-6)
    torch.testing.assert_close(weight_FC, torch.tensor([[1.0], [0.0]]).double())


def test_regressions_side_by_side_are_those_one_by_one():
    x_LNF, y_LNC = torch.randn(3, 20, 4).double(), torch.randn(3, 20, 2).double()
    together = ridge(x_LNF.mT @ x_LNF, x_LNF.mT @ y_LNC, 0.1, held=4)
    alone = [ridge(x.T @ x, x.T @ y, 0.1, held=4) for x, y in zip(x_LNF, y_LNC, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone))
