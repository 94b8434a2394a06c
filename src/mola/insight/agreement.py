"""Measures whether modules sort tokens in the same way, although each module numbers its experts on its own."""

from collections.abc import Sequence

import torch

from mola.insight.recorder import ModuleGates


class AgreementCounter:
    """Counts for every pair of modules how often a token's first choices are experts `i` and `j`.

    A module is left out if, in any pass, its number of tokens differs from that of the first module. The experts of a
    MoE base are left out for this reason.
    """

    def __init__(self) -> None:
        self.modules: list[str] = []
        self._num_experts: list[int] = []
        self._counts: torch.Tensor | None = None  # (sum of E, sum of E): all contingency tables; None before a pass

    def add(self, recorded: Sequence[ModuleGates]) -> None:
        """Count the tokens of one forward pass; for a module that ran several times, the tokens of every run count."""
        calls: dict[str, list[torch.Tensor]] = {}
        for each in recorded:
            calls.setdefault(each.module, []).append(each.gates)
        by_name = {name: torch.cat(gates) for name, gates in calls.items()}
        num_tokens = len(next(iter(by_name.values()))) if by_name else 0
        if self._counts is None:
            same = {name: gates.shape[1] for name, gates in by_name.items() if len(gates) == num_tokens}
            self.modules = list(same)
            self._num_experts = list(same.values())
            width = sum(self._num_experts)
            self._counts = torch.zeros(width, width, dtype=torch.float64)
        else:
            kept = [name for name in self.modules if len(by_name.get(name, ())) == num_tokens]
            if len(kept) < len(self.modules):
                self._keep(kept)
        choices = [
            torch.nn.functional.one_hot(by_name[name].argmax(1), width)
            for name, width in zip(self.modules, self._num_experts, strict=True)
        ]
        if choices:
            one_hot = torch.cat(choices, 1).float()  # (N, sum of E); sums of ones are exact
            self._counts += one_hot.t() @ one_hot

    def _keep(self, names: Sequence[str]) -> None:
        """Drop all modules except those named."""
        num_experts = dict(zip(self.modules, self._num_experts, strict=True))
        is_kept = torch.cat([torch.full((number,), name in names) for name, number in num_experts.items()])
        self.modules, self._num_experts = list(names), [num_experts[name] for name in names]
        assert self._counts is not None
        self._counts = self._counts[is_kept][:, is_kept]

    def cramers_v(self) -> torch.Tensor:
        r"""Cramér's V of every pair of modules over the counted tokens.

            V_ab = sqrt(chi^2 / n / (min(k_a, k_b) - 1)),   chi^2 / n = sum_ij n_ij^2 / (n_i n_j) - 1

        `n_ij` is the number of tokens that module `a` gives to expert `i` first and module `b` to expert `j`. `k` is
        the number of experts that are some token's first choice. 1: the choice of one module determines the choice
        of the other (if `k` differs, the finer choice determines the coarser one). 0: the choices are independent, or a
        module makes the same choice for all tokens.

        Returns:
            float64 `(M, M)`, symmetric, 1 on the diagonal.
        """
        if not self.modules or self._counts is None:
            return torch.zeros(0, 0, dtype=torch.float64)
        totals = self._counts.diagonal()
        expected = totals.unsqueeze(0) * totals.unsqueeze(1)
        ratios = torch.where(expected > 0, self._counts.square() / expected.clamp(min=1), 0.0)
        modules = torch.arange(len(self.modules)).repeat_interleave(torch.tensor(self._num_experts, dtype=torch.long))
        membership = torch.nn.functional.one_hot(modules, len(self.modules)).double()
        chi_squared = membership.t() @ ratios @ membership - 1
        chi_squared = (chi_squared + chi_squared.t()) / 2  # rounding makes the two halves differ
        num_used = membership.t() @ (totals > 0).double()
        degrees = torch.minimum(num_used.unsqueeze(0), num_used.unsqueeze(1)) - 1
        association = (chi_squared.clamp(min=0) / degrees.clamp(min=1)).sqrt().clamp(max=1)
        return torch.where(degrees > 0, association, 0.0).fill_diagonal_(1.0)
